"""A store that machines share: what one has computed the others take, verified; each key is computed once."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from mft_core.errors import ConfigError, StageError, told
from mft_core.recipes import Evaluate, Runtime
from mft_core.store.artifacts import ArtifactStore
from tests.mft_core.store.test_artifacts import make_stage
from tests.mft_core.store.test_outdated import OUTDATED
from tests.support.faults import KILLS
from tests.support.shared_builder import SECONDS, writes

RUNTIME = Runtime()


@pytest.fixture(scope="session")
def s3_server():
    """An S3-compatible server of its own process on loopback, with one bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(f"{address}/studies", method="PUT"))
            break
        time.sleep(0.1)
    yield address
    server.kill()
    server.wait()


@pytest.fixture(params=["a path", "S3"])
def url(request, tmp_path, monkeypatch):
    if request.param == "a path":
        return str(tmp_path / "shared")
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    return f"s3://studies/{tmp_path.name}"


def machine(tmp_path, url, name):
    return ArtifactStore(tmp_path / name, url)


def build(store, runs, task="a", **options):
    return store.build(writes(runs), Evaluate(task=task), {}, RUNTIME, **options)


def test_what_an_earlier_version_got_wrong_is_replaced_for_all_machines(tmp_path, url):
    old = make_stage(name="prepare-data", change=lambda recipe, inputs, out, context: OUTDATED)
    new, recipe = make_stage(name="prepare-data"), Evaluate(task="a")
    first, second, third = (machine(tmp_path, url, name) for name in ("first", "second", "third"))
    wrong = first.build(old, recipe, {}, RUNTIME).ref
    right = second.build(new, recipe, {}, RUNTIME)
    assert (right.computed, right.ref.key) == (True, wrong.key)
    for store in (first, third):
        taken = store.build(new, recipe, {}, RUNTIME)
        assert (taken.computed, taken.ref) == (False, right.ref)
        assert (taken.ref.local_path(store) / "other.txt").read_text() == "whole\n"


def start(tmp_path, url, name, runs, *keys):
    command = [sys.executable, "-m", "tests.support.shared_builder", tmp_path / name, url, runs, *keys]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)


def computed(runs: Path) -> list[str]:
    return [line.split()[0] for line in runs.read_text().splitlines()] if runs.exists() else []


def test_what_one_machine_has_computed_another_takes(tmp_path, url):
    runs = tmp_path / "runs"
    first, second = machine(tmp_path, url, "first"), machine(tmp_path, url, "second")
    made = build(first, runs)
    assert second.find("evaluate", made.ref.key) == made.ref
    assert not second.directory("evaluate", made.ref.key).exists()  # until somebody reads it
    assert not build(second, runs).computed
    numbers = made.ref.local_path(second) / "numbers.txt"
    assert numbers.read_bytes() == (made.ref.local_path(first) / "numbers.txt").read_bytes()
    assert machine(tmp_path, url, "third").manifests("evaluate") == [made.manifest]
    assert second.manifest("evaluate", made.ref.key) == first.manifest("evaluate", made.ref.key)
    assert computed(runs) == ["a"]


def test_a_payload_that_was_altered_in_the_shared_store_is_noticed_and_computed_again(tmp_path, url):
    runs = tmp_path / "runs"
    ref = build(machine(tmp_path, url, "first"), runs).ref
    files = machine(tmp_path, url, "first").shared._files
    (path,) = [name for name in files.find(url) if name.endswith("numbers.txt")]
    text = bytearray(files.cat_file(path))
    text[1000] ^= 1
    files.pipe_file(path, bytes(text))
    second = machine(tmp_path, url, "second")
    with pytest.raises(StageError, match=r"numbers\.txt is missing or altered"):
        ref.local_path(second)
    assert not second.directory("evaluate", ref.key).exists()
    assert build(second, runs).computed
    assert ref.problem(second) is None


def test_a_manifest_that_was_altered_in_the_shared_store_is_no_manifest(tmp_path, url):
    runs = tmp_path / "runs"
    first = machine(tmp_path, url, "first")
    ref = build(first, runs).ref
    files = first.shared._files
    (path,) = [name for name in files.find(url) if name.endswith(".json")]
    files.pipe_file(path, files.cat_file(path).replace(b'"n"', b'"m"').replace(b'"version": 1', b'"version": 7'))
    second = machine(tmp_path, url, "second")
    assert second.find("evaluate", ref.key) is None
    assert build(second, runs).computed
    assert machine(tmp_path, url, "third").find("evaluate", ref.key) == ref


def test_a_damaged_copy_is_replaced_by_the_shared_artifact(tmp_path, url):
    runs = tmp_path / "runs"
    store = machine(tmp_path, url, "first")
    ref = build(store, runs).ref
    (ref.local_path(store) / "numbers.txt").write_text("other")
    assert store.find("evaluate", ref.key) == ref
    assert (ref.local_path(store) / "numbers.txt").read_text().startswith("a\n")
    assert computed(runs) == ["a"]


def test_whoever_computes_over_a_damaged_copy_does_not_wait_for_himself(tmp_path, url):
    runs = tmp_path / "runs"
    store = machine(tmp_path, url, "first")
    ref = build(store, runs).ref
    (ref.local_path(store) / "numbers.txt").write_text("other")
    assert not build(store, runs).computed
    assert (ref.local_path(store) / "numbers.txt").read_text().startswith("a\n")


def test_of_two_attempts_the_first_manifest_stands_and_the_other_machine_takes_its_payload(tmp_path, url):
    runs = tmp_path / "runs"
    first, second = machine(tmp_path, url, "first"), machine(tmp_path, url, "second")
    second.shared.lease = lambda *told: contextlib.nullcontext()  # a lease that was lost
    stage = writes(runs)
    own = stage.run

    def slow(recipe, inputs, out, context):
        summary = own(recipe, inputs, out, context)
        (out / "numbers.txt").write_text("by the second machine")
        theirs.append(build(first, runs))  # finishes before we do
        return summary

    theirs: list = []
    object.__setattr__(stage, "load", lambda: slow)
    stage.__dict__.pop("run", None)
    ours = second.build(stage, Evaluate(task="a"), {}, RUNTIME)
    assert ours.ref == theirs[0].ref
    assert (ours.ref.local_path(second) / "numbers.txt").read_text().startswith("a\n")
    assert len([name for name in first.shared._files.find(url) if name.endswith("numbers.txt")]) == 1


def test_rerun_replaces_what_the_shared_store_has(tmp_path, url):
    runs = tmp_path / "runs"
    store = machine(tmp_path, url, "first")
    ref = build(store, runs).ref
    again = build(store, runs, force=True)
    assert again.computed
    assert again.ref == ref
    assert machine(tmp_path, url, "second").manifest("evaluate", ref.key) == again.manifest


def test_two_machines_that_race_for_keys_compute_each_once(tmp_path, url):
    runs = tmp_path / "runs"
    keys = ["a", "b", "c", "d"]
    both = [start(tmp_path, url, "first", runs, *keys), start(tmp_path, url, "second", runs, *reversed(keys))]
    assert [process.communicate(timeout=120)[0] for process in both] == ["built\n", "built\n"]
    assert sorted(computed(runs)) == keys


def test_the_lease_of_a_killed_machine_is_taken_over(tmp_path, url):
    runs = tmp_path / "runs"
    first = start(tmp_path, url, "first", runs, "a")
    files = machine(tmp_path, url, "first").shared._files
    while not any("/locks/" in name for name in files.find(url)):
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start(tmp_path, url, "second", runs, "a")
    assert second.communicate(timeout=120)[0] == "built\n"
    assert not any("/locks/" in name for name in files.find(url))


def test_a_machine_goes_on_at_once_where_a_process_of_its_own_was_killed(tmp_path, url):
    runs, told = tmp_path / "runs", []
    killed = start(tmp_path, url, "first", runs, "a")
    files = machine(tmp_path, url, "first").shared._files
    while not any("/locks/" in name for name in files.find(url)):
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert build(machine(tmp_path, url, "first"), runs, report=told.append).computed
    assert not [progress.doing for progress in told if progress.doing], "nobody is left to be waited for"
    assert not any("/locks/" in name for name in files.find(url))
    assert not list(tmp_path.glob("first/locks/*.lease"))


def test_a_store_that_is_not_there_is_refused_before_anything_is_computed(tmp_path, url):
    (tmp_path / "file").write_text("x")
    wrong = "s3://no-such-bucket/x" if url.startswith("s3:") else str(tmp_path / "file" / "below")
    with pytest.raises(ConfigError) as refused:
        ArtifactStore(tmp_path / "home", wrong).check_writable()
    assert f"MFT_STORE = {wrong}: cannot be written to" in told(refused.value)
    ArtifactStore(tmp_path / "home", url).check_writable()


def test_a_url_of_no_known_service_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"MFT_STORE = ftps3://x/y: .*Valid is any URL of fsspec"):
        ArtifactStore(tmp_path, "ftps3://x/y")


@pytest.mark.slow
def test_kills_leave_every_artifact_whole_and_none_computed_twice(tmp_path, url):
    runs, draws = tmp_path / "runs", random.Random(7)
    keys = [f"key-{number}" for number in range(12)]
    for kill in range(KILLS):
        process = start(tmp_path, url, f"machine-{kill % 3}", runs, *keys)
        time.sleep(draws.uniform(2.0, 2.5 + 6 * SECONDS))
        process.kill()
        process.wait()
        before = computed(runs)
    assert start(tmp_path, url, "last", runs, *keys).communicate(timeout=300)[0] == "built\n"
    after = computed(runs)
    whole = machine(tmp_path, url, "reader")
    for key in keys:
        ref = build(whole, runs, key).ref
        assert (ref.local_path(whole) / "numbers.txt").read_text() == f"{key}\n" * 20_000
    assert computed(runs) == after  # the reader computed nothing
    assert set(after) == set(keys)
    assert len(after) - len(keys) <= KILLS  # a kill between the end of the work and its manifest costs that work once
    assert before  # the kills did not all come too early
    assert not list(tmp_path.glob("reader/artifacts/evaluate/.*"))

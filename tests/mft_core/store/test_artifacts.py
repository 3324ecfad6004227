"""The store: an artifact exists whole or not at all, is computed once, and damage is noticed and named."""

import contextlib
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from mft_core.errors import ConfigError, StageError, told
from mft_core.recipes import Evaluate, Runtime
from mft_core.stage import Progress, Stage
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.manifests import MANIFEST
from mft_core.store.sources import Source, local_checkpoint, local_file, pinned
from pipelines.run.logs import log_to
from tests.support.faults import fill, small_disk

RECIPE = Evaluate(task="something")
RUNTIME = Runtime()


class Writes(Stage):
    """A stage that writes two files, counts its runs, and can be told to fail or to take its time."""

    runs: ClassVar[list[str]] = []
    fails = False
    change = None
    seconds = 0.0

    @property
    def run(self):
        def write(recipe, inputs, out, context):
            self.runs.append(recipe.task)
            (out / "part").mkdir()
            (out / "part" / "numbers.txt").write_text("1 2 3\n")
            time.sleep(self.seconds)
            (context.work / "state").write_text("half")
            if self.fails:
                raise StageError("broken")
            (out / "other.txt").write_text("whole\n")
            return {"n": 3}

        return self.change or write


def unused(*_):
    raise AssertionError


def make_stage(**attributes):
    stage = Writes("evaluate", 1, Evaluate, heavy=False, needs=unused, load=unused)
    for name, value in {"runs": [], **attributes}.items():
        object.__setattr__(stage, name, value)
    return stage


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


def build(store, stage, **options):
    return store.build(stage, RECIPE, {}, RUNTIME, **options)


def test_a_second_build_computes_nothing(store):
    stage = make_stage()
    first, second = build(store, stage), build(store, stage)
    assert (first.computed, second.computed) == (True, False)
    assert first.ref == second.ref
    assert len(stage.runs) == 1


def test_the_manifest_lists_every_file_with_size_and_sha256_and_where_it_comes_from(store):
    ref = build(store, make_stage()).ref
    manifest = json.loads((ref.local_path(store) / MANIFEST).read_text())
    assert set(manifest["files"]) == {"part/numbers.txt", "other.txt"}
    assert manifest["files"]["other.txt"]["size"] == 6
    assert manifest["summary"] == {"n": 3}
    assert {"git_commit", "source_digest", "packages", "seconds", "runtime"} <= set(manifest["provenance"])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: (d / "other.txt").unlink(), "other.txt: missing"),
        (lambda d: (d / "other.txt").write_text("wh"), "other.txt: 2 bytes, not 6"),
        (lambda d: (d / "other.txt").write_text("whale\n"), "other.txt: content altered"),
        (lambda d: (d / MANIFEST).unlink(), f"{MANIFEST}: missing or unreadable"),
        (lambda d: (d / MANIFEST).write_text("{"), f"{MANIFEST}: missing or unreadable"),
        (lambda d: [p.unlink() for p in d.rglob("*") if p.is_file()], f"{MANIFEST}: missing"),
    ],
)
def test_a_damaged_payload_is_noticed_named_and_computed_again(store, damage, named, caplog):
    stage = make_stage()
    ref = build(store, stage).ref
    damage(ref.local_path(store))
    assert store.damage("evaluate", ref.key).startswith(named)
    assert store.find("evaluate", ref.key) is None
    again = build(store, stage)
    assert again.computed
    assert again.ref == ref
    assert store.damage("evaluate", ref.key) is None
    assert named in caplog.text


@pytest.mark.parametrize(
    ("add", "named"),
    [
        (lambda d: (d / "adapter_config.json").write_text("{}"), "adapter_config.json"),
        (lambda d: (d / "part" / "adapter_config.json").write_text("{}"), "part/adapter_config.json"),
        (lambda d: (d / "new").mkdir() or (d / "new" / "chat.jinja").write_text("x"), "new/chat.jinja"),
        (lambda d: (d / "part" / "more.json").symlink_to(d / "other.txt"), "part/more.json"),
        (lambda d: (d / "part" / "more.json").symlink_to(d / "nothing"), "part/more.json"),
        (lambda d: (d / "more").symlink_to(d / "part", target_is_directory=True), "more"),
        (lambda d: (d / "part").rename(d.parent / "p") and (d / "part").symlink_to(d.parent / "p"), "part"),
        (lambda d: (d / "part" / MANIFEST).write_text("{}"), f"part/{MANIFEST}"),
    ],
)
def test_a_file_that_was_added_to_an_artifact_is_noticed_named_and_computed_away(store, add, named, caplog):
    ref = build(store, make_stage()).ref
    assert store.find("evaluate", ref.key) == ref
    add(ref.local_path(store))
    assert store.damage("evaluate", ref.key) == f"{named}: not in the manifest, added since"
    assert store.find("evaluate", ref.key) is None
    again = build(store, make_stage())
    assert (again.computed, again.ref) == (True, ref)
    assert store.damage("evaluate", ref.key) is None
    assert f"{named}: not in the manifest" in caplog.text


def test_what_no_loader_looks_at_is_no_damage(store):
    ref = build(store, make_stage()).ref
    (ref.local_path(store) / "part" / ".DS_Store").write_text("a file manager's")
    (ref.local_path(store) / "empty").mkdir()
    assert store.find("evaluate", ref.key) == ref


def test_a_flipped_bit_with_the_old_time_stamp_is_noticed_by_a_new_process(store):
    ref = build(store, make_stage()).ref
    path = ref.local_path(store) / "other.txt"
    before = path.stat()
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "altered" in ArtifactStore(store.home).damage("evaluate", ref.key)


def test_a_manifest_that_was_edited_is_not_trusted(store):
    ref = build(store, make_stage()).ref
    path = ref.local_path(store) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["other.txt"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert MANIFEST in store.damage("evaluate", ref.key)


def test_a_deleted_artifact_is_computed_again_with_the_same_digest(store):
    stage = make_stage()
    ref = build(store, stage).ref
    shutil.rmtree(ref.local_path(store))
    assert build(store, stage).ref == ref
    assert len(stage.runs) == 2


def test_a_failed_stage_leaves_no_artifact_and_keeps_its_resumable_state(store):
    stage = make_stage(fails=True)
    with pytest.raises(StageError):
        build(store, stage)
    key = store.key(stage, RECIPE, {})
    assert not list((store.home / "artifacts").rglob("*.txt"))
    assert (store.work(key) / "state").exists()
    object.__setattr__(stage, "fails", False)
    assert build(store, stage).computed
    assert not store.work(key).exists()


def test_rerun_computes_again_and_replaces_the_artifact(store):
    stage = make_stage()
    ref = build(store, stage).ref
    assert build(store, stage, force=True).computed
    assert store.find("evaluate", ref.key) == ref
    assert not [p for p in ref.local_path(store).parent.iterdir() if p.name.startswith(".")]


def test_two_threads_that_need_one_key_compute_it_once(store):
    stage = make_stage(seconds=0.3)
    built = []
    threads = [threading.Thread(target=lambda: built.append(build(store, stage))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(b.computed for b in built) == [False, False, False, True]
    assert len(stage.runs) == 1


def test_the_lock_of_a_killed_holder_does_not_block(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from mft_core.store.artifacts import ArtifactStore\n"
        "with ArtifactStore(Path(sys.argv[1])).lock('abc'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip() == "held"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    with ArtifactStore(tmp_path).lock("abc"):
        assert time.monotonic() - started < 5


def test_who_waits_for_a_lock_says_for_whom_again_and_again_and_can_be_stopped(tmp_path):
    code = (
        "import sys; from pathlib import Path; from mft_core.store.artifacts import ArtifactStore\n"
        "with ArtifactStore(Path(sys.argv[1])).lock('abc'): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    told: list[str] = []

    def report(progress: Progress) -> None:
        told.append(progress.doing)
        if len(told) == 2:
            raise StageError("enough")

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(StageError, match="enough"), ArtifactStore(tmp_path).lock("abc", report):
            pass
        assert told == [f"waiting for the lock of PID {holder.pid}"] * 2
        holder.stdin.close()
    with ArtifactStore(tmp_path).lock("abc"):  # whoever gave up does not hold it
        assert (tmp_path / "locks" / "abc").read_text().startswith(f"{os.getpid()} ")


def test_what_a_killed_run_left_is_cleared_and_never_taken_for_an_artifact(store):
    stage = make_stage()
    key = store.key(stage, RECIPE, {})
    left = store.home / "artifacts" / "evaluate" / f".incomplete-{key}"
    left.mkdir(parents=True)
    (left / "rubbish.txt").write_text("half")
    ref = build(store, stage).ref
    assert not left.exists()
    assert not (ref.local_path(store) / "rubbish.txt").exists()


def test_an_unwritable_home_is_refused_with_its_path():
    with pytest.raises(ConfigError, match=r"MFT_HOME = /proc/nowhere: not writable"):
        ArtifactStore(Path("/proc/nowhere")).check_writable()


@pytest.mark.parametrize("folder", ["artifacts", "work", "locks", "logs", "prefect", "reports"])
def test_a_file_where_a_folder_was_is_refused_before_compute(store, folder):
    store.home.mkdir()
    store.check_writable()
    (store.home / folder).write_text("in the way")
    with pytest.raises(ConfigError, match=rf"not writable \({folder}: (File exists|Not a directory)\)"):
        store.check_writable()
    assert sorted(path.name for path in store.home.iterdir()) == [folder]


def test_a_file_where_an_artifact_was_is_computed_away(store):
    ref = build(store, make_stage()).ref
    shutil.rmtree(ref.local_path(store))
    store.directory("evaluate", ref.key).write_text("in the way")
    assert build(store, make_stage()).computed
    assert store.find("evaluate", ref.key) == ref


def test_a_stage_on_a_full_disk_leaves_nothing_and_its_error_is_a_sentence(tmp_path):
    def write(recipe, inputs, out, context):
        (out / "large").write_bytes(bytes(2_000_000))
        return {}

    with small_disk(tmp_path / "disk", "1M") as disk:
        store, stage = ArtifactStore(disk / "home"), make_stage(change=write)
        with pytest.raises(OSError, match="No space left") as failure:
            build(store, stage)
        assert re.fullmatch(r"(/\S+: )?No space left on device\. Make room; the same .*\.", told(failure.value))
        assert not list(disk.glob("home/artifacts/evaluate/*"))
        fill(disk)
        with pytest.raises(ConfigError, match=r"not writable \(No space left on device\)"):
            store.check_writable()
        with log_to(disk / "home", "study") as log:
            logging.getLogger("mft").error("a long line " * 1000)
        assert log.read_text() == ""


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest["summary"].update(n=4),
        lambda manifest: manifest["provenance"].update(seconds=0.0),
        lambda manifest: manifest["recipe"].update(task="another"),
        lambda manifest: manifest["inputs"].update(model="0" * 64),
        lambda manifest: manifest.pop("recipe"),
        lambda manifest: manifest.pop("manifest_sha256"),
        lambda manifest: manifest["files"].update({"other.txt": {}}),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.clear(),
    ],
)
def test_every_field_of_the_manifest_is_protected_and_none_may_be_missing(store, edit):
    ref = build(store, make_stage()).ref
    path = ref.local_path(store) / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    assert store.damage("evaluate", ref.key).startswith(MANIFEST)
    assert build(store, make_stage()).computed


@pytest.mark.parametrize("content", ["null", "[]", "7", '{"files": {"a": 1}}', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_some_other_json_is_damage(store, content):
    ref = build(store, make_stage()).ref
    (ref.local_path(store) / MANIFEST).write_bytes(content.encode("latin-1"))
    assert store.damage("evaluate", ref.key) == f"{MANIFEST}: missing or unreadable"


def test_an_artifact_that_was_put_in_place_of_another_is_not_taken_for_it(store):
    ref = build(store, make_stage()).ref
    other = store.directory("evaluate", "0" * 64)
    shutil.copytree(ref.local_path(store), other)
    assert store.damage("evaluate", "0" * 64) == f"{MANIFEST}: does not match its own digest or key"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def add_a_template(path):
    (path.parent / "chat_template.jinja").write_text("new")


def add_a_template_for_tools(path):
    (path.parent / "additional_chat_templates").mkdir()
    (path.parent / "additional_chat_templates" / "tool_use.jinja").write_text("new")


def add_an_adapter(path):
    (path.parent / "adapter_config.json").write_text("{}")


def make_inputs(store, tmp_path):
    """Return an input of each kind, and a file of each."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    ref = store.build(make_stage(), Evaluate(task="upstream"), {}, RUNTIME).ref
    return {
        "artifact": (ref.at("part"), ref.local_path(store) / "part" / "numbers.txt"),
        "rows": (local_file(tmp_path / "rows.jsonl", "rows"), tmp_path / "rows.jsonl"),
        "model": (local_checkpoint("model", tmp_path / "model"), tmp_path / "model" / "config.json"),
        "hub": (pinned("some/model", "0" * 40, "model"), tmp_path / "nothing"),
        "harness": (Source(location="lm-eval", digest="0" * 64), tmp_path / "nothing"),
    }


DAMAGES = [
    ("artifact", truncate, "part/numbers.txt: 5 bytes, not 6"),
    ("rows", truncate, "its content was changed"),
    ("rows", Path.unlink, f"the file is missing on {platform.node()}: put it there"),
    ("model", truncate, "its content was changed"),
    ("model", Path.unlink, "config.json is missing"),
    ("model", add_a_template, "chat_template.jinja was added"),
    ("model", add_a_template_for_tools, "additional_chat_templates/tool_use.jinja was added"),
    ("model", add_an_adapter, "adapter_config.json was added"),
    ("artifact", add_an_adapter, "part/adapter_config.json: not in the manifest"),
]


@pytest.mark.parametrize(("name", "damage", "told"), DAMAGES)
def test_an_input_that_is_not_what_was_planned_is_never_read(store, tmp_path, name, damage, told):
    source, path = make_inputs(store, tmp_path)[name]
    stage = make_stage()
    damage(path)
    with pytest.raises(StageError, match=rf"its input '{name}' .*{told}.*run the same command again"):
        store.build(stage, RECIPE, {name: source}, RUNTIME)
    assert stage.runs == []


@pytest.mark.parametrize("failure", [None, ConfigError("no readable model.safetensors")])
@pytest.mark.parametrize(("name", "damage", "told"), DAMAGES)
def test_an_input_that_changes_while_the_stage_runs_is_told_and_nothing_is_kept(
    store, tmp_path, name, damage, told, failure
):
    source, path = make_inputs(store, tmp_path)[name]

    def disturbed(recipe, inputs, out, context):
        (context.work / "state").write_text("made of other content")
        damage(path)
        if failure:
            raise failure
        return {}

    stage = make_stage(change=disturbed)
    key = store.key(stage, RECIPE, {name: source})
    with pytest.raises(StageError, match=rf"its input '{name}' .*{told}"):
        store.build(stage, RECIPE, {name: source}, RUNTIME)
    assert store.damage("evaluate", key) == "missing"
    assert not store.work(key).exists()


def test_another_result_in_the_place_of_an_input_is_noticed(store, tmp_path):
    ref, _ = make_inputs(store, tmp_path)["artifact"]
    with pytest.raises(StageError, match="another result has taken its place"):
        store.build(make_stage(), RECIPE, {"model": ref.model_copy(update={"digest": "0" * 64})}, RUNTIME)


def test_inputs_that_stay_as_they_are_stop_nothing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "local_path", lambda source, store: Path(source.location))
    inputs = {name: source for name, (source, _) in make_inputs(store, tmp_path).items()}
    assert store.build(make_stage(), RECIPE, inputs, RUNTIME).computed


def test_a_rerun_that_was_cut_short_goes_on_and_a_new_one_begins_from_nothing(store):
    found = []

    def work(recipe, inputs, out, context):
        found.append((context.work / "state").exists())
        (context.work / "state").write_text("half")
        if len(found) in (1, 3):
            raise KeyboardInterrupt
        return {}

    stage = make_stage(change=work)
    for force in (False, True, True, True):
        with contextlib.suppress(KeyboardInterrupt):
            build(store, stage, force=force)
    assert found == [False, False, False, True]

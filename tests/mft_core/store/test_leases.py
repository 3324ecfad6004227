"""Who computes a key that several machines want: one, at a time; and another where he dies."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time

import pytest

from mft_core.recipes import Evaluate
from mft_core.store import shared
from mft_core.store.shared import SharedStore
from tests.support.faults import KILLS
from tests.support.shared_builder import SECONDS, build, computed, machine, start, writes


def test_a_lease_that_cannot_be_given_back_fails_no_stage(tmp_path, url, monkeypatch, caplog):
    store, runs = machine(tmp_path, url, "first"), tmp_path / "runs"

    def unreachable(*given):
        raise ConnectionError("connection reset by peer")

    with monkeypatch.context() as broken:
        broken.setattr(store.shared, "_mine", unreachable)
        assert build(store, runs).computed
    assert "could not be given back" in caplog.text
    told = []
    assert not build(store, runs, report=told.append).computed
    assert not [progress.doing for progress in told if progress.doing], "nobody waits for himself"


def test_of_two_who_take_over_a_silent_lease_one_holds_it(tmp_path, url, monkeypatch):
    monkeypatch.setattr(shared, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(shared, "LOST_SECONDS", 2.0)
    stores = [SharedStore(url) for _ in range(3)]
    inside, most, done = [], [], []

    def hold(number):
        with stores[number].lease("key", tmp_path / f"note-{number}", lambda progress: None):
            inside.append(number)
            time.sleep(0.3)
            most.append(len(inside))
            inside.remove(number)
        done.append(number)

    stores[0]._create(f"{stores[0]._root}/locks/key", b"gone, process 1, 0")
    create, both = SharedStore._create, threading.Barrier(2)

    def together(store, path, data):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(5)  # both have seen the silence
        return create(store, path, data)

    monkeypatch.setattr(SharedStore, "_create", together)
    threads = [threading.Thread(target=hold, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [1, 2]
    assert set(most) == {1}
    assert not any("/locks/" in name for name in stores[0]._files.find(url))


def test_two_machines_that_race_for_keys_compute_each_once(tmp_path, url):
    runs = tmp_path / "runs"
    keys = ["a", "b", "c", "d"]
    both = [start(tmp_path, url, "first", runs, *keys), start(tmp_path, url, "second", runs, *reversed(keys))]
    assert all(process.communicate(timeout=120)[0].endswith("built\n") for process in both)
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
    assert second.communicate(timeout=120)[0].endswith("built\n")
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


@pytest.mark.slow
def test_kills_leave_every_artifact_whole_and_none_computed_twice(tmp_path, url):
    runs, draws = tmp_path / "runs", random.Random(7)
    keys, lost, before = [f"key-{number}" for number in range(KILLS)], 0, []
    reader, stage = machine(tmp_path, url, "reader"), writes(runs)
    for kill in range(KILLS):
        process = start(tmp_path, url, f"machine-{kill % 3}", runs, *keys)
        for _ in range(draws.randint(1, 2)):  # a busy machine starts it slowly, and a kill is to hit the work
            process.stdout.readline()
        time.sleep(draws.uniform(0, 2 * SECONDS))
        process.kill()
        process.wait()
        new, before = computed(runs)[len(before) :], computed(runs)
        lost += sum(reader.find("evaluate", reader.key(stage, Evaluate(task=key), {})) is None for key in new)
    assert start(tmp_path, url, "last", runs, *keys).communicate(timeout=300)[0].endswith("built\n")
    after = computed(runs)
    for key in keys:
        ref = build(reader, runs, key).ref
        assert (ref.local_path(reader) / "numbers.txt").read_text() == f"{key}\n" * 20_000
    assert computed(runs) == after  # the reader computed nothing
    assert set(after) == set(keys)
    assert len(after) == len(keys) + lost, "only what a kill hit between its end and its manifest is computed again"
    assert before  # the kills did not all come too early
    assert not list(tmp_path.glob("reader/artifacts/evaluate/.*"))

"""A store that machines share: what one has computed the others take, verified; each key is computed once."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from mft_core.errors import ConfigError, StageError, told
from mft_core.recipes import Evaluate, Runtime
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.shared import SharedStore
from tests.mft_core.store.test_artifacts import make_stage, truncate
from tests.mft_core.store.test_outdated import OUTDATED
from tests.support.shared_builder import build, computed, machine, writes

RUNTIME = Runtime()


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


def test_what_one_machine_has_computed_another_takes(tmp_path, url):
    runs = tmp_path / "runs"
    first, second = machine(tmp_path, url, "first"), machine(tmp_path, url, "second")
    made = build(first, runs)
    assert second.find("evaluate", made.ref.key) == made.ref
    assert not second.directory("evaluate", made.ref.key).exists()  # until somebody reads it
    assert not build(second, runs).computed
    assert second.read("evaluate", made.ref.key, "numbers.txt") == b"a\n" * 20_000
    assert second.read("evaluate", made.ref.key, "history.jsonl") is None
    assert not second.directory("evaluate", made.ref.key).exists()  # one file is read where it lies
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


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: shutil.rmtree(path.parent), truncate])
def test_a_copy_that_changes_while_a_stage_reads_it_is_told_though_the_shared_one_is_whole(tmp_path, url, damage):
    store = machine(tmp_path, url, "first")
    ref = store.build(make_stage(), Evaluate(task="upstream"), {}, RUNTIME).ref
    path = ref.local_path(store) / "other.txt"
    stage = make_stage(change=lambda recipe, inputs, out, context: damage(path) or {})
    with pytest.raises(StageError, match=r"its input 'model' .* is not what the plan says: "):
        store.build(stage, Evaluate(task="a"), {"model": ref}, RUNTIME)
    key = store.key(stage, Evaluate(task="a"), {"model": ref})
    assert store.damage("evaluate", key) == "missing"
    assert store.build(make_stage(), Evaluate(task="a"), {"model": ref}, RUNTIME).computed
    assert path.read_text() == "whole\n", "fetched again"


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
    assert len([name for name in store.shared._files.find(url) if name.endswith("numbers.txt")]) == 1


def test_a_copy_from_before_there_was_a_shared_store_is_put_there_by_the_next_run(tmp_path, url):
    runs = tmp_path / "runs"
    ref = build(ArtifactStore(tmp_path / "first"), runs).ref
    first, second = machine(tmp_path, url, "first"), machine(tmp_path, url, "second")
    assert first.find("evaluate", ref.key) == ref
    assert second.find("evaluate", ref.key) is None, "who only looks uploads nothing"
    assert first.share("evaluate", ref.key) == ref
    assert ref.problem(second) is None
    assert (ref.local_path(second) / "numbers.txt").read_text().startswith("a\n")
    assert computed(runs) == ["a"]


@pytest.mark.parametrize("again", ["share", "build"])
def test_a_whole_copy_heals_what_was_altered_in_the_shared_store(tmp_path, url, again):
    runs = tmp_path / "runs"
    first, second = machine(tmp_path, url, "first"), machine(tmp_path, url, "second")
    ref = build(first, runs).ref
    files = first.shared._files
    (path,) = [name for name in files.find(url) if name.endswith("numbers.txt")]
    files.pipe_file(path, b"other")
    with pytest.raises(StageError, match="run the same command again: a machine that has a whole copy shares it"):
        ref.local_path(second)
    assert (first.share("evaluate", ref.key) if again == "share" else build(first, runs).ref) == ref
    assert (ref.local_path(second) / "numbers.txt").read_text().startswith("a\n")
    assert computed(runs) == ["a"]


def test_where_a_copy_differs_from_what_the_machines_share_all_take_the_shared_one(tmp_path, url):
    runs, recipe = tmp_path / "runs", Evaluate(task="a")
    other = make_stage(change=lambda recipe, inputs, out, context: (out / "numbers.txt").write_text("mine") and {})
    mine = ArtifactStore(tmp_path / "first").build(other, recipe, {}, RUNTIME).ref
    theirs = build(machine(tmp_path, url, "second"), runs).ref
    first = machine(tmp_path, url, "first")
    assert (mine.key, mine.digest == theirs.digest) == (theirs.key, False)
    assert first.share("evaluate", mine.key) == theirs
    assert (theirs.local_path(first) / "numbers.txt").read_text().startswith("a\n")


def test_a_whole_copy_is_not_given_up_for_a_shared_one_that_turns_out_to_be_damaged(tmp_path, url):
    runs, recipe = tmp_path / "runs", Evaluate(task="a")
    other = make_stage(change=lambda recipe, inputs, out, context: (out / "numbers.txt").write_text("mine") and {})
    mine = ArtifactStore(tmp_path / "first").build(other, recipe, {}, RUNTIME).ref
    build(machine(tmp_path, url, "second"), runs)
    first = machine(tmp_path, url, "first")
    files = first.shared._files
    (path,) = [name for name in files.find(url) if name.endswith("numbers.txt")]
    files.pipe_file(path, b"other")
    with pytest.raises(StageError, match=r"numbers\.txt is missing or altered"):
        first.share("evaluate", mine.key)
    assert ArtifactStore(tmp_path / "first").find("evaluate", mine.key) == mine
    assert first.share("evaluate", mine.key) == mine, "the whole one is what all machines take now"
    assert (mine.local_path(machine(tmp_path, url, "third")) / "numbers.txt").read_text() == "mine"


def test_a_manifest_that_arrives_while_one_looks_for_a_damaged_one_stands(tmp_path, url, monkeypatch):
    runs, theirs = tmp_path / "runs", []
    first, second = machine(tmp_path, url, "first"), machine(tmp_path, url, "second")
    second.shared.lease = lambda *told: contextlib.nullcontext()  # a lease that was lost
    files = second.shared._files
    exists = files.exists

    def late(path, **named):
        monkeypatch.setattr(files, "exists", exists)
        theirs.append(build(first, runs))  # finishes between our two looks
        return exists(path, **named)

    monkeypatch.setattr(files, "exists", late)
    other = make_stage(change=lambda recipe, inputs, out, context: (out / "numbers.txt").write_text("mine") and {})
    ours = second.build(other, Evaluate(task="a"), {}, RUNTIME)
    assert ours.ref == theirs[0].ref
    assert (ours.ref.local_path(second) / "numbers.txt").read_text().startswith("a\n")
    assert ours.ref.problem(machine(tmp_path, url, "third")) is None


def test_what_replaces_an_outdated_result_but_could_not_be_uploaded_gives_way_to_another_machines(
    tmp_path, url, monkeypatch
):
    def write(text, summary):
        def run(recipe, inputs, out, context):
            (out / "one.txt").write_text(text)
            return summary

        return make_stage(name="prepare-data", change=run)

    recipe = Evaluate(task="a")
    first, second, third = (machine(tmp_path, url, name) for name in ("first", "second", "third"))
    first.build(write("outdated", OUTDATED), recipe, {}, RUNTIME)
    with monkeypatch.context() as midway:
        midway.setattr(second.shared._files, "put_file", lambda *_, **__: 1 / 0)
        with pytest.raises(StageError, match="cannot be written to"):
            second.build(write("second", {}), recipe, {}, RUNTIME)
    shared = third.build(write("third", {}), recipe, {}, RUNTIME)
    taken = second.build(write("not computed", {}), recipe, {}, RUNTIME)
    assert (taken.computed, taken.ref) == (False, shared.ref)
    assert (taken.ref.local_path(second) / "one.txt").read_text() == "third"


def test_a_rerun_that_cannot_be_uploaded_whole_leaves_the_shared_result_and_the_next_run_shares_its_own(
    tmp_path, url, monkeypatch
):
    def write(text):
        def run(recipe, inputs, out, context):
            for name in ("one.txt", "two.txt"):
                (out / name).write_text(text)
            (context.work / "state").touch()
            return {}

        return make_stage(change=run)

    def read(ref, name):
        return [path.read_text() for path in sorted(ref.local_path(machine(tmp_path, url, name)).glob("*.txt"))]

    first, recipe = machine(tmp_path, url, "first"), Evaluate(task="a")
    before = first.build(write("before"), recipe, {}, RUNTIME).ref
    put = first.shared._files.put_file

    def broken(source, target, **named):
        if target.endswith("two.txt"):
            raise ConnectionError("connection reset by peer")
        return put(source, target, **named)

    with monkeypatch.context() as midway:
        midway.setattr(first.shared._files, "put_file", broken)
        with pytest.raises(StageError, match=r"cannot be written to \(connection reset by peer\)"):
            first.build(write("after"), recipe, {}, RUNTIME, force=True)
    assert read(before, "second") == ["before", "before"]
    assert machine(tmp_path, url, "second").find("evaluate", before.key) == before
    after = ArtifactStore(tmp_path / "first").find("evaluate", before.key)
    assert after is not None, "what was computed is whole here"
    assert after != before
    assert not list(tmp_path.glob("first/artifacts/evaluate/.*"))
    assert [path.name for path in first.work(after.key).iterdir()] == [".rerun"], "no state to go on from"
    healed = first.build(write("not computed"), recipe, {}, RUNTIME)
    assert (healed.computed, healed.ref) == (False, after)
    assert read(after, "third") == ["after", "after"]
    assert not first.work(after.key).exists()


def replaces(text, dies=False):
    """Return a stage that writes a text, having kept a state of its work; it may be killed then."""

    def run(recipe, inputs, out, context):
        (context.work / "state").touch()
        if dies:
            raise KeyboardInterrupt
        (out / "one.txt").write_text(text)
        return {}

    return make_stage(change=run)


def kill_a_rerun(store, recipe):
    with pytest.raises(KeyboardInterrupt):
        store.build(replaces("killed", dies=True), recipe, {}, RUNTIME, force=True)


def test_a_rerun_that_was_killed_gives_way_to_one_that_another_machine_ended(tmp_path, url):
    first, second, recipe = machine(tmp_path, url, "first"), machine(tmp_path, url, "second"), Evaluate(task="a")
    old = first.build(replaces("old"), recipe, {}, RUNTIME).ref
    kill_a_rerun(first, recipe)
    new = second.build(replaces("new"), recipe, {}, RUNTIME, force=True).ref
    assert first.share("evaluate", old.key) == new
    assert (new.local_path(first) / "one.txt").read_text() == "new"
    assert second.share("evaluate", old.key) == new
    assert (first.work(old.key) / "state").exists(), "for the next --rerun to go on from"


def test_the_state_of_a_rerun_that_was_killed_stays_when_its_machine_heals_the_shared_store(tmp_path, url):
    first, recipe = machine(tmp_path, url, "first"), Evaluate(task="a")
    old = first.build(replaces("old"), recipe, {}, RUNTIME).ref
    kill_a_rerun(first, recipe)
    files = first.shared._files
    files.rm_file(next(name for name in files.find(url) if name.endswith(".json")))
    assert first.share("evaluate", old.key) == old
    assert old.problem(machine(tmp_path, url, "second")) is None
    assert (first.work(old.key) / "state").exists()


@pytest.mark.parametrize("looks_in_between", [True, False])
def test_a_rerun_of_which_the_answer_was_lost_does_not_replace_a_later_one(
    tmp_path, url, monkeypatch, looks_in_between
):
    first, second, recipe = machine(tmp_path, url, "first"), machine(tmp_path, url, "second"), Evaluate(task="a")
    first.build(replaces("old"), recipe, {}, RUNTIME)
    push = first.shared.push

    def lost(*given):
        push(*given)
        raise ConnectionError("connection reset by peer")

    with monkeypatch.context() as midway:
        midway.setattr(first.shared, "push", lost)
        with pytest.raises(ConnectionError):
            first.build(replaces("earlier"), recipe, {}, RUNTIME, force=True)
    earlier = second.find("evaluate", first.key(replaces(""), recipe, {}))
    if looks_in_between:
        assert first.share("evaluate", earlier.key) == earlier
        assert not first.work(earlier.key).exists(), "nothing is left to be shared"
    later = second.build(replaces("later"), recipe, {}, RUNTIME, force=True).ref
    assert first.share("evaluate", earlier.key) == later != earlier
    assert (later.local_path(first) / "one.txt").read_text() == "later"
    assert not first.work(earlier.key).exists()


def test_an_input_that_another_machine_computed_again_takes_the_place_of_an_older_copy(tmp_path, url):
    worker, other, recipe = machine(tmp_path, url, "worker"), machine(tmp_path, url, "other"), Evaluate(task="a")
    old = worker.build(replaces("old"), recipe, {}, RUNTIME).ref
    new = other.build(replaces("new"), recipe, {}, RUNTIME, force=True).ref
    reads = make_stage(change=lambda recipe, inputs, out, context: {"read": (inputs["model"] / "one.txt").read_text()})
    with pytest.raises(StageError, match="another result has taken its place"):
        other.build(reads, Evaluate(task="b"), {"model": old}, RUNTIME)
    assert (old.local_path(worker) / "one.txt").read_text() == "old", "nothing better is there"
    built = worker.build(reads, Evaluate(task="b"), {"model": new}, RUNTIME)
    assert built.manifest["summary"] == {"read": "new"}


def test_an_input_that_is_replaced_while_a_stage_reads_it_is_told(tmp_path, url):
    worker, other, recipe = machine(tmp_path, url, "worker"), machine(tmp_path, url, "other"), Evaluate(task="a")
    old = worker.build(replaces("old"), recipe, {}, RUNTIME).ref

    def replaced(recipe, inputs, out, context):
        other.build(replaces("new"), recipe, {}, RUNTIME, force=True).ref.local_path(worker)
        return {}

    with pytest.raises(StageError, match="another result has taken its place"):
        worker.build(make_stage(change=replaced), recipe, {"model": old}, RUNTIME)


def test_what_is_replaced_while_it_is_fetched_is_fetched_again(tmp_path, url, monkeypatch):
    runs = tmp_path / "runs"
    first, second = machine(tmp_path, url, "first"), machine(tmp_path, url, "second")
    ref = build(first, runs).ref
    fetch = second.shared._fetch

    def late(*given):
        monkeypatch.setattr(second.shared, "_fetch", fetch)
        build(first, runs, force=True)
        return fetch(*given)

    monkeypatch.setattr(second.shared, "_fetch", late)
    assert (ref.local_path(second) / "numbers.txt").read_text().startswith("a\n")
    assert ref.problem(machine(tmp_path, url, "third")) is None


def refusing(store, monkeypatch, error, after):
    """Have a store's exclusive creation raise an error once, after it was carried out or instead."""
    create = store.shared._write_new

    def write(path, data):
        monkeypatch.setattr(store.shared, "_write_new", create)
        if after:
            create(path, data)
        raise error

    monkeypatch.setattr(store.shared, "_write_new", write)


@pytest.mark.parametrize("after", [True, False], ids=["carried out", "not carried out"])
@pytest.mark.parametrize("error", [FileExistsError(), OSError(22, "Precondition Failed"), OSError(5, "Conflict")])
def test_an_answer_that_was_lost_or_says_nothing_destroys_no_result(tmp_path, url, monkeypatch, error, after):
    store, runs = machine(tmp_path, url, "first"), tmp_path / "runs"
    push = store.shared.push

    def refused(*given, **named):
        refusing(store, monkeypatch, error, after)
        return push(*given, **named)

    monkeypatch.setattr(store.shared, "push", refused)
    refusing(store, monkeypatch, error, after)  # of the lease
    built = build(store, runs)
    assert built.computed
    second = machine(tmp_path, url, "second")
    assert second.manifest("evaluate", built.ref.key) == built.manifest
    assert (built.ref.local_path(second) / "numbers.txt").read_text().startswith("a\n")
    assert not any("/locks/" in name for name in store.shared._files.find(url))


def test_a_result_that_cannot_be_shared_is_kept_and_shared_by_the_next_run(tmp_path, url, monkeypatch):
    store, runs = machine(tmp_path, url, "first"), tmp_path / "runs"

    def unreachable(*given, **named):
        raise ConnectionError("connection reset by peer")

    create = store.shared._write_new
    with monkeypatch.context() as broken:
        broken.setattr(store.shared, "_write_new", lambda *to: (create if "/locks/" in to[0] else unreachable)(*to))
        broken.setattr(store.shared, "_mine", unreachable)  # the lease cannot be given back either
        with pytest.raises(StageError, match=r"cannot be written to \(connection reset by peer\).* same command goes"):
            build(store, runs)
    again = build(store, runs)
    assert (again.computed, computed(runs)) == (False, ["a"])
    assert machine(tmp_path, url, "second").manifest("evaluate", again.ref.key) == again.manifest


def test_a_store_without_exclusive_creation_is_said_to_have_none(tmp_path, url, monkeypatch, caplog):
    store = machine(tmp_path, url, "first")
    store.check_writable()
    assert "this service" not in caplog.text
    monkeypatch.setattr(store.shared, "_write_new", store.shared._files.pipe_file)
    store.check_writable()
    assert caplog.text.count("this service writes over a file that it was asked only to create") == 1


def test_a_path_is_the_same_store_from_every_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SharedStore("shared").url == SharedStore(f"file://{tmp_path}/shared").url == str(tmp_path / "shared")


def test_a_look_at_what_others_have_computed_asks_the_shared_store_once(tmp_path, url, monkeypatch):
    first, second = machine(tmp_path, url, "first"), machine(tmp_path, url, "second")
    ref = build(first, tmp_path / "runs").ref
    asked, read = [], second.shared._read
    monkeypatch.setattr(second.shared, "_read", lambda path: asked.append(path) or read(path))
    assert second.find("evaluate", ref.key) == ref
    assert len(asked) == 1


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

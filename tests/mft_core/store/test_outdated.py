"""What an earlier version got wrong is computed again under its key; what it got right is found."""

from __future__ import annotations

import json

import pytest
from tokenizers import processors

from mft_core.recipes import Compare, Evaluate, Runtime
from mft_core.store import manifests
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.sources import local_checkpoint, local_files
from tests.mft_core.store.test_artifacts import build, make_stage
from tests.support.shared_builder import machine
from tests.support.tiny import make_tokenizer

OUTDATED = {"cut": 2}
"""the summary of data in which an earlier version cut turns in their middle"""


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


@pytest.mark.parametrize(
    ("summary", "computed"), [(OUTDATED, True), ({"cut": 0}, False), ({"cut": 2, "turns_left_out": 3}, False)]
)
def test_data_in_which_turns_were_cut_are_computed_again_under_their_key(store, summary, computed, caplog):
    stage = make_stage(name="prepare-data", change=lambda recipe, inputs, out, context: summary)
    first = build(store, stage)
    again = build(store, make_stage(name="prepare-data"))
    assert (again.computed, again.ref.key) == (computed, first.ref.key)
    assert ("an earlier version cut the last turn of 2 rows in its middle" in caplog.text) == computed
    assert (again.ref.digest == first.ref.digest) == (not computed)  # of which the keys of all that follows are made


def add_first_token(folder):
    tokenizer = make_tokenizer()
    first = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([first, processors.ByteLevel()])
    tokenizer.save_pretrained(folder)


def say_that_a_first_token_is_added(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": True}))


def end_turns_otherwise(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}")


def leave_out_an_answer(folder):
    (folder / "items.jsonl").write_text('{"target": "None", "response": "3"}\n')


CHANGES = {
    "right": (lambda folder: None, None),
    "first token": (add_first_token, "put a token before the prompts"),
    "first token as told": (say_that_a_first_token_is_added, "put a token before the prompts"),
    "end of turn": (end_turns_otherwise, "did not stop answers at the end of turn"),
    "no answer": (leave_out_an_answer, "scored items without an answer"),
}


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("case", CHANGES)
def test_of_the_evaluations_of_an_earlier_version_the_wrong_ones_are_computed_again(
    store, tmp_path, case, earlier, caplog
):
    change, said = CHANGES[case]
    model = tmp_path / "model"
    make_tokenizer().save_pretrained(model)
    (model / "config.json").write_text("{}")
    items = tmp_path / "items.jsonl"
    items.write_text('{"target": "3", "response": "3"}\n')
    change(model)
    if change is leave_out_an_answer:
        change(tmp_path)
    inputs = {"model": local_checkpoint("model", model)}

    def evaluate(recipe, given, out, context):
        (out / "items.jsonl").write_text(items.read_text())
        return {}

    def made():
        return store.build(make_stage(change=evaluate), Evaluate(task="sums"), inputs, Runtime())

    ref = made().ref
    if earlier:
        directory = ref.local_path(store)
        manifest = json.loads((directory / "manifest.json").read_text())
        del manifest["recipe"]["allow_code"], manifest["manifest_sha256"]
        (directory / "manifest.json").write_text(json.dumps(manifests.seal(manifest)))
    wrong = earlier and said is not None
    assert (store.find("evaluate", ref.key, inputs) is None) == wrong
    again = made()
    assert (again.computed, again.ref.key) == (wrong, ref.key)
    assert not made().computed
    assert ("is computed again: an earlier version" in caplog.text) == wrong
    assert not wrong or said in caplog.text


@pytest.mark.parametrize("response", ["3", ["3", "4"]])
@pytest.mark.parametrize("asked", ["repeats: 2\n", "num_fewshot: 2\n"])
def test_an_evaluation_that_dropped_all_but_the_first_answer_is_computed_again(store, tmp_path, asked, response):
    (tmp_path / "task.yaml").write_text(f"task: sums\n{asked}")
    inputs = {"benchmark": local_files(tmp_path, ["task.yaml"])}

    def evaluate(recipe, given, out, context):
        (out / "items.jsonl").write_text(json.dumps({"target": "3", "response": response}) + "\n")
        return {}

    def made():
        return store.build(make_stage(change=evaluate), Evaluate(task="sums"), inputs, Runtime())

    directory = made().ref.local_path(store)
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["recipe"]["answered_together"], manifest["manifest_sha256"]
    (directory / "manifest.json").write_text(json.dumps(manifests.seal(manifest)))
    assert made().computed == (asked == "repeats: 2\n" and response == "3")
    assert not made().computed


@pytest.mark.parametrize("contest", [("mft",), ()])
def test_a_contest_of_which_the_sentence_was_not_kept_is_judged_again(store, contest):
    winner = {"method": "contest"}

    def compare(recipe, given, out, context):
        (out / "winners.json").write_text(json.dumps([winner]))
        return {}

    def computed():
        recipe = Compare(question="?", variants=({"method": "fft"},), contest=contest)
        return store.build(make_stage(name="compare", change=compare), recipe, {}, Runtime()).computed

    assert computed()
    winner["sentence"] = "no gain above 1 point is compatible with these data"
    assert computed() == bool(contest)
    assert not computed()


@pytest.mark.parametrize(
    ("lacks", "item"),
    [("allow_code", {"target": "None", "response": ["3"]}), ("answered_together", {"target": "3", "response": "3"})],
)
def test_an_evaluation_that_only_the_shared_store_has_is_looked_at_there(tmp_path, monkeypatch, lacks, item):
    (tmp_path / "task.yaml").write_text("task: sums\nrepeats: 2\n")
    inputs, seal = {"benchmark": local_files(tmp_path, ["task.yaml"])}, manifests.seal

    def evaluate(recipe, given, out, context):
        (out / "items.jsonl").write_text(json.dumps(item) + "\n")
        return {}

    def made(name):
        return machine(tmp_path, str(tmp_path / "shared"), name).build(
            make_stage(change=evaluate), Evaluate(task="sums"), inputs, Runtime()
        )

    def earlier(content):
        return seal({**content, "recipe": {name: of for name, of in content["recipe"].items() if name != lacks}})

    with monkeypatch.context() as version:
        version.setattr(manifests, "seal", earlier)
        wrong = made("first").ref
    second = machine(tmp_path, str(tmp_path / "shared"), "second")
    assert second.share("evaluate", wrong.key, inputs) is None
    assert not second.directory("evaluate", wrong.key).exists(), "one file is read where it lies"
    item.update(target="3", response=["3", "4"])
    assert made("second").computed
    assert not made("third").computed


def test_which_of_two_contests_was_judged_by_an_earlier_version_each_of_them_says(tmp_path):
    recipe = Compare(question="?", variants=({"method": "fft"},), contest=("mft",))

    def build(store, winner):
        def compare(recipe, inputs, out, context):
            (out / "winners.json").write_text(json.dumps([winner]))
            return {}

        return store.build(make_stage(name="compare", change=compare), recipe, {}, Runtime())

    right = {"sentence": "no gain above 1 point is compatible with these data"}
    own = build(ArtifactStore(tmp_path / "right"), right).ref
    build(machine(tmp_path, str(tmp_path / "shared"), "wrong"), {"method": "contest"})
    assert machine(tmp_path, str(tmp_path / "shared"), "right").share("compare", own.key) == own
    healed = build(machine(tmp_path, str(tmp_path / "shared"), "wrong"), right)
    assert (healed.computed, healed.ref) == (False, own), "the one there is not judged by the one here"

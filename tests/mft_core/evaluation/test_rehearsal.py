"""What an evaluation would not survive, or would get wrong, is told before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mft_core import sandbox
from mft_core.data.assistant_tokens import encode
from mft_core.data.rows import Message
from mft_core.errors import ConfigError
from mft_core.evaluation import lm_eval_harness, rehearsal
from mft_core.evaluation.lm_eval_harness import evaluate
from mft_core.evaluation.rehearsal import rehearse
from mft_core.recipes import Evaluate, Runtime
from tests.mft_core.evaluation.test_benchmarks import ITEMS, RECIPE, plus
from tests.support.tiny import make_tokenizer, save_checkpoint

CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "generation_kwargs": None,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def chatml(tmp_path: Path) -> Path:
    """A checkpoint whose turns end with a token that is not its tokenizer's eos, and whose tokenizer adds a BOS."""
    checkpoint = save_checkpoint(tmp_path / "chatml")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<pad>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer.save_pretrained(checkpoint)
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(content))
    return checkpoint


def test_a_chat_template_that_loops_over_prompts_is_ended(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    template = tmp_path / "loops.jinja"
    loop = (
        "{% if add_generation_prompt and messages|length == 1 %}{% for a in range(99999) %}{% for b in range(9999) %}"
    )
    written = make_tokenizer().chat_template
    template.write_text(f"{loop}{{% endfor %}}{{% endfor %}}{{% endif %}}{written}")
    with pytest.raises(ConfigError, match=r"task 'plus': not done after 1 s|chat template: not done after 1 s"):
        rehearse(RECIPE, model, plus(tmp_path / "plain"), template)


def test_what_is_right_is_rehearsed_in_silence(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rehearse(RECIPE, model, plus(tmp_path / "plain"))
    rehearse(Evaluate(task="plus", apply_chat_template=False, num_fewshot=1), model, plus(tmp_path / "few"))
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_length": 40, "until": "</s>"}
    rehearse(RECIPE, model, plus(tmp_path / "drawn", generation_kwargs=drawn))
    items = [{"question": "1 + 1", "choices": ["2", "3"], "label": 0}]
    rehearse(Evaluate(task="plus", metric="acc"), model, plus(tmp_path / "choices", *items, **CHOICES))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("recipe", "items", "changes", "words"),
    [
        (
            {"metric": "acc"},
            [{"question": "which?", "choices": ["2"], "label": 7}],
            CHOICES,
            r"plus\.jsonl line 1: .*7.*1 choices",
        ),
        (
            {"metric": "acc"},
            [{"question": "which?", "choices": [], "label": 0}],
            CHOICES,
            "line 1: doc_to_choice shows",
        ),
        ({}, [{"question": "word " * 500, "answer": "1"}], {}, "item 0: its prompt has .* the model has 512 positions"),
        ({}, ITEMS, {"metric_list": [{"metric": "exact_mach"}, {"metric": "exact_match"}]}, "metric of .*'exact_mach'"),
        ({}, ITEMS, {"filter_list": [{"name": "x", "filter": [{"function": "nothing"}]}]}, "task 'plus'.*cannot load"),
        ({}, ITEMS, {"no_such_key": 1}, "task 'plus': lm-eval cannot load it .*no_such_key"),
        ({}, ITEMS, {"generation_kwargs": {"max_gen_tok": 4}}, "generation_kwargs will not do .*max_gen_tok"),
        ({}, ITEMS, {"generation_kwargs": {"until": [5]}}, "generation_kwargs will not do .*valid: texts"),
        ({}, ITEMS, {"generation_kwargs": {"max_new_tokens": 0}}, "generation_kwargs will not do .*above 0"),
        ({}, ITEMS, {"generation_kwargs": {"max_gen_toks": "four"}}, "generation_kwargs.max_gen_toks = 'four'"),
        ({}, ITEMS, {"generation_kwargs": {"do_sample": True}}, "generation_kwargs will not do .*temperature"),
        ({}, ITEMS, {"generation_kwargs": {"use_cache": True}}, "generation_kwargs will not do .*use_cache"),
        ({"num_fewshot": 2}, ITEMS[:1], {"fewshot_split": "test"}, "its prompts cannot be made"),
        (
            {"metric": "perplexity"},
            ITEMS,
            {
                "output_type": "loglikelihood",
                "generation_kwargs": None,
                "metric_list": [{"metric": "perplexity", "aggregation": "mean", "higher_is_better": False}],
            },
            "not a number from 0 to 1",
        ),
    ],
)
def test_what_would_fail_after_the_training_is_refused(model: Path, tmp_path: Path, recipe, items, changes, words: str):
    with pytest.raises(ConfigError, match=words):
        rehearse(Evaluate(task="plus", **recipe), model, plus(tmp_path, *items, **changes))


@pytest.mark.parametrize("settings", [{"num_beams": 0}, {"eos_token_id": "x"}, {"repetition_penalty": -1.0}])
def test_settings_of_the_model_with_which_nothing_is_generated_are_refused(tmp_path: Path, settings: dict[str, Any]):
    model = save_checkpoint(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 1.1}))
    rehearse(RECIPE, model, plus(tmp_path / "sound"))
    (model / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"model = .*: its generation_config\.json will not do"):
        rehearse(RECIPE, model, plus(tmp_path / "odd"))


def test_a_prompt_whose_beginning_fits_is_counted_to_its_end(model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(rehearsal, "_READ", 100)
    items = [{"question": "word " * length, "answer": "1"} for length in (90, 500)]
    rehearse(RECIPE, model, plus(tmp_path / "fits", items[0]))
    with pytest.raises(ConfigError, match=r"item 1: its prompt has \d+ tokens"):
        rehearse(RECIPE, model, plus(tmp_path / "not", *items))


def test_code_runs_only_where_it_is_allowed(model: Path, tmp_path: Path):
    folder = plus(tmp_path, doc_to_target=None)
    with (folder / "plus.yaml").open("a") as handle:
        handle.write("doc_to_target: !function utils.target\n")
    (folder / "utils.py").write_text("def target(doc):\n    return doc['answer']\n")
    for run in (lambda recipe: rehearse(recipe, model, folder), lambda recipe: evaluate(recipe, model, folder)):
        with pytest.raises(ConfigError, match="allow_code: true"):
            run(RECIPE)
        run(Evaluate(task="plus", allow_code=True))


def test_a_template_of_a_benchmark_cannot_act_when_lm_eval_renders_it(model: Path, tmp_path: Path):
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "ran") + "') }}"
    folder = plus(tmp_path / "bench", doc_to_text=escape)
    with pytest.raises(Exception, match="unsafe"):
        evaluate(RECIPE, model, folder)
    assert not (tmp_path / "ran").exists()


def test_a_prompt_that_training_does_not_know_is_refused(model: Path, tmp_path: Path):
    template = tmp_path / "thinks.jinja"
    header = "{%- if add_generation_prompt %}\n{{- '<|assistant|>\\n"
    template.write_text(make_tokenizer().chat_template.replace(header, header + "<think>"))
    with pytest.raises(ConfigError, match="asked otherwise than it was trained"):
        rehearse(RECIPE, model, plus(tmp_path / "bench"), template)


def loaded(checkpoint: Path) -> Any:
    with lm_eval_harness._engine(RECIPE, checkpoint, Runtime(device="cpu"), lambda progress: None, None) as engine:
        return engine


def test_evaluation_asks_with_the_tokens_of_the_training(chatml: Path):
    model = loaded(chatml)
    prompt = model.apply_chat_template([{"role": "user", "content": "1 + 1"}])
    rows = [(Message("user", "1 + 1"), Message("assistant", "2"))]
    trained = encode(rows, model.tokenizer, 100).dataset.input_ids.tolist()
    asked = model.tok_batch_encode([prompt])[0][0].tolist()
    assert model.tok_encode(prompt) == asked == trained[: len(asked)]
    assert model.tokenizer(prompt)["input_ids"] == [1, *asked], "the tokenizer by itself would have added a BOS"


def test_generation_stops_at_the_templates_end_of_turn(chatml: Path, model: Path):
    stops = loaded(chatml).model.generation_config.eos_token_id
    assert stops == [make_tokenizer().eos_token_id, make_tokenizer().pad_token_id]
    assert loaded(model).model.generation_config.eos_token_id == make_tokenizer().eos_token_id, "as it was"


def test_a_rate_that_should_fall_is_marked_so_and_no_other(model: Path, tmp_path: Path):
    falls = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": False}]
    assert evaluate(RECIPE, model, plus(tmp_path / "a", metric_list=falls)).summary["higher_is_better"] is False
    assert "higher_is_better" not in evaluate(RECIPE, model, plus(tmp_path / "b")).summary


def test_a_cluster_that_the_items_have_not_is_refused_and_one_that_they_have_reaches_every_row(
    model: Path, tmp_path: Path
):
    asked = Evaluate(task="plus", cluster="question")
    folder = plus(tmp_path / "plus")
    rehearse(asked, model, folder)
    rows = evaluate(asked, model, folder).items
    assert [row["cluster"] for row in rows] == [f"plus/{json.dumps(item['question'])}" for item in ITEMS]
    with pytest.raises(ConfigError, match="cluster: field of the items of task 'plus' 'passage'"):
        rehearse(asked.model_copy(update={"cluster": "passage"}), model, folder)

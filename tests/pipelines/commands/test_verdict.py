"""The profile that `mft verdict` drafts, and what it refuses before anything is computed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml
from tokenizers.processors import TemplateProcessing

from mft_core.data.chat_template import load_tokenizer, rendered
from mft_core.data.rows import parse_row
from mft_core.errors import ConfigError
from mft_core.store.artifacts import ArtifactStore
from pipelines.commands.verdict import asked_for, draft, passes, profile_of, same_question, seconds_of, write
from pipelines.config import resolve
from pipelines.config.profile import load_profile
from pipelines.config.setup import ModelSpec
from pipelines.config.study import load_study
from pipelines.cost.budget import cut, fit, next_in_time
from pipelines.plan.plan import make_plan
from tests.support.mini import write_profile
from tests.support.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verdict")
    write_profile(path)
    return path


@pytest.fixture
def values(folder):
    return draft(str(folder / "model"), [folder / "data" / "sums.jsonl"], [str(folder / "benchmarks")], None)


def planned(folder, values):
    return make_plan(load_study("verdict"), profile_of(values, "own"), ArtifactStore(folder / "home"))


def test_a_time_is_read_as_people_write_it():
    assert [seconds_of(text) for text in ("2h", "90m", "1h30m", "150s")] == [7200, 5400, 5400, 150]
    for text in ("", "2", "2 hours", "1m", "-3h"):
        with pytest.raises(ConfigError, match="give a time"):
            seconds_of(text)


def test_a_draft_is_a_profile_in_which_nothing_is_fine_tuned_first(folder, values):
    plan = planned(folder, values)
    stages = [step.node.label for step in plan.steps if step.node.stage == "fine-tune"]
    assert [label.split()[0] for label in stages] == ["continue-fft"]
    assert [item.setup.method for item in plan.variants][:5] == ["fft", "magnitude", "magnitude", "wanda", "wanda"]
    assert len({item.setup.mask.layers for item in plan.variants if item.setup.method == "mft"}) == 3
    assert plan.variants[0].evaluations.keys() == {"mini_sums"}


def test_the_profile_that_is_written_is_the_one_that_was_planned(folder, values, tmp_path):
    write(values, tmp_path / "own.yaml", ["rows: 1 of 2"])
    kept = load_profile(str(tmp_path / "own.yaml"))
    assert "# rows: 1 of 2" in (tmp_path / "own.yaml").read_text()
    store = ArtifactStore(folder / "home")
    ids = [[step.node.id for step in make_plan(load_study("verdict"), profile, store).steps]
           for profile in (kept, profile_of(values, "own"))]  # fmt: skip
    assert ids[0] == ids[1]
    assert same_question(yaml.safe_load((tmp_path / "own.yaml").read_text()), values)
    other = copy.deepcopy(values)
    other["defaults"]["benchmarks"] = []
    assert not same_question(other, values)


def price(plan):
    """Return seconds that grow with the items and the rows of a variant, and twice so where it trains."""
    found = []
    for item in plan.variants:
        limit = item.setup.benchmarks[0].limit or 1_000
        rows = sum(source.rows or 0 for source in item.setup.data.mixture)
        found.append(limit + (rows if item.setup.method in ("mft", "continued-fft") else 0))
    return found


def many(values):
    """Return the draft as of 2,000 rows; nothing looks at them while it is planned."""
    found = copy.deepcopy(values)
    found["defaults"]["data"]["mixture"][0]["rows"] = 2_000
    return found


@pytest.mark.parametrize("seconds", [30_000, 20_000, 8_000, 5_000])
def test_rows_and_items_are_cut_until_all_variants_fit_and_said(folder, values, seconds):
    found = fit(many(values), {"mini_sums": 1_000}, passes, lambda each: planned(folder, each), price, seconds)
    assert sum(price(found.plan)) <= seconds
    limit = found.values["defaults"]["benchmarks"][0].get("limit", 1_000)
    assert limit >= 150
    told = "\n".join(found.told)
    assert ("items of mini_sums" in told) == (limit < 1_000)
    assert "missing" not in told


def test_where_the_least_is_too_much_for_all_variants_none_is_left_out_before_it_has_been_seen_what_they_take(
    folder, values
):
    found = fit(many(values), {"mini_sums": 1_000}, passes, lambda each: planned(folder, each), price, 700)
    assert len(found.plan.variants) == len(planned(folder, values).variants)
    assert found.values["defaults"]["benchmarks"][0]["limit"] == 150
    missing = sum(price(found.plan)) - 700
    assert f"for all models about {missing:,.0f} s are missing" in found.told[-1]


def test_a_variant_that_seemed_too_long_is_taken_up_in_its_place_as_soon_as_it_is_to_be_had():
    assert next_in_time([90, 500, 60], 80) == 2
    assert next_in_time([90, 70], 80) == 1
    assert next_in_time([50, 70], 80) == 0
    assert next_in_time([90, 500], 80) is None


def test_what_fits_is_not_cut(folder, values):
    found = fit(many(values), {"mini_sums": 1_000}, passes, lambda each: planned(folder, each), price, 1e6)
    assert found.told == []
    assert found.values["defaults"]["data"] == many(values)["defaults"]["data"]


def test_a_budget_for_which_nothing_can_be_cut_enough_is_refused_with_what_it_takes(folder, values):
    with pytest.raises(ConfigError, match="take about 450 s here; give more time"):
        fit(many(values), {"mini_sums": 1_000}, passes, lambda each: planned(folder, each), price, 400)


def test_small_data_stay_a_profile_that_plans(folder, values):
    small = copy.deepcopy(values)
    for share in (0.0, 1.0):
        plan = planned(folder, cut(small, {"mini_sums": 30}, passes, share))
        assert sum(source.rows for source in plan.variants[0].setup.data.mixture) == 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"benchmarks": ["./nowhere"]}, "no such folder"),
        ({"benchmarks": [__file__]}, "a file says neither how its items are asked"),
        ({"rows": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"checkpoint": "./nowhere"}, "no such directory"),
        ({"budget": "soon"}, "give a time"),
        ({"budget": "9" * 400 + "h"}, "give a time"),
        ({"checkpoint": "~no-such-user/model"}, "no path here"),
        ({"out": "other.yaml"}, "the profile of another question"),
        ({"out": "odd.yaml"}, "the profile of another question"),
        ({"out": "."}, "a folder lies there"),
        ({"out": "MODEL/own.yaml"}, "give a place outside"),
        ({"out": "ROWS"}, "give a place outside"),
        ({"rows": ["FOLDER"], "out": "FOLDER/own.yaml"}, "give a place outside"),
        ({"benchmarks": ["gsm8k"]}, "its data are not on this machine.*lm_eval --model dummy --tasks gsm8k"),
    ],
)
def test_mistakes_are_told_before_anything_runs(folder, tmp_path, monkeypatch, change, words):
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "other.yaml").write_text(json.dumps({"defaults": {"model": {"path": "x"}}}))
    given = {
        "checkpoint": str(folder / "model"),
        "rows": [folder / "data" / "sums.jsonl"],
        "benchmarks": [str(folder / "benchmarks")],
        "base": None,
        "budget": "2h",
        "out": "own.yaml",
        **change,
    }
    (tmp_path / "odd.yaml").write_text("defaults: {data: {mixture: [5]}, benchmarks: 5}\n")
    rows = tmp_path / "FOLDER" / "train.jsonl"
    rows.parent.mkdir()
    shutil.copy(folder / "data" / "sums.jsonl", rows)
    given["rows"] = [tmp_path / row if row == "FOLDER" else Path(row) for row in given["rows"]]
    given["out"] = tmp_path / given["out"].replace("MODEL", str(folder / "model")).replace(
        "ROWS", str(given["rows"][0])
    )
    with pytest.raises(ConfigError, match=words):
        asked_for(**given)


@pytest.mark.parametrize("begins", ["", "<s>"])
def test_a_checkpoint_without_a_chat_template_is_shown_plain_text_and_asked_so(tmp_path, begins):
    write_profile(tmp_path)
    tokenizer = make_tokenizer(chat_template=False)
    if begins:
        special = [("<s>", tokenizer.bos_token_id)]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    shutil.rmtree(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    values = draft(str(tmp_path / "model"), [tmp_path / "data" / "sums.jsonl"], [str(tmp_path / "benchmarks")], None)
    assert values["defaults"]["model"]["chat_template"] == ("plain_bos" if begins else "plain"), "the same elsewhere"
    template = resolve.resolved_model(ModelSpec(**values["defaults"]["model"])).template.local_path()
    assert [bench["apply_chat_template"] for bench in values["defaults"]["benchmarks"]] == [False]
    rows = [
        parse_row({"prompt": "1 + 1 =", "completion": " 2"}, "a row"),
        parse_row({"question": "1 + 1?", "answer": "2"}, "a row"),
    ]
    found = rendered([("a row", row) for row in rows], load_tokenizer(tmp_path / "model", template))
    assert [text for text, _ in found] == [f"{begins}1 + 1 = 2</s>", f"{begins}1 + 1?\n2</s>"]
    assert [text[start:end] for text, [(start, end)] in found] == [" 2</s>", "2</s>"]
    plan = planned(tmp_path, values)
    assert all("chat_template" in step.node.inputs for step in plan.steps if step.node.stage == "prepare-data")


def test_a_checkpoint_whose_tokenizer_has_no_end_of_text_is_refused_in_a_sentence(tmp_path):
    write_profile(tmp_path)
    tokenizer = make_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="'eos_token' is undefined"):
        asked_for(str(tmp_path / "model"), [tmp_path / "data" / "sums.jsonl"], [str(tmp_path / "benchmarks")], None,
                  "2h", tmp_path / "own.yaml")  # fmt: skip

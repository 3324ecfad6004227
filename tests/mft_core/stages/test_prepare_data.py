"""The stage `prepare-data`: a mixture in, token sequences and a report out."""

from __future__ import annotations

import json

import datasets
import pytest

from mft_core.data.dropped import told
from mft_core.data.tokens import TokenDataset
from mft_core.errors import ConfigError
from mft_core.recipes import MixturePart, PrepareData, Runtime
from mft_core.stage import StageContext
from mft_core.stages import get_stage
from mft_core.stages.prepare_data import choose_validation
from tests.support.tiny import TULU, make_tokenizer


def chat(user, answer):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two sources and a tokenizer: 60 sums (one of them twice, one a benchmark question), and 40 products."""
    root = tmp_path_factory.mktemp("world")
    make_tokenizer().save_pretrained(root / "tokenizer")
    sums = [chat(f"{i}+{i}", f"{2 * i}") for i in range(60)]
    write(root / "sums.jsonl", [*sums, sums[7]])
    write(root / "products.jsonl", [chat(f"{i}*{i}", f"{i * i}") for i in range(40)])
    write(root / "benchmark.jsonl", [{"question": "3+3", "answer": "6"}, {"question": "100+1", "answer": "101"}])
    return root


def prepare(world, out, *, recipe=None, reports=None, runtime=None, **changes):
    inputs = {
        "tokenizer": world / "tokenizer",
        "source-0": world / "sums.jsonl",
        "source-1": world / "products.jsonl",
        "benchmark-0": world / "benchmark.jsonl",
    }
    settings = {"mixture": (MixturePart(), MixturePart(rows=20)), "max_length": 100, "validation_rows": 10, "seed": 1}
    inputs |= {name: path for name, path in changes.items() if "-" in name or name in ("tokenizer", "chat_template")}
    settings |= {name: value for name, value in changes.items() if name in PrepareData.model_fields}
    out.mkdir(parents=True)
    context = StageContext(runtime or Runtime(), out, (reports if reports is not None else []).append)
    summary = get_stage("prepare-data").run(recipe or PrepareData(**settings), inputs, out, context)
    parts = {name: TokenDataset.load(out / f"{name}.safetensors") for name in ("train", "validation")}
    return summary, parts


def texts(dataset):
    tokenizer = make_tokenizer()
    return [tokenizer.decode(dataset.example(i)[0]) for i in range(len(dataset))]


def test_the_report_accounts_for_every_row(world, tmp_path):
    summary, parts = prepare(world, tmp_path / "out")
    assert summary["rows"] == [61, 20]
    assert summary["duplicates_removed"] == 1
    assert summary["benchmark_questions"] == 2
    assert summary["benchmark_overlaps_removed"] == {"equal_question": 1, "shared_13_words": 0}
    assert (summary["too_long"], summary["cut"], summary["left_out_by_fraction"]) == (0, 0, 0)
    assert len(parts["validation"]) == summary["validation"]["examples"] == 10
    assert len(parts["train"]) == summary["train"]["examples"] == sum(summary["train_rows"]) == 81 - 2 - 10
    for name, part in parts.items():
        assert summary[name]["tokens"] == len(part.input_ids)
        assert summary[name]["loss_tokens"] == part.loss_mask.sum()
        assert summary[name]["longest"] == part.lengths.max()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == summary


def test_turns_that_do_not_fit_are_left_out_told_and_in_the_report_only_then(world, tmp_path):
    turns = [message for n in range(4) for message in chat(f"{n} and", f"{n} it is")["messages"]]
    rows = [*(chat(f"{n}-{n}", "0") for n in range(9)), {"messages": turns}]
    changes = {"source-1": write(tmp_path / "turns.jsonl", rows), "mixture": (MixturePart(rows=20), MixturePart())}
    whole, _ = prepare(world, tmp_path / "whole", **changes, max_length=400)
    assert "turns_left_out" not in whole
    longest = max(whole[part]["longest"] for part in ("train", "validation"))
    cut, parts = prepare(world, tmp_path / "cut", **changes, max_length=longest - 1)
    assert (cut["cut"], cut["turns_left_out"]) == (1, 1)
    assert told(cut).endswith("1 lost 1 answers at their end, which do not fit into max_length")
    (long,) = [text for text in texts(parts["train"]) + texts(parts["validation"]) if "and" in text]
    assert long.endswith("2 it is</s>")


def test_neither_a_benchmark_question_nor_a_validation_row_stands_in_the_training_data(world, tmp_path):
    _, parts = prepare(world, tmp_path / "out")
    train, validation = (set(texts(parts[name])) for name in ("train", "validation"))
    assert len(train) == 69
    assert len(validation) == 10
    assert not train & validation
    assert not [text for text in train | validation if "<|user|>\n3+3\n" in text]


def test_the_payload_is_the_same_to_the_byte_and_holds_no_path(world, tmp_path):
    for name in ("a", "b"):
        prepare(world, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["examples.json", "report.json", "train.safetensors", "validation.safetensors"]
    for name in files:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert str(tmp_path).encode() not in content
        assert str(world).encode() not in content


def test_the_examples_show_what_is_learned(world, tmp_path):
    prepare(world, tmp_path / "out")
    shown = json.loads((tmp_path / "out" / "examples.json").read_text())
    for example in shown:
        question, answer = example["text"].removeprefix("<|user|>\n").split("\n<|assistant|>\n")
        assert example["loss"] == [answer]
        assert answer == f"{eval(question)}</s>"
    assert len(shown) == 5


def test_a_smaller_fraction_is_part_of_a_larger_one_and_has_the_same_validation_rows(world, tmp_path):
    summary, half = prepare(world, tmp_path / "half", fraction=0.5)
    _, fifth = prepare(world, tmp_path / "fifth", fraction=0.2)
    _, whole = prepare(world, tmp_path / "whole")
    assert texts(half["validation"]) == texts(fifth["validation"]) == texts(whole["validation"])
    assert set(texts(fifth["train"])) < set(texts(half["train"])) < set(texts(whole["train"]))
    assert summary["left_out_by_fraction"] == len(whole["train"]) - len(half["train"])
    assert len(half["train"]) == pytest.approx(69 / 2, abs=1)


def test_another_seed_draws_other_rows_and_holds_out_others(world, tmp_path):
    _, one = prepare(world, tmp_path / "one")
    _, two = prepare(world, tmp_path / "two", seed=2)
    for name in ("train", "validation"):
        assert set(texts(one[name])) != set(texts(two[name]))


def test_a_source_may_be_a_hub_data_set(world, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"id": f"p{i}", "dataset": "products", **chat(f"{i}*{i}", f"{i * i}")} for i in range(40)]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    _, from_hub = prepare(world, tmp_path / "a", **{"source-1": tmp_path / "hub"})
    _, from_file = prepare(world, tmp_path / "b")
    assert texts(from_hub["train"]) == texts(from_file["train"])


def test_a_chat_template_that_is_given_replaces_the_tokenizers_own(world, tmp_path):
    make_tokenizer(chat_template=False).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="no chat template"):
        prepare(world, tmp_path / "without", tokenizer=tmp_path / "bare")
    _, given = prepare(world, tmp_path / "with", tokenizer=tmp_path / "bare", chat_template=TULU)
    _, own = prepare(world, tmp_path / "own")
    assert texts(given["train"]) == texts(own["train"])


def test_rows_of_which_no_answer_fits_are_counted(world, tmp_path):
    long = write(
        tmp_path / "long.jsonl", [*(chat("x" * 99, "1") for _ in range(1)), chat("1", "y" * 99), chat("1", "2")]
    )
    summary, parts = prepare(
        world, tmp_path / "out", **{"source-1": long}, mixture=(MixturePart(), MixturePart()), max_length=30
    )
    assert (summary["too_long"], summary["cut"]) == (2, 0)
    assert parts["train"].lengths.max() <= 30


def test_progress_counts_the_rows_to_the_end(world, tmp_path):
    reports = []
    prepare(world, tmp_path / "out", reports=reports)
    assert (reports[-1].step, reports[-1].total, reports[-1].unit) == (79, 79, "row")


def test_progress_is_told_from_the_first_moment_of_reading_on(world, tmp_path):
    reports = []
    prepare(world, tmp_path / "out", reports=reports)
    told = list(dict.fromkeys(report.doing for report in reports))
    assert told == ["", "reading sums.jsonl", "reading products.jsonl", "comparing with the benchmarks"]


def test_a_long_file_of_rows_that_do_not_fit_is_given_up_where_that_is_certain(world, tmp_path):
    long = write(tmp_path / "long.jsonl", [chat("1", "2"), *(chat(f"{i}" + "x" * 40, "1") for i in range(5_000))])
    reports, given = [], {"source-0": long, "mixture": (MixturePart(),), "max_length": 20}
    with pytest.raises(ConfigError, match="too long") as caught:
        prepare(world, tmp_path / "out", reports=reports, runtime=Runtime(max_dropped=0.25), **given)
    assert "max_dropped = 0.25" in str(caught.value) or "every one of the" in str(caught.value)
    assert reports[-1].step == 2_000


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mixture": (MixturePart(), MixturePart(rows=41))}, r"mixture\[1\].*rows = 41, but it has only 40"),
        ({"max_length": 5}, "max_length = 5: every one of the 79 examples"),
        ({"validation_rows": 79}, "validation_rows = 79: of 79 usable rows.*at most 78"),
        ({"validation_rows": 500}, "validation_rows = 500: of 79 usable rows"),
    ],
)
def test_a_recipe_that_the_data_cannot_fill_is_refused_and_nothing_is_written(world, tmp_path, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        prepare(world, tmp_path / "out", **changes)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_mixture_of_nothing_but_benchmark_questions_is_refused(world, tmp_path):
    only = write(tmp_path / "only.jsonl", [chat("3+3", "6")])
    with pytest.raises(ConfigError, match="all 2 rows are benchmark questions"):
        prepare(world, tmp_path / "out", mixture=(MixturePart(), MixturePart()), **{"source-0": only, "source-1": only})


def test_rows_with_the_same_prompt_are_held_out_together_or_not_at_all():
    prompts = [f"q{i % 7}" for i in range(40)] + [f"single{i}" for i in range(20)]
    chosen = choose_validation(prompts, 13, seed=3)
    assert len(chosen) == 13
    held_out = {prompts[i] for i in chosen}
    assert not held_out & {prompt for i, prompt in enumerate(prompts) if i not in set(chosen)}
    assert choose_validation(prompts, 0, seed=3).tolist() == []


def test_the_choice_of_a_prompt_does_not_depend_on_the_order_of_the_rows():
    prompts = [f"q{i}" for i in range(40)]
    forwards = {prompts[i] for i in choose_validation(prompts, 8, seed=0)}
    backwards = {prompts[::-1][i] for i in choose_validation(prompts[::-1], 8, seed=0)}
    assert forwards == backwards
    assert forwards != {prompts[i] for i in choose_validation(prompts, 8, seed=1)}


def test_a_prompt_too_common_to_be_held_out_is_an_error_when_nothing_else_is_left():
    with pytest.raises(ConfigError, match="validation_rows = 3: of 6 usable rows with 2 different first user turns"):
        choose_validation(["a"] * 5 + ["b"], 3, seed=0)


def test_what_a_benchmark_asks_is_kept_out_as_it_is_asked(world, tmp_path):
    bench = tmp_path / "bench"
    bench.mkdir()
    write(bench / "items.jsonl", [{"instruction": "Add", "input": "4+4", "answer": "8"}])
    (bench / "plus.yaml").write_text(
        "task: plus\ndataset_kwargs: {data_files: {test: items.jsonl}}\ntest_split: test\ndoc_to_text: '{{ input }}'\n"
    )
    without, report = tmp_path / "without", tmp_path / "with"
    prepare(world, without)
    prepare(world, report, **{"benchmark-1-plus": bench})
    removed = [
        json.loads((made / "report.json").read_text())["benchmark_overlaps_removed"] for made in (without, report)
    ]
    assert [each["equal_question"] for each in removed] == [1, 2]


def test_rows_that_are_dropped_are_refused_above_the_share_that_the_user_allows(world, tmp_path):
    write(tmp_path / "long.jsonl", [chat(f"{i}" + " please" * 80, "7") for i in range(38)] + [chat("1", "2")] * 2)
    given = {"source-0": tmp_path / "long.jsonl", "mixture": (MixturePart(),), "validation_rows": 0}
    with pytest.raises(ConfigError) as caught:
        prepare(world, tmp_path / "refused", **given)
    assert "39 of 40 rows (98%) were dropped: 1 there twice, 38 too long to keep an answer" in str(caught.value)
    assert "runtime.max_dropped = 0.5" in str(caught.value)
    assert not list((tmp_path / "refused").iterdir())
    summary, _ = prepare(world, tmp_path / "allowed", runtime=Runtime(max_dropped=0.95), **given)
    assert (summary["too_long"], summary["train"]["examples"]) == (38, 1)


def test_rows_that_are_there_twice_are_no_loss(world, tmp_path):
    write(tmp_path / "same.jsonl", [chat("1", "2")] * 39 + [chat("2", "3")])
    given = {"source-0": tmp_path / "same.jsonl", "mixture": (MixturePart(),), "validation_rows": 0}
    summary, _ = prepare(world, tmp_path / "out", **given)
    assert told(summary) == "38 of 40 rows (95%) were dropped: 38 there twice"


def test_nothing_is_told_where_nothing_was_dropped(world, tmp_path):
    given = {"source-0": world / "products.jsonl", "mixture": (MixturePart(),), "validation_rows": 0}
    assert told(prepare(world, tmp_path / "out", **given)[0]) is None


def test_rows_in_other_shapes_make_the_tokens_of_their_messages_and_are_counted_only_then(world, tmp_path):
    sums = [json.loads(line)["messages"] for line in (world / "sums.jsonl").read_text().splitlines()]
    pairs = [{"question": asked["content"], "answer": answered["content"]} for asked, answered in sums]
    plain, parts = prepare(world, tmp_path / "plain")
    other, others = prepare(world, tmp_path / "other", **{"source-0": write(tmp_path / "pairs.jsonl", pairs)})
    assert "shapes" not in plain
    assert other.pop("shapes") == {"messages": 40, "question/answer": 61}
    assert other == plain
    for name, part in parts.items():
        assert texts(others[name]) == texts(part)
    words = "of the rows read, 40 are messages, 61 are question/answer"
    assert words in told(other | {"shapes": {"messages": 40, "question/answer": 61}})

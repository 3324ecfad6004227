"""What a plan says that its runs take: follows from recipes, geometry and data, and counts what is shared once."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from mft_core.errors import ConfigError
from mft_core.geometry import read_geometry
from mft_core.recipes import Evaluate, FineTune, LearnMask, Runtime, Training
from mft_core.stage import Facts
from mft_core.stages import STAGES
from mft_core.stages.flops_and_memory import forward
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.sources import local_file
from pipelines.config.profile import load_profile
from pipelines.config.study import load_studies, load_study
from pipelines.cost import plan_view
from pipelines.cost.plan_view import as_dict, show, show_together
from pipelines.cost.predicted import bills, device_of, promises, stages
from pipelines.plan.needs import accelerators_here, at_once
from pipelines.plan.plan import make_plan, make_plans
from pipelines.plan.workload import TURN, _beginning, _part, sequences
from tests.support.mini import write_profile, write_study

LLAMA2_7B = read_geometry(
    {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }
)  # fmt: skip
DATA = {"train": 60_000, "validation": 500, "length": 500}
TOKENS = 2 * 30e6
PLAIN = Runtime()
H100 = device_of(PLAIN, "h100")


def training(**changes):
    fields = {"learning_rate": 2e-5, "epochs": 2, "batch_size": 128, "precision": "bfloat16", **changes}
    return Training.model_validate(fields)


def needs(stage, recipe, runtime=PLAIN, **amounts):
    return STAGES[stage].needs(recipe, Facts(LLAMA2_7B, runtime, "bfloat16", 4096, **{**DATA, **amounts}))


def tuned(runtime=PLAIN, lora=None, **changes):
    return needs("fine-tune", FineTune.model_validate({"training": training(**changes), "lora": lora}), runtime)


def masked(layers="20-23", selector="learned", runtime=PLAIN, amounts=None, **changes):
    if selector == "learned":
        changes = {"score_init": "normal", "training": training(), **changes}
    recipe = LearnMask.model_validate({"sparsity": 0.1, "layers": layers, "selector": selector, **changes})
    return needs("learn-mask", recipe, runtime, **(amounts or {}))


def test_full_fine_tuning_of_7b_takes_six_operations_a_weight_and_token():
    assert tuned().flops == pytest.approx(6 * LLAMA2_7B.weights * TOKENS, rel=0.05)


def test_a_packed_7b_mask_passes_tokens_as_fast_as_measured_on_an_h100_within_a_factor():
    found = masked(amounts={"train": 30e6 / 1024, "length": 1024})
    seconds = found.flops / H100.bfloat16 + found.moved / H100.memory
    assert 21_000 / 1.5 < TOKENS / seconds < 21_000 * 1.5


def test_a_mask_takes_the_less_the_higher_it_lies_and_the_less_it_covers_and_less_than_fine_tuning():
    low, middle, high = (masked(layers).flops for layers in ("0-3", "12-15", "28-31"))
    assert tuned().flops > masked("all").flops > low > middle > high
    assert masked("20-23", modules="attention").flops < masked("20-23").flops
    assert 1 < masked("31").flops / (TOKENS * forward(LLAMA2_7B, 500)) < 1.1


def test_a_training_that_ends_early_takes_its_steps_and_recomputing_another_pass():
    assert tuned(max_steps=10).flops == pytest.approx(10 * 128 / 120_000 * tuned().flops)
    recomputed = Runtime(gradient_checkpointing=True)
    assert tuned(recomputed).flops / tuned().flops == pytest.approx(4 / 3, rel=0.02)


def test_validations_add_forward_passes_over_the_validation_tokens():
    added = tuned(validations=4).flops - tuned().flops
    assert added == pytest.approx(4 * 500 * 500 * forward(LLAMA2_7B, 500))


def test_selectors_that_do_not_train_take_next_to_nothing_and_movement_more_than_wanda():
    found = {name: masked(selector=name) for name in ("random", "magnitude")}
    found |= {name: masked(selector=name, calibration_rows=128) for name in ("wanda", "movement")}
    assert all(work.flops < 0.02 * masked().flops for work in found.values())
    assert found["random"].flops == 0 < found["wanda"].flops < found["movement"].flops


def test_decoding_reads_the_weights_once_a_token_of_a_batch():
    asked = {"items": 64, "prompt": 100, "answer": 10}
    recipe = Evaluate(task="sums", precision="bfloat16")
    one, two = (needs("evaluate", recipe, Runtime(eval_batch_size=size), **asked) for size in (64, 32))
    assert two.moved - one.moved == pytest.approx(10 * 2 * LLAMA2_7B.weights)
    assert two.flops == one.flops


def test_of_experts_those_count_that_a_token_passes_through():
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 100, "num_experts_per_tok": 2,
    }  # fmt: skip
    few, many = (read_geometry({"model_type": "mixtral", "num_local_experts": n, **sizes}) for n in (2, 8))
    assert forward(few, 10) == forward(many, 10)
    assert few.weights < many.weights


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """Return the bills of all studies of the paper on `tiny`, with nothing there."""
    store = ArtifactStore(tmp_path_factory.mktemp("home") / "home")
    found = bills(make_plans(load_studies("paper"), load_profile("tiny"), store), store)
    assert not store.home.exists()  # nothing was computed
    return found


def test_what_is_shared_is_counted_once(paper):
    every = {node_id: cost.hours for bill in paper for node_id, cost in bill.costs.items()}
    own = sum(bill.hours - bill.shared for bill in paper)
    assert sum(every.values()) == pytest.approx(own) == pytest.approx(sum(bill.to_come for bill in paper))
    for bill in paper:
        answers = sum(bill.costs[step.node.id].to_come for step in bill.answers)
        assert bill.to_come == pytest.approx(sum(run.to_come for run in bill.runs) + answers)
        assert all(run.hours == pytest.approx(run.shared + run.to_come) for run in bill.runs)
    assert sum(bill.hours for bill in paper) > 1.2 * own


def test_a_run_names_the_studies_that_have_its_stages_first(paper):
    found = {bill.plan.study.name: bill for bill in paper}
    seen = set()
    for name, bill in found.items():
        seen.add(name)
        assert all(set(run.shared_with) <= seen for run in bill.runs)
    first = {(run.variant.name, run.variant.setup.domain): run for run in found["sparsity"].runs}
    again = next(run for run in found["cost"].runs if run.variant.name == "fft")
    assert again.to_come == 0 < again.hours == first["fft", "mixed"].hours
    own = next(run for run in paper[0].runs if run.variant.setup.method == "mft")
    assert own.shared_with == (paper[0].plan.study.name,)


def test_every_run_of_every_study_is_listed_once(paper, capsys, monkeypatch):
    told = [json.loads(json.dumps(as_dict(bill))) for bill in paper]
    for bill, study in zip(paper, told, strict=True):
        planned = [(item.columns["domain"], item.name) for item in bill.plan.variants]
        assert [(row["domain"], row["variant"]) for row in study["variants"]] == planned
    monkeypatch.setattr(plan_view, "_WIDTH", 200)
    show_together(paper)
    lines = capsys.readouterr().out.splitlines()
    for bill in paper:
        name = bill.plan.study.name
        start = next(index for index, line in enumerate(lines) if line.strip() == name)
        end = next(index for index, line in enumerate(lines) if line.strip().startswith(f"{name}: "))
        rows = [line for line in lines[start + 1 : end] if not line.strip().startswith("analysis:")]
        assert len(rows) == len(bill.plan.variants) == len(set(rows))
        for row, item in zip(rows, bill.plan.variants, strict=True):
            assert row.strip().startswith(item.name.replace(f" seed={item.setup.seed}", "", 1))


def test_a_hundred_columns_hold_every_row(paper, capsys):
    show_together(paper)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_the_sum_of_a_studys_stages_is_what_it_costs(paper, capsys):
    for bill in paper:
        found = as_dict(bill)
        assert sum(stage["hours"] for stage in found["stages"]) == pytest.approx(found["hours"])
        assert len(found["stages"]) == len(bill.costs)
        shared = sum(stage["hours"] for stage in found["stages"] if stage["shared_with"])
        assert shared == pytest.approx(found["hours_shared"])


@pytest.fixture
def mini(tmp_path):
    """Return a function that prices the small study."""
    profile = load_profile(str(write_profile(tmp_path)))
    study = load_study(str(write_study(tmp_path)))
    store = ArtifactStore(tmp_path / "home")

    def price(*overrides):
        return bills([make_plan(study, profile, store, overrides)], store)[0]

    price.store = store
    return price


def by_stage(bill):
    return {step.node.label: (step, cost) for step, cost in stages(bill)}


def test_a_cached_stage_has_cost_what_was_measured_and_costs_nothing_more(mini):
    before = mini()
    step, estimated = by_stage(before)["prepare-data sums"]
    built = mini.store.build(STAGES["prepare-data"], step.node.recipe, step.node.inputs, before.plan.runtime)
    after = mini()
    _, cost = by_stage(after)["prepare-data sums"]
    assert cost.measured
    assert cost.hours == pytest.approx(built.manifest["provenance"]["seconds"] / 3600)  # one thread
    assert cost.to_come == 0
    assert not estimated.measured
    others = [label for label in by_stage(after) if label != step.node.label]
    assert after.to_come == pytest.approx(sum(by_stage(after)[label][1].hours for label in others))


def test_trainings_are_priced_by_the_tokens_that_were_counted_once_they_are(mini):
    step, _ = by_stage(mini())["prepare-data sums"]
    model = mini().plan.resolved[step.node.id].model
    guessed = sequences(step.node, model, None)
    assert (guessed["train"], guessed["validation"]) == (52, 8)
    built = mini.store.build(STAGES["prepare-data"], step.node.recipe, step.node.inputs, Runtime(threads=1))
    counted = sequences(step.node, model, built.manifest)
    assert counted["length"] == pytest.approx(built.manifest["summary"]["train"]["tokens"] / 52)
    assert guessed["length"] / 2 < counted["length"] < guessed["length"] * 2


def test_a_share_of_the_data_costs_its_share(mini):
    whole, half = (by_stage(mini(*sets))["prepare-data sums" + label][0].node
                   for sets, label in (((), ""), (("data.fraction=0.5",), " fraction=0.5")))  # fmt: skip
    model = mini().plan.variants[0].resolved.model
    assert sequences(half, model, None)["train"] == pytest.approx(sequences(whole, model, None)["train"] / 2)


def test_the_device_is_the_one_that_is_here_or_the_one_that_is_named():
    assert "cores" in device_of(Runtime(device="cpu")).name
    assert device_of(Runtime(device="cpu", threads=2)).float32 == 2 * device_of(Runtime(threads=1), "cpu").float32
    assert device_of(PLAIN, "a100").bfloat16 < H100.bfloat16
    with pytest.raises(ConfigError, match=r"--on.*h100"):
        device_of(PLAIN, "h1000")


def finish(price, node, plan, seconds):
    """Build a stage as if so many seconds had been promised to it; return what it took."""
    promised = {**promises(plan)[node.id], "seconds": seconds, "peak_memory_bytes": 1}
    notes = {"promised": promised}
    built = price.store.build(STAGES[node.stage], node.recipe, node.inputs, Runtime(), notes=notes, force=True)
    assert built.manifest["provenance"]["promised"] == promised
    return built.manifest["provenance"]


def test_a_plan_learns_from_what_finished_stages_took_against_what_was_promised(mini, caplog):
    before = mini("runtime.device=cpu")
    step, cost = by_stage(before)["prepare-data sums"]
    promised = promises(before.plan)[step.node.id]
    assert promised["seconds"] == pytest.approx(3600 * cost.hours, rel=0.01)
    used = finish(mini, step.node, before.plan, promised["seconds"] / 10)
    assert ("of memory where the plan said" in caplog.text) == (used["peak_memory_bytes"] > 1)
    after = mini("runtime.device=cpu", "data.fraction=0.5")
    factor = used["seconds"] / (promised["seconds"] / 10)
    assert list(after.experience.finished.values()) == [pytest.approx(factor)]
    assert after.experience.peaks == {("prepare-data", 1): used["peak_memory_bytes"]}
    _, other = by_stage(after)["prepare-data sums fraction=0.5"]
    whole = promises(after.plan)[by_stage(after)["prepare-data sums fraction=0.5"][0].node.id]
    assert other.hours == pytest.approx(factor * whole["seconds"] / 3600, rel=0.01)


def test_what_a_stage_took_on_one_model_says_nothing_of_another(mini, tmp_path):
    step, _ = by_stage(before := mini("runtime.device=cpu"))["prepare-data sums"]
    finish(mini, step.node, before.plan, 1e-9)
    plan = make_plan(load_study("sparsity"), load_profile("tiny"), mini.store, ["runtime.device=cpu"])
    known, unknown = (bills([plan], store)[0] for store in (mini.store, ArtifactStore(tmp_path / "empty")))
    assert known.experience.finished
    assert known.to_come == pytest.approx(unknown.to_come)


def test_rows_are_counted_and_read_also_where_they_are_compressed_or_parquet(mini, tmp_path):
    step, _ = by_stage(mini())["prepare-data sums"]
    model = mini().plan.resolved[step.node.id].model
    plain = Path(step.node.inputs["source-0"].location)
    rows = [json.loads(line) for line in plain.read_text().splitlines()]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (told,) = {_part(local_file(path, "rows"), None, model) for path in
               (plain, tmp_path / "rows.jsonl.gz", tmp_path / "rows.parquet")}  # fmt: skip
    assert told[0] == len(rows)
    texts = [turn["content"] for row in rows for turn in row["messages"]]
    encoded = Tokenizer.from_file(str(Path(model.tokenizer.location) / "tokenizer.json")).encode_batch(texts)
    assert told[1] == pytest.approx(sum(len(one.ids) for one in encoded) / len(rows), abs=3 * TURN)


def test_as_many_trainings_as_there_are_slots_run_at_a_time_each_after_what_it_needs(mini):
    one, four = mini(), mini("runtime.heavy_slots=4")
    assert one.wall == pytest.approx(one.to_come)
    assert four.to_come / 4 <= four.wall < one.wall
    longest = max(cost.hours for cost in four.costs.values())
    assert four.wall > longest


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({}, 4),
        ({"heavy_slots": 2, "processes": 2}, 4),
        ({"device": "cpu", "heavy_slots": 2}, 2),
        ({"devices": "0,3"}, 2),
        ({"cluster": "slurm.yaml"}, 8),
        ({"cluster": "tcp://head:8786"}, 1),
        ({"cluster": "gone.yaml"}, 1),
    ],
)
def test_every_device_here_and_every_worker_that_dask_is_asked_for_is_a_place_for_a_stage(
    settings, places, tmp_path, monkeypatch
):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nyes 'NVIDIA A100-SXM4-80GB' | head -n 4\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("pipelines.plan.needs.accelerators_here", accelerators_here.__wrapped__)
    monkeypatch.chdir(tmp_path)
    Path("slurm.yaml").write_text("{class: distributed.LocalCluster, kwargs: {n_workers: 8}}")
    assert at_once(Runtime(**settings)) == places
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert at_once(Runtime()) == 1


def test_one_study_is_shown_with_the_time_of_every_stage_their_sum_and_what_is_assumed(mini, capsys):
    show(mini("runtime.device=cpu"))
    out = capsys.readouterr().out
    assert "in all: 0 s measured (cached)" in out
    assert "GFLOP/s in float32" in out
    assert "GPU" not in out


@pytest.mark.parametrize(
    ("hours", "text"), [(0, "0 s"), (0.001, "3.6 s"), (0.5, "30 min"), (40, "40 h"), (268, "11 days")]
)
def test_a_time_is_told_in_the_unit_that_suits_it(hours, text):
    assert plan_view._time(hours) == text


def test_rows_that_are_nested_too_deeply_cost_a_plan_its_guess_and_nothing_else(tmp_path):
    rows = tmp_path / "deep.jsonl"
    rows.write_text('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert _beginning(rows) is None

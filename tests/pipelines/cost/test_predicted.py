"""What a plan says that its runs cost: follows from recipes, geometry and data, and counts what is shared once."""

import json
from dataclasses import replace

import pytest

from mft_core.analysis import cuts, landscape
from mft_core.recipes import Evaluate, FineTune, LearnMask, Runtime, Training
from mft_core.stages import STAGES
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.catalogue import load_profile, load_studies, load_study
from pipelines.config.geometry import read_geometry
from pipelines.cost import flops, plan_view
from pipelines.cost.plan_view import as_dict, show, show_together
from pipelines.cost.predicted import ACCELERATOR, CORE, bills, device_of, stages
from pipelines.cost.workload import Items, Sequences, sequences
from pipelines.plan.plan import make_plan, make_plans
from tests.support.mini import write_profile, write_study

LLAMA2_7B = read_geometry(
    {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }
)  # fmt: skip
DATA = Sequences(train=60_000, validation=500, tokens=30e6, validation_tokens=250e3)
PLAIN = Runtime()


def training(**changes):
    fields = {"learning_rate": 2e-5, "epochs": 2, "batch_size": 128, "precision": "bfloat16", **changes}
    return Training.model_validate(fields)


def mask(layers="20-23", selector="learned", **changes):
    if selector == "learned":
        changes = {"score_init": "normal", "training": training(), **changes}
    return LearnMask.model_validate({"sparsity": 0.1, "layers": layers, "selector": selector, **changes})


def tuned(runtime=PLAIN, lora=None, **changes):
    recipe = FineTune.model_validate({"training": training(**changes), "lora": lora})
    return flops.fine_tune(recipe, LLAMA2_7B, DATA, runtime)


def masked(layers="20-23", selector="learned", runtime=PLAIN, **changes):
    data = DATA if selector not in ("random", "magnitude") else None
    return flops.learn_mask(mask(layers, selector, **changes), LLAMA2_7B, data, "bfloat16", runtime)


def hours(work, device=ACCELERATOR):
    return device.hours(work, "bfloat16")


def test_full_fine_tuning_of_7b_costs_six_flops_a_weight_and_token():
    told = 6 * LLAMA2_7B.weights * 2 * DATA.tokens / (0.4 * 989e12) / 3600
    assert hours(tuned()) == pytest.approx(told, rel=0.05)


def test_a_packed_7b_mask_passes_tokens_as_fast_as_measured_on_an_h100_within_a_factor():
    packed = replace(DATA, train=DATA.tokens / 1024)
    work = flops.learn_mask(mask("20-23"), LLAMA2_7B, packed, "bfloat16", PLAIN)
    seconds = hours(replace(work, stored=0)) * 3600 - ACCELERATOR.start
    assert 21_000 / 1.5 < 2 * DATA.tokens / seconds < 21_000 * 1.5


def test_a_mask_costs_the_less_the_higher_it_lies_and_the_less_it_covers_and_less_than_fine_tuning():
    low, middle, high = (hours(masked(layers)) for layers in ("0-3", "12-15", "28-31"))
    assert hours(tuned()) > low > middle > high
    assert tuned().flops > masked("all").flops > masked("0-3").flops
    assert hours(masked("20-23", modules="attention")) < hours(masked("20-23"))
    forward = flops.Passes(LLAMA2_7B, DATA.length).forward()
    assert forward < masked("31").flops / (2 * DATA.tokens) < 1.1 * forward


@pytest.mark.parametrize("work", [tuned, masked, lambda **changes: tuned(lora={"rank": 64}, **changes)])
def test_twice_the_epochs_cost_twice(work):
    if work is masked:
        once, twice = (masked(training=training(epochs=epochs)) for epochs in (1, 2))
    else:
        once, twice = work(epochs=1), work(epochs=2)
    assert twice.flops == 2 * once.flops
    assert twice.moved == pytest.approx(2 * once.moved, rel=0.01)


def test_a_training_that_ends_early_costs_its_steps():
    assert tuned(max_steps=10).flops == pytest.approx(10 * 128 * DATA.length / (2 * DATA.tokens) * tuned().flops)


def test_validations_add_forward_passes_over_the_validation_tokens():
    added = tuned(validations=4).flops - tuned().flops
    forward = flops.Passes(LLAMA2_7B, DATA.length).forward()
    assert added == pytest.approx(4 * DATA.validation_tokens * forward)


def test_recomputing_activations_costs_another_forward_pass_through_what_is_passed_backwards():
    recomputed = Runtime(gradient_checkpointing=True)
    assert tuned(recomputed).flops / tuned().flops == pytest.approx(4 / 3, rel=0.02)
    low, high = (masked(at, runtime=recomputed).flops - masked(at).flops for at in ("0-3", "24-27"))
    assert low == pytest.approx(4 * high)  # 32 layers against 8


def test_adapters_need_no_gradients_of_the_weights_but_more_than_a_forward_and_a_backward_pass():
    forward = flops.Passes(LLAMA2_7B, DATA.length).forward() * 2 * DATA.tokens
    assert 2 * forward < tuned(lora={"rank": 64}).flops < 2.3 * forward
    assert tuned(lora={"rank": 64}).moved > tuned(lora={"rank": 64, "dropout": 0}).moved


def test_selectors_that_do_not_train_cost_next_to_nothing_and_movement_more_than_wanda():
    costs = {name: masked(selector=name) for name in ("random", "magnitude")}
    costs |= {name: masked(selector=name, calibration_rows=128) for name in ("wanda", "movement")}
    assert all(hours(work) < 0.02 * hours(masked()) for work in costs.values())
    assert costs["random"].flops == 0 < costs["wanda"].flops < costs["movement"].flops


def test_hours_are_linear_in_flops_and_go_down_with_what_the_device_does_in_a_second():
    work = replace(tuned(), moved=0, stored=0)
    device = replace(ACCELERATOR, start=0)
    assert hours(work, replace(device, utilisation=0.2)) == pytest.approx(2 * hours(work, device))
    fast = replace(device, peak={"bfloat16": 2 * 989e12})
    assert hours(work, fast) == pytest.approx(hours(work, device) / 2)


def test_decoding_reads_the_weights_once_a_token_of_a_batch():
    recipe = Evaluate(task="sums", precision="bfloat16")
    asked = Items(count=64, prompt=100, answer=10)
    one, two = (flops.evaluate(recipe, LLAMA2_7B, asked, Runtime(eval_batch_size=size)) for size in (64, 32))
    assert two.moved - one.moved == pytest.approx(10 * 2 * LLAMA2_7B.weights)
    assert two.launches == 2 * one.launches
    assert two.flops == one.flops


def test_of_experts_those_count_that_a_token_passes_through():
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 100, "num_experts_per_tok": 2,
    }  # fmt: skip
    few, many = (read_geometry({"model_type": "mixtral", "num_local_experts": n, **sizes}) for n in (2, 8))
    assert flops.Passes(few, 10).forward() == flops.Passes(many, 10).forward()
    assert few.weights < many.weights


def test_numbers_of_the_analyses_are_those_of_their_code():
    assert len(landscape.LINE) == flops.LINE
    assert cuts.DECILES == flops.DECILES


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
    guessed = sequences(step.node, 512, None)
    assert (guessed.train, guessed.validation) == (52, 8)
    built = mini.store.build(STAGES["prepare-data"], step.node.recipe, step.node.inputs, Runtime(threads=1))
    counted = sequences(step.node, 512, built.manifest)
    assert counted.tokens == built.manifest["summary"]["train"]["tokens"]
    assert guessed.tokens / 2 < counted.tokens < guessed.tokens * 2
    more = {**built.manifest["summary"], "train": {"examples": 52, "tokens": 10 * counted.tokens}}
    assert sequences(step.node, 512, {**built.manifest, "summary": more}).length == pytest.approx(10 * counted.length)


def test_a_share_of_the_data_costs_its_share(mini):
    whole, half = (by_stage(mini(*sets))["prepare-data sums" + label][0].node
                   for sets, label in (((), ""), (("data.fraction=0.5",), " fraction=0.5")))  # fmt: skip
    assert sequences(half, 512, None).tokens == pytest.approx(sequences(whole, 512, None).tokens / 2)


def test_the_device_is_what_the_runtime_names_or_what_the_precision_is_meant_for(mini):
    assert device_of(mini().plan) is CORE
    assert device_of(mini("fine_tune.precision=bfloat16").plan) is ACCELERATOR
    assert device_of(mini("runtime.device=cuda").plan) is ACCELERATOR
    assert device_of(mini("fine_tune.precision=bfloat16", "runtime.device=cpu").plan) is CORE


def test_one_study_is_shown_with_the_cost_of_every_stage_their_sum_and_what_is_assumed(mini, capsys):
    bill = mini()
    show(bill)
    out = capsys.readouterr().out
    assert f"{bill.hours * 60:.2f} core-min in all" in out
    assert "assumed: one CPU core" in out
    assert as_dict(bill)["device"]["unit"] == "core-min"

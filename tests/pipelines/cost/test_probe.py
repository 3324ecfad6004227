"""A probe measures each kind of work of a plan for seconds, once, and plans say what it found."""

from dataclasses import replace

import pytest

from mft_core.errors import ConfigError
from mft_core.recipes import Evaluate, FineTune, LearnMask, Runtime
from mft_core.stage import Facts
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.cost.predicted import bills, device_of
from pipelines.cost.probe import _kept, _small, probe
from pipelines.plan.plan import make_plan
from tests.pipelines.cost.test_predicted import LLAMA2_7B, training
from tests.support.mini import write_profile, write_study

ANSWERS = Evaluate(task="sums", precision="bfloat16")
TUNING = FineTune(training=training())
MASK = LearnMask(sparsity=0.1, layers="20-23", score_init="normal", training=training())


def test_a_plan_is_corrected_by_what_its_kinds_of_work_take_here_measured_once(tmp_path):
    profile, study = load_profile(str(write_profile(tmp_path))), load_study(str(write_study(tmp_path)))
    store, said = ArtifactStore(tmp_path / "home"), []
    plan = make_plan(study, profile, store, ["runtime.device=cpu"])
    device = device_of(plan.runtime)
    found = probe([plan], store, device, said.append)
    weights = plan.variants[0].resolved.model.geometry.weights
    kinds = {f"{kind} float32 {weights}" for kind in ("evaluate", "fine-tune", "learn-mask", "fine-tune lora")}
    assert kinds <= found.keys()
    assert all(factor > 0 for factor in found.values())
    assert len(said) == 1
    assert probe([plan], store, device, said.append) == found
    assert len(said) == 1
    plain, corrected = (bills([plan], store, probed=known)[0] for known in ({}, found))
    for step in plan.steps:
        kind = step.node.stage
        if kind in ("evaluate", "learn-mask") and not getattr(step.node.recipe, "calibration_rows", None):
            factor = found[f"{kind} float32 {weights}"] if kind == "evaluate" or step.node.recipe.training else 1
            assert corrected.costs[step.node.id].hours == pytest.approx(factor * plain.costs[step.node.id].hours)


@pytest.mark.parametrize("damage", ["", "[]", "0.0", "NaN", "-1.5"])
def test_what_was_measured_and_is_damaged_is_measured_again(tmp_path, damage):
    (tmp_path / "kept.json").write_text(damage)
    assert _kept(tmp_path / "kept.json") is None
    (tmp_path / "kept.json").write_text("1.5")
    assert _kept(tmp_path / "kept.json") == 1.5


@pytest.mark.parametrize("recipe", [ANSWERS, TUNING, MASK])
def test_of_a_large_model_a_few_layers_are_measured_on_an_accelerator_and_nothing_on_a_cpu(recipe):
    facts = Facts(LLAMA2_7B, Runtime(), "bfloat16", 4096, train=60_000, length=500, items=1_000, prompt=100, answer=512)
    _, few = _small(recipe, facts)
    assert 0 < len(few.geometry.layers) <= 4
    assert few.items < 1_000 or few.train < 60_000
    assert _small(recipe, replace(facts, cpu=True)) is None


def test_a_setting_that_does_not_fit_the_model_is_refused_and_another_rate_is_the_same_work(tmp_path):
    profile, study = load_profile(str(write_profile(tmp_path))), load_study(str(write_study(tmp_path)))
    store, said = ArtifactStore(tmp_path / "home"), []
    for changes in ([], ["mask.training.learning_rate=0.02"]):
        plan = make_plan(study, profile, store, ["runtime.device=cpu", *changes])
        probe([plan], store, device_of(plan.runtime), said.append)
    assert len(said) == 1
    plan = make_plan(study, profile, store, ["runtime.device=cpu", "mask.modules=q_prj"])
    with pytest.raises(ConfigError, match=r"^modules = 'q_prj': no matrix .* Did you mean 'q_proj'"):
        probe([plan], store, device_of(plan.runtime), said.append)


def test_a_probe_that_dies_is_told_with_its_reason_and_the_table_is_taken(tmp_path, monkeypatch):
    profile, study = load_profile(str(write_profile(tmp_path))), load_study(str(write_study(tmp_path)))
    store, said = ArtifactStore(tmp_path / "home"), []
    plan = make_plan(study, profile, store, ["runtime.device=cpu"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # in which torch is something else
    (tmp_path / "torch.py").write_text("raise RuntimeError('no torch today')")
    assert probe([plan], store, device_of(plan.runtime), said.append) == {}
    assert "no torch today" in said[-1]

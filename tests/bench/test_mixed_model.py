"""That the other implementation is MixedLM's crossed model, reads a study's items, and agrees with the report's."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from statsmodels.regression.mixed_linear_model import MixedLM

from mft_core.recipes import Compare, Runtime
from mft_core.stage import StageContext
from mft_core.stages import get_stage
from mft_core.statistics import effects
from mft_core.statistics.effects import Stratum, UnitVariance, estimate
from tests.bench.mixed_model import agrees, apart, differences, fit, judged


def crossed(units: int, items: int, unit: float, item: float, rest: float, seed: int = 0) -> np.ndarray:
    """Return differences of the model, in sizes of the standard deviations."""
    rng = np.random.default_rng(seed)
    effects = unit * rng.normal(size=(units, 1)), item * rng.normal(size=(1, items))
    return effects[0] + effects[1] + rest * rng.normal(size=(units, items))


def test_the_rotated_model_has_the_estimates_of_the_crossed_one():
    values = crossed(5, 60, 0.1, 0.3, 0.3)
    unit, item = np.indices(values.shape).reshape(2, -1)
    frame = pd.DataFrame({"gain": values.ravel(), "unit": unit, "item": item, "all": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        direct = MixedLM.from_formula(
            "gain ~ 1", frame, groups="all", re_formula="0", vc_formula={"unit": "0 + C(unit)", "item": "0 + C(item)"}
        ).fit()
    found = fit([values])
    parts = dict(zip(direct.model.exog_vc.names, direct.vcomp, strict=True))
    assert found.gain == pytest.approx(direct.params["Intercept"])
    assert found.variances == pytest.approx((parts["unit"], parts["item"], direct.scale), rel=3e-3)
    weights = 1 / 5, 1 / 60, 1 / 300
    assert np.dot(weights, found.variances) == pytest.approx(direct.bse["Intercept"] ** 2, rel=3e-3)


@pytest.mark.parametrize(("units", "spread"), [(1, 0.0), (5, 0.03), (10, 0.03)])
def test_right_and_wrong_answers_of_fine_tunings_are_judged_as_the_report_judges_them(units: int, spread: float):
    benchmarks = [np.sign(np.round(crossed(units, 300, spread, 0.25, 0.3, seed))) for seed in (1, 2)]
    found = fit(benchmarks)
    ours = estimate([Stratum.of(values[:, None]) for values in benchmarks], "recipe" if units > 1 else "checkpoint")
    row = {"gain_low": ours.low, "gain_high": ours.high}
    assert found.gain == pytest.approx(ours.gain)
    assert apart(row, found) < 0.1


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every variance between units as it is measured, as MixedLM does."""
    monkeypatch.setattr(effects, "ORDINARY", UnitVariance(0.0, 1e-12))


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize("unit", [0.004, 0.01])
def test_a_small_variance_between_fine_tunings_has_the_degrees_of_freedom_of_a_large_one(unit: float):
    """Steps of the numerical Hessian that were larger than the variance itself made intervals three times as wide."""
    values = crossed(5, 1_000, 0.0, 0.05, 0.1)
    values += unit * np.array([-1.2, -0.6, 0.0, 0.6, 1.2])[:, None] - values.mean(axis=1, keepdims=True)
    found = fit([values])
    ours = estimate([Stratum.of(values[:, None])], "recipe")
    assert found.variances[0] > 0
    assert apart({"gain_low": ours.low, "gain_high": ours.high}, found) < 0.01


@pytest.mark.parametrize("units", [3, 5, 10])
def test_where_no_variance_between_fine_tunings_is_estimated_our_interval_is_never_narrower(units: int):
    none = 0
    for seed in range(8):
        values = crossed(units, 60, 0.0, 0.2, 0.3, seed)
        values = np.sign(np.round(1.4 * values)) if seed % 2 else values
        found = fit([values])
        if found.variances[0] == 0:
            none += 1
            ours = estimate([Stratum.of(values[:, None])], "recipe")
            slack = 0.005 * (ours.high - ours.low)
            assert ours.low <= found.low + slack
            assert ours.high >= found.high - slack
    assert none >= 2


@pytest.mark.usefixtures("believed")
def test_every_row_of_a_study_with_fine_tunings_mask_seeds_and_two_benchmarks_is_judged_alike(tmp_path: Path):
    """A simulated study in the layout of a real one: made-up outcomes, the real stage, every row that it claims."""
    rng = np.random.default_rng(3)
    variants: list[dict] = []
    evaluations = []

    def add(right: np.ndarray, **described: object) -> int:
        folder = tmp_path / f"eval-{len(variants)}"
        folder.mkdir()
        (folder / "items.jsonl").write_text(
            "".join(json.dumps({"item": f"{at}", "outcome": int(one)}) + "\n" for at, one in enumerate(right))
        )
        (folder / "summary.json").write_text(json.dumps({"metric": "exact_match", "commonest_target_share": 0.1}))
        empty = dict.fromkeys(("layers", "modules", "sparsity", "seed", "baseline", "replicate"))
        variants.append({**empty, "domain": "maths", **described})
        evaluations.append((variants[-1], folder))
        return len(variants) - 1

    for benchmark in ("sums", "gcd"):
        items = rng.normal(size=150)
        for replicate in range(4):
            own = items + 0.3 * rng.normal(size=150)
            told = {"benchmark": benchmark, "replicate": replicate}
            named = f" replicate={replicate}" if replicate else ""
            fft = add(own < 0.3, variant=f"fft{named}", method="fft", **told)
            for share, shift in ((0.1, 0.05), (0.4, -0.3)):
                of_fine_tuning = shift + 0.06 * rng.normal()
                for seed in (0, 1):
                    moved = own - of_fine_tuning - 0.06 * rng.normal() + 0.4 * rng.normal(size=150)
                    name = f"mft sparsity={share} seed={seed}{named}"
                    add(moved < 0.3, variant=name, method="mft", sparsity=share, seed=seed, baseline=fft, **told)
    out = tmp_path / "out"
    out.mkdir()
    recipe = Compare(question="Does it help?", variants=tuple(variants))
    inputs = {f"eval-{at}": folder for at, (_, folder) in enumerate(evaluations)}
    get_stage("compare").run(recipe, inputs, out, StageContext(Runtime(), out))
    rows = json.loads((out / "rows.json").read_text())
    both = list(judged(rows, differences(evaluations), every=False))
    assert len(both) == 2 * 2, "shares, this checkpoint and this recipe"
    assert [row["variant"] for row, other in both if not agrees(row, replace(other, doubted=False))] == []
    assert sum(other.variances[0] > 0 for _, other in both) >= 3


def test_differences_are_read_from_the_items_of_each_replicate_and_its_own_baseline(tmp_path: Path):
    def evaluation(name: str, outcomes: list[int], higher: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "items.jsonl").write_text("".join(json.dumps({"outcome": one}) + "\n" for one in outcomes))
        (folder / "summary.json").write_text(json.dumps({"higher_is_better": higher}))
        return folder

    described = [
        {"variant": "fft", "domain": "d", "benchmark": "b"},
        {"variant": "mft seed=0", "domain": "d", "benchmark": "b", "baseline": 0},
        {"variant": "fft replicate=1", "domain": "d", "benchmark": "b", "replicate": 1},
        {"variant": "mft seed=0 replicate=1", "domain": "d", "benchmark": "b", "baseline": 2, "replicate": 1},
    ]
    outcomes = [[0, 1, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]]
    made = [evaluation(str(at), each) for at, each in enumerate(outcomes)]
    found = differences(list(zip(described, made, strict=True)))
    assert {key: values.tolist() for key, values in found.items()} == {("mft", "d", "b"): [[[1, 0, -1]], [[1, 1, 0]]]}
    falling = [evaluation(f"less-{at}", each, higher=False) for at, each in enumerate(outcomes)]
    (values,) = differences(list(zip(described, falling, strict=True))).values()
    assert values[0, 0].tolist() == [-1, 0, 1]

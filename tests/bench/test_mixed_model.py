"""That the other implementation is MixedLM's crossed model, reads a study's items, and agrees with the report's."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from statsmodels.regression.mixed_linear_model import MixedLM

from mft_core.statistics.effects import Stratum, estimate
from tests.bench.mixed_model import apart, differences, fit


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

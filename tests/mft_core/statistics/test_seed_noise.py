"""The noise between trainings: the analysis of variance against statsmodels, and what is made of it."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from mft_core.statistics.seed_noise import SeedNoise


def trainings(seeds: int, items: int, spread: float, seed: int = 0) -> np.ndarray:
    """Return differences of seeds × items, with this standard deviation between the seeds and 0.4 of the rest."""
    rng = np.random.default_rng(seed)
    questions = rng.normal(scale=0.3, size=items)
    return spread * rng.normal(size=(seeds, 1)) + questions + rng.normal(scale=0.4, size=(seeds, items))


def test_the_variance_between_trainings_is_that_of_the_analysis_of_variance():
    differences = trainings(seeds=4, items=30, spread=0.3)
    frame = pd.DataFrame([{"seed": s, "item": i, "value": differences[s, i]} for s in range(4) for i in range(30)])
    squares = anova_lm(ols("value ~ C(seed) + C(item)", frame).fit())["mean_sq"]
    expected = (squares["C(seed)"] - squares["Residual"]) / 30
    noise = SeedNoise.pooled([[[differences]]])
    assert noise.relative == pytest.approx(expected / squares["Residual"])
    assert noise.deviation([differences]) == pytest.approx(np.sqrt(expected))
    assert noise.freedom == 3


def test_the_estimate_is_right_on_average_and_pooling_counts_the_trainings():
    variants = [[[trainings(3, 200, spread=0.1, seed=seed)]] for seed in range(300)]
    noise = SeedNoise.pooled(variants)
    assert noise.freedom == 600
    assert noise.relative == pytest.approx((0.1 / 0.4) ** 2, rel=0.2)


def test_the_same_trainings_on_another_benchmark_are_no_further_trainings():
    first, second = trainings(3, 100, 0.1, seed=1), trainings(3, 50, 0.1, seed=2)
    apart = [SeedNoise.pooled([[[each]]]) for each in (first, second)]
    together = SeedNoise.pooled([[[first], [second]]])
    assert together.freedom == 2
    assert together.relative == pytest.approx(np.mean([noise.relative for noise in apart]))


def test_a_mean_over_benchmarks_has_the_noise_of_the_mean():
    rng = np.random.default_rng(0)
    shift = 0.2 * rng.normal(size=(40, 1))
    both = [trainings(40, 100, 0.0, seed=seed) + shift for seed in (1, 2)]
    opposite = [both[0], both[1] - 2 * shift]
    assert SeedNoise.pooled([[both]]).deviation(both) == pytest.approx(shift.std(), rel=0.15)
    assert SeedNoise.pooled([[opposite]]).deviation(opposite) < 0.05


def test_trainings_that_are_the_same_item_by_item_have_no_noise():
    same = np.tile(trainings(1, 50, 0.0), (3, 1))
    noise = SeedNoise.pooled([[[same]]])
    assert (noise.relative, noise.deviation([same])) == (0, 0)


def test_the_mean_of_the_seeds_is_referred_to_students_t_and_of_a_winner_to_the_largest_of_several():
    differences = trainings(3, 100, 0.2)
    noise = SeedNoise.pooled([[[differences]]])
    unit = noise.deviation([differences]) / np.sqrt(3)
    alone = noise.of_mean([differences], 20_000)
    assert np.quantile(alone, 0.975) / unit == pytest.approx(stats.t.ppf(0.975, noise.freedom), rel=0.01)
    of_four = noise.of_mean([differences], 20_000, chosen_from=4)
    drawn = np.abs(stats.t.rvs(noise.freedom, size=(50_000, 4), random_state=0)).max(axis=1)
    for share in (0.5, 0.9, 0.95):
        assert np.quantile(np.abs(of_four), share) / unit == pytest.approx(np.quantile(drawn, share), rel=0.03)
    assert of_four.sum() == pytest.approx(0, abs=1e-6)

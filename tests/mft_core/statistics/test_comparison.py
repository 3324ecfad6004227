"""The statistics against worked examples from the literature and other implementations; simulations: test_coverage."""

from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from mft_core.errors import StageError
from mft_core.statistics.bootstrap import bootstrap_gains
from mft_core.statistics.comparison import (
    Comparison,
    Outcomes,
    Pairs,
    adjust,
    compare,
    pair,
    sign_flips,
    verdict,
)
from mft_core.statistics.seed_noise import SeedNoise

NO_NOISE = np.zeros(1)


def pairs(won: int, lost: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (baseline, variant) outcomes with these counts."""
    baseline = np.repeat([0, 1, 1, 0], [won, lost, both, neither])
    variant = np.repeat([1, 0, 1, 0], [won, lost, both, neither])
    return baseline, variant


def compared(baseline: Any, variant: Any, **options: Any) -> Comparison:
    return compare([Pairs.of(baseline, variant)], **options)


def outcomes(label: str, items: list[str], values: list[int], benchmark: str = "gcd") -> Outcomes:
    return Outcomes(label, benchmark, "exact_match", tuple(items), np.array(values, dtype=float))


def study(gain: float, low: float, high: float, p: float, p_holm: float | None) -> Comparison:
    return Comparison(800, 1, 0.5 + gain, 0.5, gain, low, high, 60, 40, p, p_holm)


@pytest.mark.parametrize(("won", "lost"), [(36, 11), (3, 0), (7, 7), (101, 59), (0, 12), (0, 120)])
def test_the_p_value_of_one_seed_is_that_of_mcnemars_exact_test(won: int, lost: int):
    baseline, variant = pairs(won, lost, 300, 200)
    expected = mcnemar([[300, won], [lost, 200]], exact=True).pvalue
    assert compared(baseline, variant).p_value == pytest.approx(expected, rel=1e-9)


def test_a_published_example_of_mcnemars_test_is_met():
    # Agresti, Categorical Data Analysis, McNemar's test: approval of the prime minister in two surveys, 794 and 570
    # unchanged, 150 and 86 changed; published: chi-squared 17.36, p = 3.1e-5 (asymptotic), interval (-0.06, -0.02).
    baseline, variant = pairs(won=86, lost=150, both=794, neither=570)
    result = compared(baseline, variant)
    assert result.n == 1600
    assert (result.wins, result.losses) == (86, 150)
    assert (result.baseline, result.accuracy) == (pytest.approx(0.59), pytest.approx(0.55))
    assert pytest.approx(17.36, abs=0.005) == (150 - 86) ** 2 / (150 + 86)
    assert result.p_value == pytest.approx(stats.binomtest(86, 86 + 150).pvalue) == pytest.approx(3.1e-5, rel=0.25)
    assert (round(result.gain_low, 2), round(result.gain_high, 2)) == (-0.06, -0.02)


def test_the_interval_of_few_items_is_the_published_one_of_bonett_and_price():
    # Fagerland, Lydersen & Laake (2014), Recommended tests and confidence intervals for paired binomial proportions,
    # airway hyper-responsiveness of 21 children: 1 and 7 changed; Bonett and Price's interval (-0.508, -0.013).
    # The bootstrap moves in steps of an item.
    result = compared(*pairs(won=1, lost=7, both=1, neither=12), resamples=50_000)
    assert (result.gain_low, result.gain_high) == pytest.approx((-0.508, -0.013), abs=1 / 23)


def test_the_published_randomisation_test_of_darwins_plants_is_met():
    # Fisher, The Design of Experiments (1935), section 21: cross- against self-fertilised plants, 15 differences in
    # eighths of an inch; as great a total in 1,726 of the 32,768 flips of signs: 5.267 per cent.
    plants = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], dtype=float)
    assert compared(np.zeros(15), plants, resamples=40_000).p_value == pytest.approx(1726 / 32768, abs=1e-12)
    assert compared(np.zeros(15), plants, resamples=5_000).p_value == pytest.approx(1726 / 32768, abs=0.01)
    # ... and the sign test of the same 15: 13 against 2.
    assert compared(np.zeros(15), np.sign(plants)).p_value == pytest.approx(stats.binomtest(13, 15).pvalue)


def test_the_bootstrap_has_the_published_standard_error_of_the_mouse_data():
    # Efron & Tibshirani, An Introduction to the Bootstrap (1993), table 2.2: the mean survival of the seven treated
    # mice has the (ideal) bootstrap standard error 23.36 days.
    mice = np.array([[94, 197, 16, 38, 99, 141, 23]], dtype=float)
    gains = bootstrap_gains([mice], 40_000, seed=0)
    assert gains.mean() == pytest.approx(86.86, abs=4 * 23.36 / 200)
    assert gains.std() == pytest.approx(23.36, rel=0.02)


def test_holms_adjustment_agrees_with_published_examples():
    # Holm (1979): ordered p-values are multiplied by m, m-1, ... and made monotone.
    adjusted = adjust([study(0.01, 0, 0.02, p, None) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [one.p_holm for one in adjusted] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust([]) == []
    # Benjamini & Hochberg (1995), section 4.1, 15 endpoints of a trial: Bonferroni's and Hochberg's procedures both
    # reject the first three at 5%; Holm's lies between them.
    trial = (0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324, 0.4262, 0.5719, 0.6528,
             0.759, 1.0)  # fmt: skip
    rejected = [one.p_holm < 0.05 for one in adjust([study(0.01, 0, 0.02, p, None) for p in trial]) if one.p_holm]
    assert rejected == [True] * 3 + [False] * 12


def test_the_interval_is_that_of_the_paired_bootstrap_with_one_item_more_won_and_one_lost():
    baseline, variant = pairs(won=36, lost=11, both=420, neither=333)
    ours = compared(baseline, variant, resamples=20_000)
    plain = stats.bootstrap(
        (np.append(variant - baseline, [1, -1]),), np.mean, n_resamples=20_000, batch=500, method="percentile", rng=1
    ).confidence_interval
    assert ours.gain == pytest.approx(25 / 800)
    assert (ours.gain_low, ours.gain_high) == pytest.approx((plain.low, plain.high), abs=1.01 / 802)


def test_the_same_seed_gives_the_same_interval_and_more_confidence_a_wider_one():
    baseline, variant = pairs(36, 11, 420, 333)
    first, again = (compared(baseline, variant, seed=3) for _ in range(2))
    wider = compared(baseline, variant, confidence=0.99, seed=3)
    assert first == again
    assert wider.gain_low < first.gain_low < first.gain_high < wider.gain_high


def test_pooling_shows_the_mean_of_the_seeds_and_is_wider_when_they_disagree():
    rng = np.random.default_rng(0)
    baseline = rng.integers(0, 2, 400)
    better = np.where(rng.random(400) < 0.2, 1, baseline)
    worse = np.where(rng.random(400) < 0.2, 0, baseline)
    alike = compared(baseline, [better, better])
    apart = compared(baseline, [better, worse])
    assert apart.seeds == 2
    assert apart.gain == pytest.approx((better.mean() + worse.mean()) / 2 - baseline.mean())
    assert apart.gain_high - apart.gain_low > 2 * (alike.gain_high - alike.gain_low)
    assert (alike.wins, alike.losses) == (2 * (better > baseline).sum(), 0)


def test_each_seed_is_compared_with_the_baseline_of_its_own():
    shared = compared([0, 0, 1, 1], [[1, 0, 1, 1], [0, 0, 1, 1]])
    own = compared([[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 0, 1, 1], [0, 0, 1, 1]])
    assert shared.gain == pytest.approx(1 / 8)
    assert own.gain == pytest.approx(-1 / 8)


def test_the_exact_pooled_p_value_agrees_with_every_sign_flip_counted_out():
    differences = np.array([[1, 0, 1, -1, 1, 1, 0, 0], [1, 1, 0, -1, 1, 0, 0, 1]], dtype=float)
    totals = differences.sum(axis=0)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    expected = np.mean(np.abs(totals @ signs) >= abs(totals.sum()))
    assert sign_flips([differences]).p_value(differences.mean(), NO_NOISE) == pytest.approx(expected, abs=1e-12)


def test_the_noise_of_the_seeds_is_added_to_the_flips_and_to_the_interval():
    rng = np.random.default_rng(0)
    differences = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.75, 0.15], size=(2, 500))
    noise = SeedNoise(relative=0.004, freedom=6)
    result = compared(np.zeros(500), differences, noise=noise)
    added = noise.deviation([differences]) / np.sqrt(2) * rng.standard_t(6, size=200_000)
    signs = rng.choice([-1, 1], size=(20_000, 500)) @ differences.mean(axis=0) / 500
    gains = np.tile(signs, 10) + added
    assert result.p_value == pytest.approx(np.mean(np.abs(gains) >= abs(result.gain)), abs=0.005)
    quiet = compared(np.zeros(500), differences, noise=SeedNoise(0.0, 6))
    assert result.gain_high - result.gain_low > 1.2 * (quiet.gain_high - quiet.gain_low)
    assert quiet.p_value == sign_flips([differences]).p_value(quiet.gain, NO_NOISE) < result.p_value


def test_the_gain_over_several_benchmarks_is_the_mean_of_their_gains_however_many_items_they_have():
    few, many = Pairs.of(*pairs(30, 5, 40, 25)), Pairs.of(*pairs(40, 60, 500, 200))
    both = compare([few, many])
    assert both.n == 900
    assert both.gain == pytest.approx((25 / 100 - 20 / 800) / 2)
    spread = np.hypot(few.differences.std() / 10, many.differences.std() / np.sqrt(800)) / 2
    assert both.gain_high - both.gain_low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    assert both.p_value == pytest.approx(2 * stats.norm.sf(both.gain / spread), abs=0.002)
    with pytest.raises(ValueError, match=r"different numbers of seeds: \[1, 2\]"):
        compare([few, Pairs.of([0, 1], [[0, 1], [1, 1]])])


def test_outcomes_that_are_not_right_or_wrong_get_a_sampled_sign_flip_test():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=200)
    assert compared(np.zeros(200), noise - noise.mean(), resamples=2_000).p_value > 0.9
    shifted = compared(np.zeros(200), noise + 0.2, resamples=5_000).p_value
    assert shifted == pytest.approx(stats.ttest_1samp(noise + 0.2, 0).pvalue, abs=0.02)


def test_equal_outcomes_are_called_identical_and_not_a_result():
    result = compared([0, 1, 1], [0, 1, 1])
    assert (result.gain, result.p_value) == (0, 1)
    assert result.gain_low < 0 < result.gain_high, "that three items are equal does not say that all are"
    assert verdict(result) == "identical"


@pytest.mark.parametrize(
    ("comparison", "words"),
    [
        (study(0.03, 0.01, 0.05, 0.001, 0.02), "better"),
        (study(-0.03, -0.05, -0.01, 0.001, 0.02), "worse"),
        (study(0.03, 0.01, 0.05, 0.01, 0.2), "not distinguishable from noise"),
        (study(0.03, -0.001, 0.05, 0.04, 0.04), "not distinguishable from noise"),
        (study(0.03, 0.01, 0.05, 0.001, None), "better"),
    ],
)
def test_a_gain_is_real_only_if_adjusted_p_value_and_interval_agree(comparison: Comparison, words: str):
    assert verdict(comparison) == words


def test_answers_to_different_items_are_refused_naming_both_models():
    with pytest.raises(StageError, match=r"'mft seed=0' and its baseline 'fft' .*'gcd'.*gcd/2") as caught:
        pair([outcomes("fft", ["gcd/1", "gcd/2"], [0, 1])], [outcomes("mft seed=0", ["gcd/1"], [1])])
    assert "2 against 1" in str(caught.value)
    with pytest.raises(StageError, match="another order"):
        pair([outcomes("fft", ["a", "b"], [0, 1])], [outcomes("mft", ["b", "a"], [1, 0])])
    with pytest.raises(StageError, match=r"gcd \(exact_match\).*sums \(exact_match\)"):
        pair([outcomes("fft", ["a"], [0])], [outcomes("mft", ["a"], [1], benchmark="sums")])


def test_outcomes_of_different_length_do_not_pair():
    with pytest.raises(ValueError, match="do not pair"):
        compared([0, 1, 1], [0, 1])

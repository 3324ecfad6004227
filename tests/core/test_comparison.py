"""The statistics against worked examples from the literature, other implementations and simulation."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from mft_core.comparison import (
    Comparison,
    Outcomes,
    adjust,
    bootstrap_gains,
    compare_pairs,
    compare_variant,
    sign_flip_p,
    verdict,
)
from mft_core.errors import StageError


def pairs(won: int, lost: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (baseline, variant) outcomes with these counts."""
    baseline = np.repeat([0, 1, 1, 0], [won, lost, both, neither])
    variant = np.repeat([1, 0, 1, 0], [won, lost, both, neither])
    return baseline, variant


def outcomes(label: str, items: list[str], values: list[int], benchmark: str = "gcd") -> Outcomes:
    return Outcomes(label, benchmark, "exact_match", tuple(items), np.array(values, dtype=float))


def study(gain: float, low: float, high: float, p: float, p_holm: float | None) -> Comparison:
    return Comparison(800, 1, 0.5 + gain, 0.5, gain, low, high, 60, 40, p, p_holm)


@pytest.mark.parametrize(("won", "lost"), [(36, 11), (3, 0), (7, 7), (101, 59), (0, 12)])
def test_the_p_value_of_one_seed_is_that_of_mcnemars_exact_test(won: int, lost: int):
    baseline, variant = pairs(won, lost, 300, 200)
    expected = mcnemar([[300, won], [lost, 200]], exact=True).pvalue
    assert compare_pairs(baseline, variant).p_value == pytest.approx(expected, rel=1e-9)


def test_a_published_example_of_mcnemars_test_is_met():
    # Agresti, Categorical Data Analysis, McNemar's test: approval of the president in two surveys, 794 and 570
    # unchanged, 150 and 86 changed; published: chi-squared 17.36, p = 3.1e-5 (asymptotic), interval (-0.06, -0.02).
    baseline, variant = pairs(won=86, lost=150, both=794, neither=570)
    result = compare_pairs(baseline, variant)
    assert result.n == 1600
    assert (result.wins, result.losses) == (86, 150)
    assert (result.baseline, result.accuracy) == (pytest.approx(0.59), pytest.approx(0.55))
    assert pytest.approx(17.36, abs=0.005) == (150 - 86) ** 2 / (150 + 86)
    assert result.p_value == pytest.approx(stats.binomtest(86, 86 + 150).pvalue) == pytest.approx(3.1e-5, rel=0.25)
    assert (round(result.gain_low, 2), round(result.gain_high, 2)) == (-0.06, -0.02)


def test_holms_adjustment_agrees_with_a_worked_example():
    # Holm (1979): ordered p-values are multiplied by m, m-1, ... and made monotone.
    adjusted = adjust([study(0.01, 0, 0.02, p, None) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [one.p_holm for one in adjusted] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust([]) == []


def test_the_interval_is_that_of_the_paired_bootstrap():
    baseline, variant = pairs(won=36, lost=11, both=420, neither=333)
    ours = compare_pairs(baseline, variant, resamples=20_000)
    plain = stats.bootstrap(
        (variant - baseline,), np.mean, n_resamples=20_000, batch=500, method="percentile", rng=1
    ).confidence_interval
    assert ours.gain == pytest.approx(25 / 800)
    assert (ours.gain_low, ours.gain_high) == pytest.approx((plain.low, plain.high), abs=1.01 / 800)


def test_the_same_seed_gives_the_same_interval_and_more_confidence_a_wider_one():
    baseline, variant = pairs(36, 11, 420, 333)
    first, again = (compare_pairs(baseline, variant, seed=3) for _ in range(2))
    wider = compare_pairs(baseline, variant, confidence=0.99, seed=3)
    assert first == again
    assert wider.gain_low < first.gain_low < first.gain_high < wider.gain_high


def test_pooling_shows_the_mean_of_the_seeds_and_is_wider_when_they_disagree():
    rng = np.random.default_rng(0)
    baseline = rng.integers(0, 2, 400)
    better = np.where(rng.random(400) < 0.2, 1, baseline)
    worse = np.where(rng.random(400) < 0.2, 0, baseline)
    alike = compare_pairs(baseline, [better, better])
    apart = compare_pairs(baseline, [better, worse])
    assert apart.seeds == 2
    assert apart.gain == pytest.approx((better.mean() + worse.mean()) / 2 - baseline.mean())
    assert apart.gain_high - apart.gain_low > 2 * (alike.gain_high - alike.gain_low)
    assert (alike.wins, alike.losses) == (2 * (better > baseline).sum(), 0)


def test_each_seed_is_compared_with_the_baseline_of_its_own():
    shared = compare_pairs([0, 0, 1, 1], [[1, 0, 1, 1], [0, 0, 1, 1]])
    own = compare_pairs([[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 0, 1, 1], [0, 0, 1, 1]])
    assert shared.gain == pytest.approx(1 / 8)
    assert own.gain == pytest.approx(-1 / 8)


def test_the_exact_pooled_p_value_agrees_with_every_sign_flip_counted_out():
    differences = np.array([[1, 0, 1, -1, 1, 1, 0, 0], [1, 1, 0, -1, 1, 0, 0, 1]], dtype=float)
    totals = differences.sum(axis=0)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    expected = np.mean(np.abs(totals @ signs) >= abs(totals.sum()))
    assert sign_flip_p(differences) == pytest.approx(expected, abs=1e-12)


def test_outcomes_that_are_not_right_or_wrong_get_a_sampled_sign_flip_test():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1, 200))
    assert sign_flip_p(noise - noise.mean(), 2_000) > 0.9
    shifted = sign_flip_p(noise + 0.2, 5_000)
    assert shifted == pytest.approx(stats.ttest_1samp(noise[0] + 0.2, 0).pvalue, abs=0.02)


def test_equal_outcomes_are_called_identical_and_not_a_result():
    result = compare_pairs([0, 1, 1], [0, 1, 1])
    assert (result.gain, result.gain_low, result.gain_high, result.p_value) == (0, 0, 0, 1)
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
        compare_variant([outcomes("fft", ["gcd/1", "gcd/2"], [0, 1])], [outcomes("mft seed=0", ["gcd/1"], [1])])
    assert "2 against 1" in str(caught.value)
    with pytest.raises(StageError, match="another order"):
        compare_variant([outcomes("fft", ["a", "b"], [0, 1])], [outcomes("mft", ["b", "a"], [1, 0])])
    with pytest.raises(StageError, match=r"gcd \(exact_match\).*sums \(exact_match\)"):
        compare_variant([outcomes("fft", ["a"], [0])], [outcomes("mft", ["a"], [1], benchmark="sums")])


def test_outcomes_of_different_length_do_not_pair():
    with pytest.raises(ValueError, match="do not pair"):
        compare_pairs([0, 1, 1], [0, 1])


@pytest.mark.slow
def test_the_interval_covers_the_true_gain_in_about_95_of_100_studies():
    rng = np.random.default_rng(7)
    chances = {1: 0.08, -1: 0.05, 0: 0.87}
    hits = 0
    for index in range(2_000):
        differences = rng.choice(list(chances), p=list(chances.values()), size=(1, 800)).astype(float)
        low, high = np.quantile(bootstrap_gains(differences, 2_000, index), [0.025, 0.975])
        hits += low <= 0.03 <= high
    assert 0.93 <= hits / 2_000 <= 0.97


@pytest.mark.slow
def test_the_pooled_test_rejects_a_true_null_in_about_5_of_100_studies():
    rng = np.random.default_rng(8)
    rejected = 0
    for _ in range(2_000):
        right = rng.beta(1, 1, size=600)  # easy and hard items; variant's seeds and baseline equally able
        baseline, first, second = (rng.random(600) < right for _ in range(3))
        rejected += sign_flip_p(np.stack([first, second]).astype(float) - baseline) < 0.05
    assert 0.035 <= rejected / 2_000 <= 0.065

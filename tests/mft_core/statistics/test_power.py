"""The number of items that would show a gain: against published figures, statsmodels and simulation."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from mft_core.statistics.power import items_needed, mcnemar_power


def outcomes(won: int, lost: int, items: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [won, lost, items - won - lost])[None]


def test_the_published_power_of_mcnemars_exact_test_is_met():
    # G*Power 3.1 manual, "Proportion: inequality, two dependent groups (McNemar)", after O'Brien (2002): shares 0.32
    # and 0.08 changed, 50 pairs, one-sided 5% (two-sided 10%): power 0.839343.
    assert mcnemar_power(50, 0.32, 0.08, alpha=0.10) == pytest.approx(0.839343, abs=5e-5)


def test_the_power_is_how_often_the_test_rejects():
    rng = np.random.default_rng(0)
    counts, times = np.unique(rng.multinomial(150, [0.12, 0.05, 0.83], size=4_000)[:, :2], axis=0, return_counts=True)
    rejected = [stats.binomtest(int(won), int(won + lost)).pvalue < 0.05 for won, lost in counts]
    assert mcnemar_power(150, 0.12, 0.05) == pytest.approx(np.average(rejected, weights=times), abs=4 * 0.5 / 63)


@pytest.mark.parametrize(("won", "lost", "items"), [(36, 11, 800), (11, 36, 800), (5, 0, 164), (60, 50, 541)])
def test_the_items_needed_are_the_fewest_with_the_power(won: int, lost: int, items: int):
    needed = items_needed(outcomes(won, lost, items))
    assert needed is not None
    assert mcnemar_power(needed, won / items, lost / items) >= 0.8
    assert mcnemar_power(needed - 1, won / items, lost / items) < 0.8


def test_the_normal_approximation_is_the_published_one_and_near_the_exact_number():
    # Connor (1987), Biometrics 43: shares 0.45 and 0.05, 80% power at 5%: 22.8, so 23 pairs; the exact test needs a few
    # more. With many discordant pairs the two agree.
    exact = items_needed(outcomes(45, 5, 100))
    assert exact is not None
    assert 23 <= exact <= 28
    many, fewer = items_needed(outcomes(2_040, 1_960, 20_000)), items_needed(outcomes(2_080, 1_920, 20_000))
    assert many == pytest.approx(7.849 * 0.2 / 0.004**2, rel=0.01)
    assert fewer == pytest.approx(7.849 * 0.2 / 0.008**2, rel=0.02)


def test_no_number_of_items_shows_a_gain_of_zero():
    assert items_needed(outcomes(7, 7, 100)) is None
    assert items_needed(outcomes(0, 0, 100)) is None


def test_seeds_have_their_shares_averaged():
    seeds = np.concatenate([outcomes(30, 10, 400), outcomes(10, 10, 400)])
    assert items_needed(seeds) == items_needed(outcomes(20, 10, 400))


def test_outcomes_that_are_numbers_have_the_power_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.1, 0.5, size=(1, 300))
    effect = differences.mean() / differences.std(ddof=1)
    expected = TTestPower().solve_power(effect_size=effect, alpha=0.05, power=0.8)
    assert items_needed(differences) == np.ceil(expected)
    assert items_needed(np.array([[0.5, 0.6, 0.55]])) in (2, 3)

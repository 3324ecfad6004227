"""Outcomes are paired item by item, each seed with a baseline of its own; what cannot be paired is refused."""

from typing import Any

import numpy as np
import pytest

from mft_core.errors import StageError
from mft_core.statistics.comparison import Comparison, Grouping, Outcomes, Pairs, compare, pair
from mft_core.statistics.effects import Stratum, estimate


def pairs(baseline: Any, variant: Any, higher_is_better: bool = True) -> Pairs:
    """Pair outcomes of (items,) or (seeds, items); one baseline may serve all seeds."""
    return Pairs(*np.broadcast_arrays(*map(np.atleast_2d, (baseline, variant))), higher_is_better)


def compared(baseline: Any, variant: Any) -> Comparison:
    return compare([[pairs(baseline, variant)]])


def outcomes(label: str, items: list[str], values: list[int], benchmark: str = "gcd") -> Outcomes:
    return Outcomes(label, benchmark, "exact_match", tuple(items), np.array(values, dtype=float))


def test_a_comparison_counts_and_says_what_changed():
    result = compared(np.repeat([0, 1, 1, 0], [60, 20, 300, 420]), np.repeat([1, 0, 1, 0], [60, 20, 300, 420]))
    assert (result.n, result.seeds, result.wins, result.losses) == (800, 1, 60, 20)
    assert (result.baseline, result.accuracy, result.gain) == pytest.approx((0.4, 0.45, 0.05))
    assert result.gain_low < result.gain < result.gain_high
    assert str(result).startswith("+5.0 points [+2.8, +7.2] on 800 items, 40.0% to 45.0%; 60 won, 20 lost, p = ")
    assert str(result).endswith(": better")


def test_each_seed_is_compared_with_the_baseline_of_its_own():
    shared = compared([0, 0, 1, 1], [[1, 0, 1, 1], [0, 0, 1, 1]])
    own = compared([[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 0, 1, 1], [0, 0, 1, 1]])
    assert shared.gain == pytest.approx(1 / 8)
    assert own.gain == pytest.approx(-1 / 8)


def test_replicates_and_benchmarks_become_the_strata_of_the_estimate():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 2, 4, 50))  # replicates, benchmarks, seeds, items
    replicates = [[pairs(np.zeros(50), one) for one in each] for each in values]
    for over in ("checkpoint", "recipe"):
        result = compare(replicates, over)
        expected = estimate([Stratum.of(values[:, 0]), Stratum.of(values[:, 1])], over)
        assert (result.gain, result.gain_low) == pytest.approx((expected.gain, expected.low))
    assert (result.n, result.seeds) == (100, 4)


def test_where_less_is_better_the_gain_is_what_it_fell_by():
    assert compare([[pairs([1, 1, 0, 1], [0, 0, 0, 1], higher_is_better=False)]]).gain == pytest.approx(0.5)


def test_answers_to_different_items_are_refused_naming_both_models():
    with pytest.raises(StageError, match=r"'mft seed=0' and its baseline 'fft' .*'gcd'.*gcd/2") as caught:
        pair([outcomes("fft", ["gcd/1", "gcd/2"], [0, 1])], [outcomes("mft seed=0", ["gcd/1"], [1])])
    assert "2 against 1" in str(caught.value)
    with pytest.raises(StageError, match="another order"):
        pair([outcomes("fft", ["a", "b"], [0, 1])], [outcomes("mft", ["b", "a"], [1, 0])])
    with pytest.raises(StageError, match=r"gcd \(exact_match\).*sums \(exact_match\)"):
        pair([outcomes("fft", ["a"], [0])], [outcomes("mft", ["a"], [1], benchmark="sums")])


def test_accuracies_of_subjects_are_averaged_unweighted():
    grouping = Grouping(subjects=("algebra", "algebra", "algebra", "geometry"))
    items = ("a", "b", "c", "d")
    sides = [Outcomes(name, "math", "flexible_match", items, np.array(values, dtype=float), grouping=grouping)
             for name, values in (("fft", [0, 0, 0, 0]), ("mft", [1, 0, 0, 1]))]  # fmt: skip
    assert sides[1].accuracy == pytest.approx((1 / 3 + 1) / 2)
    result = compare([[pair([sides[0]], [sides[1]])]])
    assert (result.baseline, result.accuracy, result.gain) == pytest.approx((0, 2 / 3, 2 / 3))

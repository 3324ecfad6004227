"""Four verdicts, and which tests of a study count."""

import numpy as np
import pytest
from scipy.stats import norm

from mft_core.methods import Contrast
from mft_core.statistics import verdicts
from mft_core.statistics.effects import Estimate, Stratum, estimate
from mft_core.statistics.verdicts import (
    explore,
    false_discovery,
    holm,
    judge_benchmarks,
    judge_primaries,
    sentence,
    spent,
    verdict,
)


def items(gain: float, sd: float = 0.1, count: int = 400, seed: int = 0) -> list[Stratum]:
    """Return one benchmark on which the mean gain is exactly this."""
    noise = np.random.default_rng(seed).normal(size=count)
    return [Stratum.of(gain + sd * (noise - noise.mean()))]


def known(gain: float, error: float) -> Estimate:
    return estimate(items(gain, error * 20, 400))


@pytest.mark.parametrize(
    ("gain", "error", "word", "said"),
    [
        (0.03, 0.005, "better", "a gain of 2.0 to 4.0 points"),
        (-0.03, 0.005, "worse", "a loss of 2.0 to 4.0 points"),
        (0.001, 0.003, "equivalent", "no gain above 0.7 points is compatible with these data"),
        (0.01, 0.02, "undecided", "too little data: gains up to 4.9 points are possible"),
        (-0.02, 0.0126, "undecided", "no gain above 0.5 points is compatible with these data"),
    ],
)
def test_a_gain_has_one_of_four_verdicts_and_a_sentence(gain: float, error: float, word: str, said: str):
    found = known(gain, error)
    assert verdict(found) == word
    assert sentence(found, verdict(found)) == said


def test_a_sentence_does_not_exclude_what_the_adjusted_test_leaves_open():
    found = Estimate(-0.035, -0.063, -0.006, 0.03, 0.0145, 200.0, -0.035)
    assert verdict(found, p_adjusted=0.08) == "undecided"
    assert sentence(found, "undecided") == (
        "-6.3 to -0.6 points taken alone, which is not decided among the study's tests"
    )


def test_an_adjusted_p_value_counts_and_not_the_tests_own():
    found = known(0.03, 0.0125)
    assert verdict(found) == "better"
    assert verdict(found, p_adjusted=0.06) == "undecided"


def test_holms_adjustment_agrees_with_a_published_example_along_any_axis():
    # Holm (1979): ordered p-values are multiplied by m, m-1, ... and made monotone.
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.stack([p, p[::-1]]))[1] == pytest.approx([0.02, 0.06, 0.06, 0.03])


def test_false_discovery_values_agree_with_the_published_example():
    # Benjamini & Hochberg (1995), section 4.1: of these 15 their procedure rejects four at 5%.
    trial = (0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324, 0.4262, 0.5719, 0.6528,
             0.759, 1.0)  # fmt: skip
    assert (false_discovery(trial) < 0.05).sum() == 4
    assert false_discovery([]).size == 0


def test_the_primaries_are_adjusted_among_themselves_whatever_else_is_explored():
    contrasts = [items(0.012, 0.1, seed=1), items(0.011, 0.1, seed=2), items(0.0, 0.1, seed=3)]
    alone = judge_primaries(contrasts)
    expected = holm([float(estimate(strata).p_value) for strata in contrasts])
    assert [one.p_adjusted for one in alone] == pytest.approx(list(expected))
    assert [one.verdict for one in alone] == ["better", "undecided", "undecided"]
    explore([known(0.05, 0.01)] * 50)
    assert judge_primaries(contrasts) == alone
    assert judge_primaries([]) == []


def test_a_benchmark_is_tested_only_behind_the_gate_of_its_primary():
    primaries = judge_primaries([items(0.03), items(0.0, 0.3)])
    assert [one.verdict for one in primaries] == ["better", "undecided"]
    opened, closed = judge_benchmarks(primaries, [[known(0.03, 0.005), known(0.0, 0.02)], [known(0.03, 0.005)]])
    assert [one.verdict for one in opened] == ["better", "undecided"]
    assert [(one.verdict, one.p_adjusted) for one in closed] == [("undecided", 1.0)]


def test_primaries_and_the_benchmarks_behind_them_are_two_families_and_each_errs_in_at_most_5_5_of_100():
    rng = np.random.default_rng(1)
    wrong = np.zeros((2000, 2), dtype=bool)
    for study in wrong:
        z = rng.normal(size=(2, 8))
        z[0, 0] += 60  # one benchmark of one primary is real, and opens its gate
        found = [[Estimate(v, v - 1.96, v + 1.96, 2 * norm.sf(abs(v)), 1.0, 1e9, v) for v in row] for row in z]
        means = [known(float(row.mean()), 8**-0.5) for row in z]
        primaries = [
            verdicts.Tested(mean, verdict(mean, 1e-9, p, 1.0), float(p), 1.0, 1e-9)
            for mean, p in zip(means, holm([mean.p_value for mean in means]), strict=True)
        ]
        (_, *others), behind = judge_benchmarks(primaries, found, 1e-9)
        study[:] = primaries[1].verdict != "undecided", any(one.verdict != "undecided" for one in (*others, *behind))
    assert (wrong.mean(axis=0) <= 0.055).all()
    assert wrong.any(axis=1).mean() <= 0.075, "together they err more than either, as the report says"


def test_looks_spend_alpha_as_published_and_no_more():
    # Lan & DeMets (1983), O'Brien-Fleming's type, four equal looks: 0.0001, 0.0056, 0.0236, 0.05 spent in all.
    assert np.cumsum(spent([1, 2, 3, 4])) == pytest.approx([0.0001, 0.0056, 0.0236, 0.05], abs=1e-4)
    assert sum(spent([3, 5, 8, 12])) == pytest.approx(0.05)


def test_a_look_decides_at_its_own_level_and_what_is_decided_stays():
    rng = np.random.default_rng(0)
    large = 0.2 + 0.01 * rng.normal(size=(8, 1, 200))
    turned = large.copy()
    turned[5:] = -0.2
    none = 0.05 * rng.normal(size=(8, 1, 200))
    none -= none.mean(axis=(1, 2), keepdims=True)
    first, second, third = judge_primaries(
        [[Stratum.of(each)] for each in (large, turned, none)], margin=0.0001, looks=(3, 5, 8, 12)
    )
    assert (first.verdict, first.replicates) == ("better", 3)
    assert (second.verdict, second.replicates) == ("better", 3), "later replicates do not take it back"
    assert (third.verdict, third.replicates) == ("undecided", 8)
    assert first.estimate.confidence == pytest.approx(1 - spent([3, 5, 8, 12])[0])


def test_a_contrast_is_written_treatment_minus_control():
    contrast = Contrast.parse("mft sparsity=0.1 - continued-fft")
    assert (contrast.treatment, contrast.control) == (("mft", "sparsity=0.1"), ("continued-fft",))
    assert str(contrast) == "mft sparsity=0.1 - continued-fft"
    for text in ("mft", "mft-fft", "mft - ", "mft - fft - lora", "mft - mft"):
        with pytest.raises(ValueError, match="write treatment - control"):
            Contrast.parse(text)

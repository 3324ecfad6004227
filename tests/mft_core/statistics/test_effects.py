"""The gain of a checkpoint and of a recipe, against published examples and another implementation of the model."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.contingency_tables import mcnemar

from mft_core.statistics.effects import (
    ORDINARY,
    Estimate,
    Over,
    Stratum,
    TooFewReplicatesError,
    UnitVariance,
    estimate,
    unit_variance,
)


def flips(won: int, lost: int, same: int) -> Stratum:
    return Stratum.of(np.repeat([1.0, -1.0, 0.0], [won, lost, same]))


def crossed(replicates: int, seeds: int, items: int, sds: dict[str, float], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shapes = {"replicate": (replicates, 1, 1), "seed": (replicates, seeds, 1), "item": (1, 1, items),
              "both": (replicates, 1, items), "rest": (replicates, seeds, items)}  # fmt: skip
    return 0.02 + sum(sds[name] * rng.normal(size=shape) for name, shape in shapes.items())


@pytest.mark.parametrize(("won", "lost"), [(36, 11), (3, 0), (7, 7), (101, 59), (0, 12), (0, 120)])
def test_the_p_value_of_one_training_is_that_of_mcnemars_exact_test(won: int, lost: int):
    expected = mcnemar([[300, won], [lost, 200]], exact=True).pvalue
    assert estimate([flips(won, lost, 500)]).p_value == pytest.approx(expected, rel=1e-9)


def test_a_published_example_of_mcnemars_test_is_met():
    # Agresti, Categorical Data Analysis: approval of the prime minister in two surveys, 1,600 people, 150 and 86
    # changed; published: p = 3.1e-5 (asymptotic), interval (-0.06, -0.02).
    found = estimate([flips(won=86, lost=150, same=1364)])
    assert found.p_value == pytest.approx(3.1e-5, rel=0.25)
    assert (round(found.low, 2), round(found.high, 2)) == (-0.06, -0.02)


def test_the_interval_of_few_items_is_the_published_one_of_bonett_and_price():
    # Fagerland, Lydersen & Laake (2014), airway hyper-responsiveness of 21 children: 1 and 7 changed; (-0.508, -0.013).
    # Theirs takes the normal's quantile and the n of the sample, ours Student's and n − 1.
    found = estimate([flips(won=1, lost=7, same=13)])
    normal = stats.norm.ppf(0.975) / stats.t.ppf(0.975, 20) * np.sqrt(20 / 21)
    half = (found.high - found.low) / 2 * normal
    assert (found.centre - half, found.centre + half) == pytest.approx((-0.508, -0.013), abs=0.002)


def test_numbers_of_one_training_have_students_t_test():
    # Darwin's plants (Fisher 1935, section 17): 15 differences in eighths of an inch, t = 2.148, interval excludes 0.
    plants = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], dtype=float)
    found, expected = estimate([Stratum.of(plants)]), stats.ttest_1samp(plants, 0)
    assert found.gain / found.standard_error == pytest.approx(2.148, abs=0.001)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.freedom == 14


def test_clusters_are_drawn_whole():
    rng = np.random.default_rng(0)
    of_prompt = rng.normal(size=100)
    prompts = np.repeat(np.arange(100), 4)
    found = estimate([Stratum.of(of_prompt[prompts], [f"prompt {i}" for i in prompts])])
    expected = stats.ttest_1samp(of_prompt, 0)
    assert found.gain == pytest.approx(of_prompt.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.freedom == 99
    alone = estimate([Stratum.of(of_prompt[prompts])])
    assert found.standard_error == pytest.approx(2 * alone.standard_error, rel=0.02)


def test_clusters_count_where_trainings_are_drawn_too():
    rng = np.random.default_rng(1)
    of_prompt = rng.normal(size=(4, 2, 100)) + rng.normal(size=100)
    prompts = np.repeat(np.arange(100), 4)
    for over in ("checkpoint", "recipe"):
        repeated = estimate([Stratum.of(of_prompt[..., prompts], prompts.tolist())], over)
        once = estimate([Stratum.of(of_prompt)], over)
        assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))


def test_the_mean_over_benchmarks_counts_each_alike_however_many_items_it_has():
    few, many = flips(30, 5, 65), flips(40, 60, 700)
    both = estimate([few, many])
    assert both.gain == pytest.approx((25 / 100 - 20 / 800) / 2)
    spread = np.hypot(few.differences.std() / 10, many.differences.std() / np.sqrt(800)) / 2
    assert both.standard_error == pytest.approx(spread, rel=0.03)
    with pytest.raises(ValueError, match="different replicates or seeds"):
        estimate([few, Stratum.of(np.zeros((2, 5)))])


@pytest.mark.parametrize(("replicates", "seeds"), [(5, 1), (5, 2), (10, 2)])
def test_a_recipe_has_the_estimates_of_statsmodels_mixed_model(replicates: int, seeds: int):
    values = crossed(replicates, seeds, 60, {"replicate": 0.1, "seed": 0.1, "item": 0.3, "both": 0.2, "rest": 0.3})
    _agree_with_mixed_model(values, "recipe")


def test_a_checkpoint_has_the_estimates_of_statsmodels_mixed_model():
    values = crossed(1, 6, 60, {"replicate": 0.0, "seed": 0.15, "item": 0.3, "both": 0.0, "rest": 0.3})
    _agree_with_mixed_model(values, "checkpoint")


def _agree_with_mixed_model(values: np.ndarray, over: Over) -> None:
    """Compare with REML's variance components, fitted by statsmodels; interval ends within 10% of the width."""
    units = values.mean(axis=1) if over == "recipe" else values[0]
    unit, item = np.indices(units.shape).reshape(2, -1)
    frame = pd.DataFrame({"gain": units.ravel(), "unit": unit, "item": item, "all": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = MixedLM.from_formula(
            "gain ~ 1", frame, groups="all", re_formula="0", vc_formula={"unit": "0 + C(unit)", "item": "0 + C(item)"}
        ).fit()
    found = estimate([Stratum.of(values)], over)
    half = stats.t.ppf(0.975, found.freedom) * fitted.bse["Intercept"]
    width = found.high - found.low
    assert found.gain == pytest.approx(fitted.params["Intercept"], abs=1e-6)
    assert found.low == pytest.approx(found.gain - half, abs=0.1 * width)
    assert found.high == pytest.approx(found.gain + half, abs=0.1 * width)


def test_a_recipe_of_fewer_than_three_replicates_is_refused():
    with pytest.raises(TooFewReplicatesError, match="2 replicates; a claim about the recipe needs 3"):
        estimate([Stratum.of(np.zeros((2, 1, 10)))], "recipe")


def test_units_that_agree_by_luck_do_not_make_the_interval_narrower_than_the_items_do():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 1, 400))
    values -= values.mean(axis=-1, keepdims=True)
    found = estimate([Stratum.of(values)], "recipe", prior=UnitVariance(0.0, 20.0))
    of_items = stats.t.ppf(0.975, 399) * values.mean(axis=(0, 1)).std() / np.sqrt(399)
    assert (found.high - found.low) / 2 >= of_items * (1 - 1e-6)
    assert (found.high - found.low) / 2 == pytest.approx(of_items, rel=0.02)


def test_without_earlier_studies_ordinary_trainings_stand_in_where_units_seem_not_to_differ_and_only_there():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 1, 400))
    alike = [Stratum.of(values - values.mean(axis=-1, keepdims=True))]
    assert estimate(alike, "recipe") == estimate(alike, "recipe", prior=ORDINARY)
    apart = [Stratum.of(values + np.array([-1.0, 0.0, 1.0])[:, None, None])]
    of_units = apart[0].differences.mean(axis=-1).std(ddof=1) / np.sqrt(3)
    assert estimate(apart, "recipe").standard_error == pytest.approx(of_units, rel=0.01)


def test_what_ordinary_trainings_add_fades_as_units_differ_more_and_leaves_no_step():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 1, 400))
    values -= values.mean(axis=-1, keepdims=True)
    sizes = np.linspace(0, 0.3, 301)
    halves = []
    for size in sizes:
        found = estimate([Stratum.of(values + size * np.array([-1.0, 0.0, 1.0])[:, None, None])], "recipe")
        halves.append((found.high - found.low) / 2)
    steps = np.abs(np.diff(halves))
    assert steps.max() < 0.05 * max(halves)


def test_what_trainings_differ_by_is_the_same_number_of_one_benchmark_and_of_the_mean_of_many():
    rng = np.random.default_rng(2)
    shared = 0.3 * rng.normal(size=(40, 1, 1))
    parts = [Stratum.of(shared + rng.normal(size=(40, 1, 200))) for _ in range(8)]
    one, many = unit_variance(parts[:1], "recipe"), unit_variance(parts, "recipe")
    assert one is not None
    assert many is not None
    assert many.relative == pytest.approx(one.relative, rel=0.25)


def test_many_units_that_hardly_differ_are_believed_more_than_what_is_ordinary():
    rng = np.random.default_rng(0)
    many = rng.normal(size=(12, 1, 3_000))
    of_units = many.mean(axis=(1, 2)).std(ddof=1) / np.sqrt(12)
    ordinary = estimate([Stratum.of(many)], "recipe", prior=ORDINARY).standard_error
    found = estimate([Stratum.of(many)], "recipe").standard_error
    assert of_units < found < 1.6 * of_units < ordinary


def test_what_earlier_studies_measured_is_pooled_with_what_this_one_measures():
    values = crossed(3, 1, 400, {"replicate": 0.0, "seed": 0.0, "item": 0.1, "both": 0.1, "rest": 0.3})
    alone = estimate([Stratum.of(values)], "recipe")
    earlier = crossed(61, 1, 400, {"replicate": 0.1, "seed": 0.0, "item": 0.1, "both": 0.1, "rest": 0.3}, seed=1)
    measured = unit_variance([Stratum.of(earlier)], "recipe")
    assert measured is not None
    assert measured.freedom == 60
    pooled = estimate([Stratum.of(values)], "recipe", prior=UnitVariance.pooled([measured]))
    assert pooled.freedom > alone.freedom
    assert pooled.standard_error == pytest.approx(np.sqrt(20 / 22) * 0.1 / np.sqrt(3), rel=0.15)
    assert UnitVariance.pooled([]) is None
    assert UnitVariance.pooled([measured]).freedom == 20, "so that a study can overrule the earlier ones"
    assert unit_variance([Stratum.of(values)], "checkpoint") is None


def test_the_interval_of_a_choice_among_several_is_wider():
    values = crossed(3, 1, 400, {"replicate": 0.1, "seed": 0.0, "item": 0.1, "both": 0.1, "rest": 0.3})
    one, of_eight = (estimate([Stratum.of(values)], "recipe", chosen_from=count) for count in (1, 8))
    assert of_eight.high - of_eight.low > 1.5 * (one.high - one.low)
    assert of_eight.p_value > one.p_value


def test_the_smallest_detectable_gain_is_found_in_four_of_five_studies():
    rng = np.random.default_rng(0)
    found = estimate([Stratum.of(rng.normal(size=(4000, 1, 1, 40)) + 0.45)])
    assert np.mean(found.p_value < 0.05) == pytest.approx(0.8, abs=0.02)
    assert np.mean(found.detectable) == pytest.approx(0.45, abs=0.01)


def test_equivalence_is_claimed_at_the_margin_in_one_of_twenty_studies():
    rng = np.random.default_rng(0)
    found: Estimate = estimate([Stratum.of(rng.normal(size=(4000, 1, 1, 100)) + 1.0)])
    assert np.mean(found.p_equivalence(1.0) < 0.05) == pytest.approx(0.05, abs=0.01)
    assert np.mean(found.p_equivalence(1.5) < 0.05) > 0.95


def test_outcomes_that_do_not_differ_are_no_result():
    found = estimate([Stratum.of(np.zeros(3))])
    assert (found.gain, found.p_value) == (0, 1)
    assert found.low < 0 < found.high, "that three items are equal does not say that all are"


@pytest.mark.parametrize("count", [2, 3, 10])
def test_numbers_that_do_not_vary_have_the_sign_test(count: int):
    gained, same = estimate([Stratum.of(np.full(count, 0.2))]), estimate([Stratum.of(np.zeros(count))])
    assert gained.p_value == stats.binomtest(count, count).pvalue
    assert gained.p_equivalence(0.3) == stats.binomtest(count, count, alternative="greater").pvalue
    assert gained.p_equivalence(0.1) == 1
    assert same.p_value == 1


@pytest.mark.parametrize(
    "strata",
    [
        [Stratum.of([gain]) for gain in (0.9, -0.1, 0.2, 0.3, -0.15, 0.2)],
        [Stratum.of([0.9, -0.1, 0.2, 0.3, -0.15, 0.2], subjects=range(6))],
        [Stratum.of(np.full(10, 0.3)), Stratum.of(np.full(10, -0.1))],
        [Stratum.of(np.stack([np.full((1, 10), 0.4), np.full((1, 10), -0.2)]))],
        [Stratum.of(np.full(10, 0.1)), Stratum.of(np.full(10, 0.2)), Stratum.of(np.full(10, -0.3))],
        [Stratum.of(np.full((1, 3, 10), 0.2))],
        [Stratum.of(np.full(1, 0.2))],
        [Stratum.of(np.full(5, 0.2), clusters=["one"] * 5)],
    ],
    ids=["benchmarks", "subjects", "two sides", "two fine-tunings", "nothing", "seeds", "one item", "one cluster"],
)
def test_without_a_spread_nothing_is_claimed_of_several_benchmarks_or_trainings_or_of_one_item(strata: list[Stratum]):
    found = estimate(strata)
    assert (found.standard_error, found.p_value) == (0, 1)
    assert found.p_equivalence(10.0) >= 0.5


def test_trainings_that_are_alike_to_the_last_item_claim_nothing_of_the_recipe():
    assert estimate([Stratum.of(np.full((3, 1, 10), 0.2))], "recipe").p_value == 1


def test_subjects_count_alike_whatever_their_number_of_items():
    rng = np.random.default_rng(3)
    parts = [rng.normal(0.1 * at, 1, size=count) for at, count in enumerate((20, 50, 200))]
    names = np.repeat(["algebra", "geometry", "precalculus"], [20, 50, 200])
    order = rng.permutation(270)
    found = estimate([Stratum.of(np.concatenate(parts)[order], subjects=names[order].tolist())])
    assert found.gain == pytest.approx(np.mean([part.mean() for part in parts]))
    assert found.standard_error == pytest.approx(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / 3)
    beside = estimate([Stratum.of(np.zeros(10)), Stratum.of(np.concatenate(parts)[order], None, names[order].tolist())])
    assert beside.gain == pytest.approx(found.gain / 2)  # three subjects are one benchmark beside another


def test_one_subject_is_the_benchmark_itself():
    differences = np.repeat([1.0, -1.0, 0.0], [9, 2, 30])
    assert estimate([Stratum.of(differences, subjects=["algebra"] * 41)]) == estimate([Stratum.of(differences)])

"""The best of a sweep: chosen on halves of the items, reported on the others; how often it errs: test_coverage."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from mft_core.statistics.effects import Stratum, UnitVariance, estimate
from mft_core.statistics.winner import MEAN, Entry, best_of_sweeps, half, winner

N = 200
ITEMS = tuple(f"gcd/{index}" for index in range(N))
FFT = np.repeat([1, 0], N // 2)


def better_on(items: np.ndarray, gain: int) -> np.ndarray:
    """Return FFT's outcomes with so many of its wrong ones among these items made right."""
    answers = FFT.copy()
    answers[np.flatnonzero(items & (FFT == 0))[:gain]] = 1
    return answers


def entry(answers: Any, sparsity: float, items: tuple[str, ...] = ITEMS, **columns: Any) -> Entry:
    benchmark = items[0].split("/")[0]
    described = {"method": "mft", "domain": "maths", "variant": f"mft sparsity={sparsity:g}", "sparsity": sparsity}
    return Entry({**described, **columns}, benchmark, items, differences(answers))


def differences(answers: Any) -> Stratum:
    return Stratum.of(np.asarray(answers) - FFT)


def halves(benchmarks: int = 1, splits: int = 1) -> list[list[np.ndarray]]:
    return [[half(ITEMS, split)] * benchmarks for split in range(splits)]


def test_the_halves_depend_on_the_items_names_alone_and_are_equally_large():
    chosen = half(ITEMS)
    assert chosen.sum() == N // 2
    assert half(ITEMS[:7]).sum() == 3
    clustered = half(["a"] * 3 + ["b"] * 4 + ["c"])
    assert len({*clustered[:3]}) == len({*clustered[3:7]}) == 1, "no cluster is cut in two"
    order = np.random.default_rng(0).permutation(N)
    assert (half([ITEMS[index] for index in order]) == chosen[order]).all()
    assert 60 < (half(ITEMS, seed=1) == chosen).sum() < 140, "another seed is another half, unrelated to the first"


def test_the_best_on_one_half_is_reported_with_its_gain_on_the_other_and_the_reverse():
    chosen = half(ITEMS)
    steady, lucky = better_on(np.ones(N, dtype=bool), 12), better_on(chosen, 20)
    best = winner([[differences(steady)], [differences(lucky)]], halves())
    # lucky is best on the first half, with nothing on the second, on which steady is best
    of_steady = differences(steady).differences.ravel()
    assert best.gain_where_chosen == pytest.approx((20 / 100 + of_steady[~chosen].mean()) / 2)
    assert best.reported.gain == pytest.approx((0 + of_steady[chosen].mean()) / 2)
    assert best.optimism == pytest.approx(best.gain_where_chosen - best.reported.gain)
    assert (best.naive_index, best.naive_gain) == (1, pytest.approx(20 / 200))
    assert best.chosen == 0.5


def test_of_one_split_the_p_value_is_twice_the_median_and_the_interval_that_of_half_the_error():
    answers = better_on(np.ones(N, dtype=bool), 12)
    chosen = half(ITEMS)
    best = winner([[differences(answers)], [differences(FFT)]], halves())
    both = [estimate([differences(answers).items(part)], confidence=0.975) for part in (chosen, ~chosen)]
    assert best.reported.p_value == pytest.approx(min(1, 2 * np.median([one.p_value for one in both])))
    assert best.reported.low == pytest.approx(np.median([one.low for one in both]))
    assert (best.index, best.chosen) == (0, 1.0)


def test_more_splits_make_the_answer_depend_less_on_which():
    rng = np.random.default_rng(0)
    candidates = [[differences(np.where(rng.random(N) < 0.15, 1 - FFT, FFT))] for _ in range(6)]

    def spread(splits: int) -> float:
        gains = [winner(candidates, [[half(ITEMS, 100 * at + split)] for split in range(splits)]).reported.gain
                 for at in range(12)]  # fmt: skip
        return float(np.std(gains))

    assert spread(25) < 0.4 * spread(1)


def test_the_best_over_several_benchmarks_is_that_of_the_highest_mean_gain():
    one, other = better_on(np.ones(N, dtype=bool), 10), better_on(np.ones(N, dtype=bool), 16)
    candidates = [[differences(FFT), differences(one)], [differences(other), differences(other)]]
    best = winner(candidates, halves(2, 5))
    assert (best.index, best.naive_index) == (1, 1)
    assert best.naive_gain == pytest.approx(16 / N)


def sweep(**columns: Any) -> list[Entry]:
    sums = tuple(item.replace("gcd", "sums") for item in ITEMS)
    everywhere = np.ones(N, dtype=bool)
    return [
        entry(better_on(everywhere, gain + len(items[0])), sparsity, items, **columns)
        for sparsity, gain in ((0.1, 20), (0.2, 5), (0.3, 0))
        for items in (ITEMS, sums)
    ]


def rows_by_benchmark(entries: list[Entry]) -> Mapping[str, dict[str, Any]]:
    return {row["benchmark"]: row for row in best_of_sweeps(entries)}


def test_a_sweep_has_a_winner_on_each_benchmark_and_one_on_their_mean():
    rows = rows_by_benchmark(sweep())
    assert list(rows) == ["gcd", "sums", MEAN]
    for row in rows.values():
        assert (row["variant"], row["sparsity"], row["candidates"], row["varied"]) == (
            "mft sparsity=0.1", 0.1, 3, ["sparsity"],
        )  # fmt: skip
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
        assert row["optimism"] == pytest.approx(row["gain_where_chosen"] - row["gain"])
    assert (rows["gcd"]["n"], rows[MEAN]["n"]) == (200, 400)
    assert rows[MEAN]["gain"] == pytest.approx((rows["gcd"]["gain"] + rows["sums"]["gain"]) / 2)
    expected = multipletests([row["p_value"] for row in rows.values()], method="holm")[1]
    assert [row["p_holm"] for row in rows.values()] == pytest.approx(list(expected))
    json.dumps(list(rows.values()), allow_nan=False)


def test_methods_and_domains_are_sweeps_of_their_own_and_one_variant_is_none():
    entries = sweep() + sweep(domain="code") + sweep(method="random") + [entry(FFT, 0.1, method="magnitude")]
    found = [(row["method"], row["domain"], row["benchmark"]) for row in best_of_sweeps(entries)]
    assert found == [
        (method, domain, benchmark)
        for method, domain in (("mft", "maths"), ("mft", "code"), ("random", "maths"))
        for benchmark in ("gcd", "sums", MEAN)
    ]
    assert best_of_sweeps([entry(FFT, 0.1)]) == []


def test_variants_that_answered_other_questions_are_not_chosen_among():
    prompts = tuple(f"{item}/8-shot" for item in ITEMS)
    assert best_of_sweeps([entry(FFT, 0.1), entry(FFT, 0.2, prompts)]) == []


def test_variants_that_differ_in_their_name_alone_are_named():
    pair = [entry(FFT, 0.1, variant=name) for name in ("mft one", "mft other")]
    (row,) = best_of_sweeps(pair)
    assert (row["varied"], row["variant"], row["verdict"]) == (["variant"], "mft one", "undecided")


def test_the_noise_of_seeds_is_that_of_the_luckiest_of_the_candidates():
    rng = np.random.default_rng(0)
    answers = [np.where(rng.random((3, N)) < 0.1 * seed, 1, FFT) for seed in (1, 2, 3)]
    candidates = [[differences(each)] for each in answers]
    best = winner(candidates, halves())
    alone = winner(candidates[best.index : best.index + 1], halves())
    assert best.reported.gain == alone.reported.gain
    assert best.reported.p_value >= alone.reported.p_value
    assert best.reported.high - best.reported.low > alone.reported.high - alone.reported.low


def changed(rng: np.random.Generator, seeds: int, gain: float, **columns: Any) -> list[Entry]:
    """Return two variants with so many seeds, each of which truly gains so much on FFT's wrong answers."""
    return [
        replace(entry(FFT, sparsity, **columns), stratum=Stratum((rng.random((1, seeds, N)) < gain) * (1.0 - FFT)))
        for sparsity in (0.1, 0.2)
    ]


def test_methods_of_other_numbers_of_seeds_contest_each_other():
    rng = np.random.default_rng(0)
    one = changed(rng, 1, 0.5, method="any", mask="magnitude")
    (row,) = best_of_sweeps([*one, *changed(rng, 2, 0.0, method="any", mask="mft")])
    assert (row["candidates"], row["mask"], row["verdict"]) == (4, "magnitude", "better")


def test_each_candidate_is_judged_by_what_is_known_of_its_own_trainings():
    rng = np.random.default_rng(0)
    quiet = changed(rng, 2, 0.5, method="any", mask="mft")
    noisy = [replace(one, prior=UnitVariance(2.0, 9)) for one in changed(rng, 2, 0.1, method="any", mask="random")]
    (row,), (reverse,) = best_of_sweeps([*quiet, *noisy]), best_of_sweeps([*noisy, *quiet])
    assert row["mask"] == reverse["mask"] == "mft"
    assert [row[end] for end in ("gain_low", "gain_high")] == [reverse[end] for end in ("gain_low", "gain_high")]

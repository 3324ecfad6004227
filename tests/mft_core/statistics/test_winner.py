"""The best of a sweep: chosen on one half of the items, reported on the other; how often it errs: test_coverage."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from mft_core.statistics.comparison import Pairs, compare
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
    return Entry({**described, **columns}, benchmark, items, Pairs.of(FFT, answers), None)


def test_the_halves_depend_on_the_items_names_alone_and_are_equally_large():
    chosen = half(ITEMS)
    assert chosen.sum() == N // 2
    assert half(ITEMS[:7]).sum() == 3
    order = np.random.default_rng(0).permutation(N)
    assert (half([ITEMS[index] for index in order]) == chosen[order]).all()
    assert 60 < (half(ITEMS, seed=1) == chosen).sum() < 140, "another seed is another half, unrelated to the first"


def test_the_best_on_one_half_is_reported_with_its_gain_on_the_other():
    chosen = half(ITEMS)
    steady, lucky = better_on(np.ones(N, dtype=bool), 12), better_on(chosen, 20)
    best = winner([[Pairs.of(FFT, steady)], [Pairs.of(FFT, lucky)]], [chosen])
    assert (best.index, best.chosen_on) == (1, 100)
    assert best.gain_where_chosen == pytest.approx(20 / 100)
    assert best.reported == compare([Pairs.of(FFT[~chosen], lucky[~chosen])])
    assert (best.reported.gain, best.reported.n) == (0, 100)
    assert best.optimism == pytest.approx(0.2)
    assert (best.naive_index, best.naive_gain) == (1, pytest.approx(20 / 200))


def test_the_best_over_several_benchmarks_is_that_of_the_highest_mean():
    chosen = half(ITEMS)
    one, other = better_on(chosen, 10), better_on(~chosen, 10)
    candidates = [[Pairs.of(FFT, FFT), Pairs.of(FFT, one)], [Pairs.of(FFT, other), Pairs.of(FFT, other)]]
    best = winner(candidates, [chosen, chosen])
    assert best.index == 0
    assert best.gain_where_chosen == pytest.approx(0.05)
    assert best.reported.gain == 0
    assert best.naive_index == 1


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
    assert (rows["gcd"]["n_chosen_on"], rows["gcd"]["n"]) == (100, 100)
    assert (rows[MEAN]["n_chosen_on"], rows[MEAN]["n"]) == (200, 200)
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
    assert (row["varied"], row["variant"], row["verdict"]) == (["variant"], "mft one", "identical")


def test_the_noise_of_seeds_is_that_of_the_luckiest_of_the_candidates():
    rng = np.random.default_rng(0)
    answers = [np.where(rng.random((3, N)) < 0.1 * seed, 1, FFT) for seed in (1, 2, 3)]
    candidates = [[Pairs.of(FFT, each)] for each in answers]
    best = winner(candidates, [half(ITEMS)])
    plain = compare([candidates[best.index][0].items(~half(ITEMS))])
    assert best.reported.gain == plain.gain
    assert best.reported.p_value >= plain.p_value
    assert best.reported.gain_high - best.reported.gain_low >= plain.gain_high - plain.gain_low


def test_where_less_is_better_the_best_is_the_lowest():
    better, worse = FFT.copy(), FFT.copy()
    better[:40], worse[-40:] = 0, 1  # fewer bad answers, and more
    rows = best_of_sweeps([
        Entry({**entry(answers, sparsity).columns}, "gcd", ITEMS, Pairs.of(FFT, answers, higher_is_better=False), None)
        for answers, sparsity in ((worse, 0.1), (better, 0.2), (FFT, 0.3))
    ])  # fmt: skip
    assert [(row["variant"], row["verdict"]) for row in rows] == [("mft sparsity=0.2", "better")]
    assert rows[0]["gain"] > 0 > rows[0]["accuracy"] - rows[0]["baseline"]

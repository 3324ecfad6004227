"""The table shows every row: whatever a study varies becomes a column, and no two rows share a cell."""

from __future__ import annotations

from typing import Any

import pytest

from mft_core.statistics.tables import apart, cells, markdown, pooled


def row(method: str, accuracy: float, benchmark: str = "sums", **columns: Any) -> dict[str, Any]:
    """Return a row as the stage `compare` writes it."""
    empty = dict.fromkeys(("layers", "modules", "sparsity", "seed", "gain"))
    described = {"variant": method, "method": method, "domain": "maths", "benchmark": benchmark, "n": 100}
    return {**empty, **described, "seeds": 1, "accuracy": accuracy, **columns}


def mask(accuracy: float, **columns: Any) -> dict[str, Any]:
    masked = {"layers": "2-5", "modules": "both", "sparsity": 0.1, "seed": 0}
    return row("mft", accuracy, **{**masked, **columns})


RATE, FRACTION = "mask.training.learning_rate", "data.fraction"


def test_whatever_a_study_varies_is_a_column_and_every_row_has_a_line_of_its_own():
    rates = [mask(0.1 * i, **{RATE: rate}, variant=f"mft rate={rate}") for i, rate in enumerate((1e-3, 3e-3, 1e-2))]
    header, lines = cells([row("fft", 0.9), *rates])
    assert header == ["method", RATE, "sparsity", "seed", "sums (n = 100)"]
    assert lines == [
        ["FFT", "-", "-", "-", "90.0"],
        ["MFT", "0.001", "10%", "0", "0.0"],
        ["MFT", "0.003", "10%", "0", "10.0"],
        ["MFT", "0.01", "10%", "0", "20.0"],
    ]


def test_a_setting_of_one_variant_only_is_told_from_the_variant_without_it():
    header, lines = cells([mask(0.5), mask(0.6, **{FRACTION: 0.5}, variant="mft fraction=0.5")])
    assert header[1] == FRACTION
    assert [line[1] for line in lines] == ["-", "0.5"]


def test_a_setting_that_is_the_same_everywhere_is_no_column():
    header, _ = cells([mask(0.5, **{RATE: 1e-3}), mask(0.6, sparsity=0.2, **{RATE: 1e-3})])
    assert header == ["method", "sparsity", "seed", "sums (n = 100)"]


def test_variants_that_differ_in_their_name_alone_are_named():
    header, lines = cells([mask(0.5, variant="mft one"), mask(0.6, variant="mft other")])
    assert header[:2] == ["method", "variant"]
    assert [line[1] for line in lines] == ["mft one", "mft other"]


def test_two_rows_for_one_cell_are_an_error_and_never_one_of_them():
    with pytest.raises(ValueError, match="two rows for variant 'mft' on benchmark 'sums'"):
        cells([mask(0.5), mask(0.6)])


def test_the_seeds_of_each_setting_are_pooled_apart_from_the_others():
    rows = [
        mask(0.5, **{RATE: rate}, seed=seed, variant=f"mft {'' if seed == 'all' else f'seed={seed} '}rate={rate}")
        for rate, seeds in ((1e-3, (0, 1, "all")), (1e-2, (0,)))
        for seed in seeds
    ]
    assert [(r[RATE], r["seed"]) for r in pooled(rows)] == [(1e-3, "all"), (1e-2, 0)]
    assert [(r[RATE], r["seed"]) for r in apart(rows)] == [(1e-3, 0), (1e-3, 1)]
    assert len(cells(pooled(rows))[1]) == 2


def winner(**columns: Any) -> dict[str, Any]:
    """Return the winner of a sweep as the stage `compare` writes it."""
    shares = {"gain": 0.012, "gain_low": -0.004, "gain_high": 0.028, "gain_where_chosen": 0.03, "optimism": 0.018}
    described = {"method": "mft", "domain": "maths", "variant": "mft sparsity=0.1", "sparsity": 0.1, "layers": "2-5"}
    chosen = {"benchmark": "sums", "candidates": 5, "varied": ["sparsity"], "chosen": 0.62, "n": 2001}
    noise = {"verdict": "undecided", "naive_variant": "mft sparsity=0.1", "naive_gain": 0.021}
    return {**shares, **described, **chosen, **noise, **columns}


def test_the_winner_of_a_sweep_stands_with_what_was_chosen_where_and_what_it_looked_like():
    table = markdown([row("fft", 0.9, commonest_target_share=None, family=None)], "Which?", winners=[winner()])
    assert (
        "| MFT | sums (n = 2,001) | sparsity 10% (of 5; 62%) | +3.0 | +1.2 [-0.4, +2.8] undecided | +1.8 | +2.1 |"
        in table
    )


def test_winners_of_several_domains_name_theirs_and_another_naive_choice_is_said_to_be_one():
    other = winner(domain="code", varied=["sparsity", "layers"], naive_variant="mft sparsity=0.2")
    table = markdown([row("fft", 0.9, commonest_target_share=None, family=None)], "Which?", winners=[winner(), other])
    assert "| MFT | code | sums (n = 2,001) | sparsity 10%, layers 2-5 (of 5; 62%) | +3.0 |" in table
    assert "| +2.1 (another one) |" in table


def test_the_smallest_gain_that_would_have_been_found_is_told_where_something_is_undecided():
    compared = {"baseline": 0.5, "gain_low": 0.0, "gain_high": 0.1, "family": "exploratory"}
    rows = [
        {**mask(0.5, benchmark=benchmark, sparsity=sparsity, variant=f"mft sparsity={sparsity}", gain=0.01), **compared,
         "commonest_target_share": None, "verdict": verdict, "detectable": detectable}
        for sparsity, benchmark, verdict, detectable in (
            (0.1, "sums", "undecided", 0.0234), (0.1, "gcd", "better", 0.02),
            (0.2, "sums", "undecided", 0.03), (0.2, "gcd", "equivalent", 0.005),
            (0.4, "sums", "better", 0.01), (0.4, "gcd", "worse", 0.01),
        )
    ]  # fmt: skip
    page = markdown(rows, "How much?")
    section = page[page.index("### What could have been found") :]
    assert "| MFT | 10% | 0 | 2.3 | better |" in section
    assert "| MFT | 20% | 0 | 3.0 | equivalent |" in section
    assert "| MFT | 40%" not in section


def test_the_declared_contrasts_stand_first_with_what_they_say():
    contrast = {"contrast": "mft - fft", "domain": "maths", "gain": 0.001, "gain_low": -0.004, "gain_high": 0.006,
                "verdict": "equivalent", "p_holm": 0.7, "sentence": "no gain above 0.6 points",
                "confidence": 0.95, "replicates": 3}  # fmt: skip
    rows = [row("fft", 0.9, commonest_target_share=None, family=None)]
    page = markdown(rows, "Does it?", contrasts=[{**contrast, "family": "primary", "benchmark": "mean"}])
    line = "| mft - fft | primary | mean | +0.1 [-0.4, +0.6] equivalent | 0.7 | no gain above 0.6 points |"
    assert line in page
    assert page.index(line) < page.index("### All variants") < page.index("| FFT |")
    of_a_look = {**contrast, "family": "primary", "benchmark": "mean", "confidence": 0.999911}
    page = markdown(rows, "Does it?", contrasts=[of_a_look])
    assert "+0.1 [-0.4, +0.6] equivalent (99.99% interval, 3 fine-tunings)" in page

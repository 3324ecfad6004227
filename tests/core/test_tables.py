"""The table shows every row: whatever a study varies becomes a column, and no two rows share a cell."""

from __future__ import annotations

from typing import Any

import pytest

from mft_core.tables import apart, cells, pooled


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


def test_the_figure_has_a_place_for_each_value_of_what_is_varied():
    from mft_core.figures import _axis

    rates = [mask(0.5, **{RATE: rate}, variant=f"mft rate={rate}") for rate in (1e-3, 3e-3, 1e-2)]
    axis = _axis([row("fft", 0.9), *rates])
    assert (axis.column, axis.places) == (RATE, {1e-3: 0.0, 3e-3: 1.0, 1e-2: 2.0})

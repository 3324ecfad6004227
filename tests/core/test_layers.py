from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft_core.errors import ConfigError
from mft_core.layers import format_layers, parse_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("20-23", (20, 21, 22, 23)),
        ("0,3,8-11", (0, 3, 8, 9, 10, 11)),
        (" 8-9, 3 ", (3, 8, 9)),
        ("last:4", (28, 29, 30, 31)),
        ("middle:4", (14, 15, 16, 17)),
        ("all", tuple(range(32))),
        ("7", (7,)),
    ],
)
def test_layer_text_means_these_indices(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 32) == layers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("30-33", "layer 33 is outside the model, which has 32 layers; valid: 0 to 31"),
        ("5-2", "the range '5-2' is reversed; write '2-5'"),
        ("0-4,4-6", "layer 4 is named twice"),
        ("3,3", "layer 3 is named twice"),
        ("last:33", "valid: last:1 to last:32"),
        ("middle:0", "valid: middle:1 to middle:32"),
        ("first:4", "cannot read 'first:4'; valid: 'all', 'last:N'"),
        ("", "cannot read ''"),
        ("1,,2", "cannot read ''"),
        ("-1", "cannot read '-1'"),
        ("1.5", "cannot read '1.5'"),
    ],
)
def test_wrong_layers_are_refused_with_the_value_and_what_is_valid(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_layers(text, 32)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"layers = '{text}'")


@given(st.sets(st.integers(0, 31), min_size=1))
def test_the_canonical_text_reads_back_as_the_same_layers(layers: set[int]) -> None:
    assert parse_layers(format_layers(tuple(layers)), 32) == tuple(sorted(layers))


def test_the_canonical_text_joins_neighbours() -> None:
    assert format_layers((11, 0, 3, 8, 9, 10)) == "0,3,8-11"

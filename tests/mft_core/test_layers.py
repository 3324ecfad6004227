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
        ("9" * 5000, "cannot read '999"),
        ("last:" + "9" * 5000, "cannot read 'last:999"),
        ("٣", "cannot read '٣'"),
    ],
)
def test_wrong_layers_are_refused_with_the_value_and_what_is_valid(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_layers(text, 32)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"layers = '{text}'")


@st.composite
def _some_layers(draw: st.DrawFn) -> tuple[int, set[int]]:
    """A number of layers, and some of them."""
    n_layers = draw(st.integers(1, 200))
    return n_layers, draw(st.sets(st.integers(0, n_layers - 1), min_size=1))


@st.composite
def _written_out(draw: st.DrawFn) -> tuple[str, int, tuple[int, ...]]:
    """Indices and ranges in any order and with any spaces: the text, the number of layers, and what it means."""
    n_layers, chosen = draw(_some_layers())
    parts, rest = [], sorted(chosen)
    while rest:
        run = next((length for length in range(1, len(rest)) if rest[length] != rest[0] + length), len(rest))
        taken = draw(st.integers(1, run))
        whole = f"{rest[0]}-{rest[taken - 1]}"
        parts.append(draw(st.sampled_from([str(rest[0]), whole])) if taken == 1 else whole)
        rest = rest[taken:]
    space = st.sampled_from(["", " ", "  ", "\t"])
    shuffled = draw(st.permutations(parts))
    return ",".join(draw(space) + part + draw(space) for part in shuffled), n_layers, tuple(sorted(chosen))


@given(_some_layers())
def test_the_canonical_text_reads_back_as_the_same_layers(some: tuple[int, set[int]]) -> None:
    n_layers, layers = some
    assert parse_layers(format_layers(tuple(layers)), n_layers) == tuple(sorted(layers))


@given(_written_out())
def test_indices_and_ranges_mean_the_layers_they_name_in_any_order(
    written: tuple[str, int, tuple[int, ...]],
) -> None:
    text, n_layers, layers = written
    assert parse_layers(text, n_layers) == layers


@given(st.data(), st.integers(1, 200))
def test_groups_are_that_many_neighbours_where_they_are_said_to_be(data: st.DataObject, n_layers: int) -> None:
    count = data.draw(st.integers(1, n_layers))
    last, middle = parse_layers(f"last:{count}", n_layers), parse_layers(f"middle:{count}", n_layers)
    assert last == tuple(range(n_layers - count, n_layers))
    assert middle == tuple(range(middle[0], middle[0] + count))
    assert (n_layers - 1 - middle[-1]) - middle[0] in (0, 1)
    assert parse_layers("all", n_layers) == parse_layers(f"last:{n_layers}", n_layers) == tuple(range(n_layers))


@given(st.text(st.sampled_from("0123456789-,: alstmide"), max_size=12) | st.text(max_size=8), st.integers(1, 40))
def test_any_text_means_layers_of_the_model_or_is_a_configuration_error(text: str, n_layers: int) -> None:
    try:
        layers = parse_layers(text, n_layers)
    except ConfigError:
        return
    assert layers == tuple(sorted(set(layers)))
    assert set(layers) <= set(range(n_layers))
    assert parse_layers(format_layers(layers), n_layers) == layers


def test_the_canonical_text_joins_neighbours() -> None:
    assert format_layers((11, 0, 3, 8, 9, 10)) == "0,3,8-11"

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom
from torch import Tensor

from mft_core.errors import ConfigError
from mft_core.masks.algebra import complement, difference, intersection, jaccard, overlap, union
from mft_core.masks.mask_file import Mask, load_mask, make_mask, save_mask
from mft_core.masks.sites import Site
from tests.mft_core.masks.test_mask_file import make_tiny_mask

_SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (3, 5),
    "model.layers.0.mlp.up_proj.weight": (8, 2),
    "model.layers.1.self_attn.q_proj.weight": (1, 1),
    "model.layers.2.mlp.experts.down_proj[0]": (2, 7),
    "model.layers.2.mlp.experts.down_proj[1]": (2, 7),
}
_NAMES = list(_SHAPES)


def make(
    removed: Mapping[str, Tensor], modules: str = "both", base: float = 1.0, rewound_to: float | None = None
) -> Mask:
    """Return a mask that removes where `removed` is True, of base weights that are all `base`."""
    sites = [Site(name, int(name.split(".")[2]), "x", "mlp", "x", name) for name in removed]
    kept = {name: ~removed[name] for name in removed}
    weights = [(name, torch.full(removed[name].shape, base)) for name in removed]
    share = sum(int(tensor.sum()) for tensor in removed.values()) / sum(tensor.numel() for tensor in removed.values())
    earlier = None if rewound_to is None else [(name, torch.full_like(old, rewound_to)) for name, old in weights]
    return make_mask(sites, kept, weights, sparsity=share, selector="random", modules=modules, scope="combined",
                     rewound_to=earlier)  # fmt: skip


@st.composite
def masks(draw: st.DrawFn, names: st.SearchStrategy[list[str]] = st.just(_NAMES)) -> Mask:  # noqa: B008
    drawn = {}
    for name in draw(names):
        size = int(np.prod(_SHAPES[name]))
        bits = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        drawn[name] = torch.tensor(bits).view(_SHAPES[name])
    return make(drawn)


some_masks = masks(st.lists(st.sampled_from(_NAMES), min_size=1, unique=True))


def removed(mask: Mask) -> dict[str, list[int]]:
    """Return the flat indices of what is removed of every matrix."""
    return {name: (~kept).flatten().nonzero().flatten().tolist() for name, kept in mask.kept.items()}


def everywhere(mask: Mask) -> set[tuple[str, int]]:
    """Return what is removed as one set."""
    return {(name, index) for name, indices in removed(mask).items() for index in indices}


@given(masks(), masks())
def test_the_operations_are_those_on_the_sets_of_removed_weights(a: Mask, b: Mask) -> None:
    assert everywhere(union(a, b)) == everywhere(a) | everywhere(b)
    assert everywhere(intersection(a, b)) == everywhere(a) & everywhere(b)
    assert everywhere(difference(a, b)) == everywhere(a) - everywhere(b)
    assert everywhere(complement(a)).isdisjoint(everywhere(a))
    assert len(everywhere(complement(a))) + len(everywhere(a)) == a.weights


@given(masks(), masks(), masks())
def test_the_laws_of_sets_hold(a: Mask, b: Mask, c: Mask) -> None:
    assert removed(complement(complement(a))) == removed(a)
    assert removed(complement(union(a, b))) == removed(intersection(complement(a), complement(b)))
    assert removed(complement(intersection(a, b))) == removed(union(complement(a), complement(b)))
    assert removed(union(a, a)) == removed(intersection(a, a)) == removed(a)
    assert removed(union(a, b)) == removed(union(b, a))
    assert removed(intersection(a, union(b, c))) == removed(union(intersection(a, b), intersection(a, c)))
    assert removed(difference(a, b)) == removed(intersection(a, complement(b)))
    assert difference(a, a).zeros == 0


@given(some_masks, some_masks)
def test_a_matrix_that_one_mask_lacks_loses_nothing_to_it(a: Mask, b: Mask) -> None:
    assert set(union(a, b).kept) == set(a.kept) | set(b.kept)
    assert everywhere(union(a, b)) == everywhere(a) | everywhere(b)
    assert set(difference(a, b).kept) == set(a.kept)
    assert everywhere(difference(a, b)) == everywhere(a) - everywhere(b)
    assert set(complement(a).kept) == set(a.kept)
    if set(a.kept) & set(b.kept):
        both = intersection(a, b)
        assert set(both.kept) == set(a.kept) & set(b.kept)
        assert everywhere(both) == everywhere(a) & everywhere(b)
        assert union(a, b).zeros == a.zeros + b.zeros - both.zeros
    else:
        with pytest.raises(ConfigError, match="no matrix in common"):
            intersection(a, b)


@pytest.mark.parametrize("make_result", [union, intersection, difference, lambda a, b: complement(a)])
def test_results_are_masks_like_others(make_result: Callable[[Mask, Mask], Mask], tmp_path: Path) -> None:
    a = make_tiny_mask()
    b = make_tiny_mask(kept={name: kept.flip(0) for name, kept in a.kept.items()})
    result = make_result(a, b)
    save_mask(result, tmp_path)
    loaded = load_mask(tmp_path)
    assert loaded.config == result.config
    assert (loaded.config.selector, loaded.config.scope) == ("combined", "combined")
    assert loaded.config.sparsity == loaded.config.share == result.zeros / result.weights
    assert removed(loaded) == removed(result)


def test_a_result_says_what_it_is_made_of() -> None:
    names = _NAMES[:2]
    zeros = {name: torch.zeros(_SHAPES[name], dtype=torch.bool) for name in names}
    attention, mlp = make({names[0]: zeros[names[0]]}, "attention"), make({names[1]: zeros[names[1]]}, "mlp")
    assert union(mlp, attention).config.modules == "up_proj,q_proj"
    assert union(mlp, attention).config.target_modules == ("up_proj", "q_proj")
    assert union(mlp, mlp).config.modules == "mlp"
    assert difference(mlp, attention).config.modules == "mlp"


@pytest.mark.parametrize("operation", [union, intersection, difference])
def test_masks_of_different_bases_are_refused_and_the_matrix_named(operation: Callable[[Mask, Mask], Mask]) -> None:
    cut = {_NAMES[0]: torch.ones(3, 5, dtype=torch.bool)}
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj\.weight: the masks were made for different"):
        operation(make(cut), make(cut, base=2.0))
    with pytest.raises(
        ConfigError, match=r"float32 \(3, 5\) of sha256 .*…, float32 \(5, 3\)|float32 \(3, 5\) of sha256"
    ):
        operation(make(cut), make({_NAMES[0]: torch.ones(5, 3, dtype=torch.bool)}))


@given(some_masks, some_masks)
def test_the_overlap_is_counted_per_matrix_layer_module_and_in_total(a: Mask, b: Mask) -> None:
    shared = set(a.kept) & set(b.kept)
    if not shared:
        with pytest.raises(ConfigError, match="no matrix in common"):
            overlap(a, b)
        return
    found = overlap(a, b)
    assert set(found.table.index) == shared
    assert set(found.only_first) == set(a.kept) - shared
    assert set(found.only_second) == set(b.kept) - shared
    inside_a, inside_b = ({item for item in everywhere(mask) if item[0] in shared} for mask in (a, b))
    sums = [found.table[name].sum() for name in ("first", "second", "both")]
    assert sums == [len(inside_a), len(inside_b), len(inside_a & inside_b)]
    either = len(inside_a | inside_b)
    assert jaccard(found.table) == (len(inside_a & inside_b) / either if either else 1.0)
    assert list(found.table["expected"]) == list(found.table["first"] * found.table["second"] / found.table["weights"])
    assert found.same_base


@given(st.integers(1, 60), st.data())
def test_chance_is_the_hypergeometric_mean_and_near_the_mean_index(weights: int, data: st.DataObject) -> None:
    first, second = data.draw(st.integers(0, weights)), data.draw(st.integers(0, weights))
    removed_a = (torch.arange(weights) < first).view(1, weights)
    removed_b = (torch.arange(weights) >= weights - second).view(1, weights)
    name = _NAMES[0]
    one = overlap(make({name: removed_a}), make({name: removed_b})).table
    both = np.arange(max(0, first + second - weights), min(first, second) + 1)
    probability = hypergeom.pmf(both, weights, first, second)
    assert one["expected"].item() == pytest.approx(float(probability @ both), abs=1e-9)
    if first + second:
        exact = float(probability @ (both / (first + second - both)))
        assert jaccard(one, "expected") <= exact + 1e-9
        assert exact - jaccard(one, "expected") <= 0.5 / weights


def test_random_masks_overlap_as_chance_says() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (200, 300) for layer in range(4)}
    a, b = (
        make({name: torch.rand(shape, generator=generator) < share for name, shape in shapes.items()})
        for share in (0.1, 0.3)
    )
    total = overlap(a, b).table
    assert jaccard(total) == pytest.approx(jaccard(total, "expected"), rel=0.03)
    assert jaccard(total, "expected") == pytest.approx(0.03 / 0.37, rel=0.01)


def test_masks_that_remove_nothing_are_the_same() -> None:
    nothing = make({_NAMES[0]: torch.zeros(3, 5, dtype=torch.bool)})
    found = overlap(nothing, nothing).table
    assert jaccard(found) == jaccard(found, "expected") == 1.0


def test_positions_of_different_bases_can_be_compared_and_it_is_said() -> None:
    cut = {_NAMES[0]: torch.ones(3, 5, dtype=torch.bool)}
    assert not overlap(make(cut), make(cut, base=2.0)).same_base
    with pytest.raises(ConfigError, match="shapes differ"):
        overlap(make(cut), make({_NAMES[0]: torch.ones(5, 3, dtype=torch.bool)}))


def test_masks_that_rewind_are_combined_with_their_like_alone() -> None:
    first, second = ({_NAMES[0]: torch.arange(15).view(3, 5) % at == 0} for at in (2, 3))
    rewound = make(first, rewound_to=0.5)
    both = union(rewound, make(second, rewound_to=0.5))
    assert both.config.rewinds
    assert complement(rewound).config.rewinds
    with pytest.raises(ConfigError, match="one mask sets weights to zero, the other rewinds them"):
        union(rewound, make(second))
    with pytest.raises(ConfigError, match="the masks rewind to different models"):
        union(rewound, make(second, rewound_to=0.25))
    assert overlap(rewound, make(first)).same_base  # positions of both kinds can be compared

"""Whatever happens to a mask's two files, loading gives the same mask or refuses in words."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft_core.errors import ConfigError
from mft_core.masks.mask_file import Mask, load_mask, save_mask
from mft_core.masks.masked_sites import check_base
from tests.mft_core.masks.test_mask_file import make_global_mask, make_threshold_mask, make_tiny_mask


def _loads_the_same_or_refuses(mask: Mask, weights: bytes, config: bytes) -> None:
    """The same mask: of the same matrices of the same base, bit for bit. Words about it may differ.

    No digest covers shapes: another shape of as many bits is refused by the base that it is applied to.
    """
    directory = Path(_FOLDER.name)
    (directory / "mask.safetensors").write_bytes(weights)
    (directory / "mask_config.json").write_bytes(config)
    try:
        loaded = load_mask(directory)
    except ConfigError:
        return
    assert _identity(loaded) == _identity(mask)
    for site, found in zip(mask.config.sites, loaded.config.sites, strict=True):
        if found.shape == site.shape:
            assert torch.equal(loaded.kept[site.name], mask.kept[site.name])
        else:
            with pytest.raises(ConfigError, match="the mask was made for"):
                check_base(found, torch.zeros(site.shape))


def _identity(mask: Mask) -> list[tuple[str, str]]:
    return [(site.name, site.base_sha256) for site in mask.config.sites]


def _files(mask: Mask) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        save_mask(mask, Path(directory))
        return (Path(directory) / "mask.safetensors").read_bytes(), (Path(directory) / "mask_config.json").read_bytes()


_FUZZED = [(mask, *_files(mask)) for mask in (make_tiny_mask(), make_global_mask(), make_threshold_mask())]
_PLACE = st.integers(0, 10**6)
_FOLDER = tempfile.TemporaryDirectory()
_DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), _PLACE, st.integers(1, 255)),
        st.tuples(st.just("truncate"), _PLACE, st.none()),
        st.tuples(st.just("cut"), _PLACE, st.integers(1, 40)),
        st.tuples(st.just("insert"), _PLACE, st.binary(min_size=1, max_size=12)),
    ),
    max_size=3,
)


def _damaged(content: bytes, damage: list[tuple[str, int, Any]]) -> bytes:
    for kind, place, what in damage:
        place %= len(content) + 1
        if kind == "flip" and place < len(content):
            content = content[:place] + bytes([content[place] ^ what]) + content[place + 1 :]
        elif kind == "truncate":
            content = content[:place]
        elif kind == "cut":
            content = content[:place] + content[place + what :]
        elif kind == "insert":
            content = content[:place] + what + content[place:]
    return content


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(_FUZZED), _DAMAGE, _DAMAGE)
def test_damaged_bytes_give_the_same_mask_or_a_refusal(fuzzed: Any, weights: Any, config: Any) -> None:
    mask, *files = fuzzed
    _loads_the_same_or_refuses(mask, _damaged(files[0], weights), _damaged(files[1], config))


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 50),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.sampled_from(["", "local", "global", "rows", "combined", "learned", "float16", "\0", "é" * 3, "0" * 64]),
    st.text(max_size=8),
    st.lists(st.integers(-2, 10**10), max_size=3),
    st.dictionaries(st.sampled_from(["name", "mlp", "attention", "x"]), st.floats(), max_size=2),
)


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value in a JSON tree."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [node for key in keys for node in _nodes(value[key])]


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(_FUZZED),
    st.lists(st.tuples(_PLACE, st.sampled_from(["replace", "remove", "repeat"]), _VALUES), max_size=4),
)
def test_edited_settings_give_the_same_mask_or_a_refusal(fuzzed: Any, edits: Any) -> None:
    mask, weights, config = fuzzed
    tree = json.loads(config)
    for place, kind, value in edits:
        nodes = _nodes(tree)
        container, key = nodes[place % len(nodes)]
        if kind == "replace":
            container[key] = value
        elif kind == "remove":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
    _loads_the_same_or_refuses(mask, weights, json.dumps(tree).encode())

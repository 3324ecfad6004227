"""A mask on disk: one bit per weight beside a small JSON configuration, keys in the style of PEFT's adapters.

    mask.safetensors    one uint8 tensor `kept`: the matrices one after the other in the order of the configuration,
                        each as `mft_core.masks.packing` has it
    mask_config.json    MaskConfig: what is masked, how it was chosen, and digests of the base weights

A mask belongs to one base: the digests cover the masked weights' bytes as they lie in the base checkpoint, and a model
that differs is refused. Everything is checked on loading, sizes before anything is allocated; there is no pickle. What
a merge sets to zero cannot be computed back: `mft_core.masks.merge` keeps it beside the mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from mft_core.cache_key import digest
from mft_core.errors import ConfigError, explain
from mft_core.layers import format_layers
from mft_core.masks.masked_sites import MaskedSite, Sha256, dtype_name, tensor_digest
from mft_core.masks.packing import PackedMasks, packed_size
from mft_core.masks.selection import masked_count
from mft_core.methods import SELECTORS, Selector
from mft_core.recipes import Granularity, Modules, SiteClass

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from mft_core.masks.sites import Site

WEIGHTS, CONFIG = "mask.safetensors", "mask_config.json"
_TENSOR = "kept"
MaskScope = Literal["local", "global", "global-threshold", "rows", "combined"]
MaskSelector = Selector | Literal["combined"]


class MaskConfig(BaseModel):
    """The content of `mask_config.json`; one that contradicts itself cannot be made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    base_model_name_or_path: str = ""
    target_modules: tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    modules: Modules
    sparsity: float = Field(ge=0, le=1)
    """share set to zero: what was asked for, and what learning started from in 'global-threshold'; see `share`"""
    scope: MaskScope = "local"
    """'local': the share holds in every matrix, 'rows': and in its output rows; 'global': over all matrices;
    'global-threshold': thresholds decided; 'combined': made of other masks"""
    min_kept: float = Field(0.0, ge=0, le=1)
    """of 'global': least share kept in every matrix"""
    granularity: Granularity = "weight"
    """what was ranked: single weights, or whole output rows or input columns"""
    thresholds: Mapping[SiteClass, float] | None = None
    """of 'global-threshold': a score below it removes its weight"""
    selector: MaskSelector
    base_digest: Sha256
    """of the names and sha256 of all masked base weights"""
    mask_sha256: Sha256
    """of the packed bits"""
    sites: tuple[MaskedSite, ...] = Field(min_length=1)

    @property
    def zeros(self) -> int:
        """Entries set to zero, over all sites."""
        return sum(site.zeros for site in self.sites)

    @property
    def weights(self) -> int:
        """Entries under the mask, over all sites."""
        return sum(site.numel for site in self.sites)

    @property
    def share(self) -> float:
        """Share of the entries that is set to zero in fact."""
        return self.zeros / self.weights

    @property
    def made(self) -> str:
        """What masked entries are in the merged model, in a word."""
        return "rewound" if self.rewinds else "zero"

    @property
    def rewinds(self) -> bool:
        """Whether masked entries go back to the values of an earlier model, instead of to zero."""
        return self.sites[0].rewound_sha256 is not None

    @property
    def rescales(self) -> bool:
        """Whether kept entries change too: their distance from the earlier values is divided by the kept share."""
        return self.selector in SELECTORS and SELECTORS[self.selector].rescales

    def to_json(self) -> str:
        """Return the file's text; fields newer than the format are left out where they stand at their defaults."""
        newer = {"min_kept": 0.0, "thresholds": None, "granularity": "weight"}
        unused: dict[str, Any] = {name: True for name, default in newer.items() if getattr(self, name) == default}
        if not self.rewinds:
            unused["sites"] = {"__all__": {"rewound_sha256"}}
        return self.model_dump_json(indent=2, exclude=unused) + "\n"

    @model_validator(mode="after")
    def _sites_are_what_is_said_of_them(self) -> MaskConfig:
        if len({site.name for site in self.sites}) < len(self.sites):
            raise ValueError("a matrix is listed twice in sites; the file was altered")
        if any((site.rewound_sha256 is not None) != self.rewinds for site in self.sites):
            raise ValueError("some of the listed sites have rewound_sha256 and others have not; the file was altered")
        if self.base_digest != _base_digest(self.sites):
            raise ValueError("base_digest is not that of the listed sites; the file was altered")
        if set(self.layers_to_transform) != {site.layer for site in self.sites}:
            raise ValueError("layers_to_transform are not the layers of the listed sites; the file was altered")
        return self

    @model_validator(mode="after")
    def _counts_fit_the_scope(self) -> MaskConfig:
        if self.min_kept and self.scope != "global":
            raise ValueError("min_kept belongs to scope 'global'")
        if self.thresholds is not None and self.scope != "global-threshold":
            raise ValueError("thresholds belong to scope 'global-threshold'")
        if self.scope in ("local", "rows"):
            for site in self.sites:
                _check_zeros(site.name, site.zeros, site.numel, self.sparsity)
        if self.scope == "global":
            _check_zeros("the mask", self.zeros, self.weights, self.sparsity)
            for site in self.sites:
                if site.numel - site.zeros < int(self.min_kept * site.numel):  # as `selection.Global` rounds
                    raise ValueError(
                        f"{site.name} keeps {site.numel - site.zeros} of {site.numel} weights, "
                        f"fewer than its min_kept = {self.min_kept}"
                    )
        return self


def _check_zeros(what: str, zeros: int, weights: int, sparsity: float) -> None:
    expected = masked_count(sparsity, weights)
    if zeros != expected:
        raise ValueError(f"{what} has {zeros} zeros, where sparsity {sparsity} of {weights} weights is {expected}")


@dataclass(frozen=True)
class Mask:
    """A mask in memory: its configuration, and per site name a bool tensor of the weight's shape, True is kept."""

    config: MaskConfig
    kept: PackedMasks

    @property
    def zeros(self) -> int:
        """Entries set to zero, over all sites."""
        return self.config.zeros

    @property
    def weights(self) -> int:
        """Entries under the mask, over all sites."""
        return self.config.weights

    def changed(self, name: str) -> Tensor:
        """Return which entries of a matrix have other values in the merged model."""
        kept = self.kept[name]
        return kept | True if self.config.rescales else ~kept

    def __str__(self) -> str:
        config, layers = self.config, format_layers(self.config.layers_to_transform)
        return (
            f"mask ({config.selector}) of {len(config.sites)} matrices in layers {layers}: "
            f"{config.share:.2%} of {self.weights:,} weights {config.made}"
        )


def make_mask(
    sites: Sequence[Site],
    kept: Mapping[str, Tensor],
    base: Iterable[tuple[str, Tensor]],
    *,
    rewound_to: Iterable[tuple[str, Tensor]] | None = None,
    **settings: Any,
) -> Mask:
    """Tie masks to the base weights they were made for.

    Args:
        kept: mask of each site, bool, True is kept.
        base: (name, weight) of each site, in the sites' order, as stored in the base checkpoint.
        rewound_to: as `base`, the values that masked entries go back to, in the base's type; None sets them to zero.
        settings: of `MaskConfig`: `sparsity`, `selector` and `modules`; `scope` and what belongs to it,
            `base_model_name_or_path`. Counts that do not fit them are refused.

    Raises:
        ValueError: masks, weights and counts do not fit together; a mistake of the caller.
    """
    packed = PackedMasks((site.name, kept[site.name]) for site in sites)
    records = []
    earlier = None if rewound_to is None else iter(rewound_to)
    for site, (name, weight) in zip(sites, base, strict=True):
        if name != site.name or kept[name].shape != weight.shape:
            raise ValueError(f"{site.name}: mask {tuple(kept[site.name].shape)} of weight {name} {tuple(weight.shape)}")
        records.append(
            MaskedSite(
                name=name,
                shape=tuple(weight.shape),
                zeros=packed.zeros(name),
                base_dtype=dtype_name(weight),
                base_sha256=tensor_digest(weight),
                rewound_sha256=None if earlier is None else tensor_digest(next(earlier)[1]),
            )
        )
    return assemble(records, packed, target_modules=tuple(dict.fromkeys(site.module for site in sites)), **settings)


def assemble(records: Sequence[MaskedSite], kept: PackedMasks, **settings: Any) -> Mask:
    """Return a mask of matrices whose records are known, in the records' order.

    Args:
        settings: of `MaskConfig`, what does not follow from the records and the bits.

    Raises:
        ValueError: counts do not fit the scope.
    """
    config = MaskConfig(
        layers_to_transform=tuple(sorted({record.layer for record in records})),
        base_digest=_base_digest(records),
        mask_sha256=hashlib.sha256(kept.content().data).hexdigest(),
        sites=tuple(records),
        **settings,
    )
    return Mask(config, kept)


def _base_digest(records: Iterable[MaskedSite]) -> str:
    return digest({record.name: record.base_sha256 for record in records})


def save_mask(mask: Mask, directory: Path | str) -> None:
    """Write `mask.safetensors` and `mask_config.json`: the same bytes for the same mask."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS).write_bytes(save({_TENSOR: mask.kept.content()}))
    (directory / CONFIG).write_text(mask.config.to_json(), encoding="utf-8")


def load_mask(directory: Path | str) -> Mask:
    """Read what `save_mask` wrote.

    Raises:
        ConfigError: a file is missing, or content, size or zero counts are not what the configuration says.
    """
    directory = Path(directory)
    config = read_mask_config(directory)
    shapes = {site.name: site.shape for site in config.sites}
    content = _read_bits(directory, sum(packed_size(shape) for shape in shapes.values()))
    if hashlib.sha256(content.data).hexdigest() != config.mask_sha256:
        raise ConfigError(f"mask = {directory}: {WEIGHTS} was altered (sha256 differs); make the mask again.")
    kept = PackedMasks.from_bytes(shapes, content)
    for site in config.sites:
        if not kept.padding_is_clear(site.name):
            raise ConfigError(f"mask = {directory}: {site.name} has bits behind its last weight; make the mask again.")
        if kept.zeros(site.name) != site.zeros:
            raise ConfigError(
                f"mask = {directory}: {site.name} has {kept.zeros(site.name)} zeros (recorded: {site.zeros}); "
                "make the mask again."
            )
    return Mask(config, kept)


def _read_bits(directory: Path, size: int) -> np.ndarray:
    """Return the one tensor of the weights file, once its header says that it has this size."""
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as handle:
            names = list(handle.keys())
            if names != [_TENSOR]:
                raise ConfigError(
                    f"mask = {directory}: no readable {WEIGHTS}: it holds {names}, where '{_TENSOR}' alone is expected."
                )
            found = handle.get_slice(_TENSOR)
            dtype, shape = found.get_dtype(), found.get_shape()
            if dtype != "U8" or shape != [size]:
                raise ConfigError(
                    f"mask = {directory}: {WEIGHTS} holds {shape} entries of {dtype}; its sites need [{size}] of U8."
                )
            return np.ascontiguousarray(handle.get_tensor(_TENSOR))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"mask = {directory}: no readable {WEIGHTS} ({error}).") from error


def read_mask_config(directory: Path) -> MaskConfig:
    """Read `mask_config.json` alone.

    Raises:
        ConfigError: missing, not of this format, or it contradicts itself.
    """
    path = directory / CONFIG
    try:
        return MaskConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"mask = {directory}: no readable {CONFIG}; give a directory that learn-mask wrote."
        ) from error
    except ValidationError as error:
        raise explain(error, MaskConfig, str(path)) from error

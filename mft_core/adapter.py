"""A mask on disk: one bit per weight beside a small JSON configuration, keys in the style of PEFT's adapters.

    mask.safetensors    one uint8 tensor `kept`: the sites one after the other in the order of the
    configuration, each
                        row-major, most significant bit first, padded with 0 to a whole byte; bit 1 keeps the
                        weight
    mask_config.json    MaskConfig: what is masked, how it was chosen, and digests of the base weights

A mask belongs to one base: the digests cover the masked weights' bytes as they lie in the base checkpoint,
and a model that differs is refused. Everything is checked on loading; there is no pickle. To undo a merge,
keep the base: what was set to zero cannot be computed back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from mft_core.checkpoint_io import tensor_digest
from mft_core.errors import ConfigError, explain
from mft_core.identity import digest
from mft_core.masking import masked_count
from mft_core.recipes import Modules, Selector
from mft_core.sites import Site

WEIGHTS, CONFIG = "mask.safetensors", "mask_config.json"
_TENSOR = "kept"


class MaskedSite(BaseModel):
    """One masked matrix and the base weight it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    zeros: int
    base_dtype: str
    base_sha256: str


class MaskConfig(BaseModel):
    """The content of `mask_config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    base_model_name_or_path: str = ""
    target_modules: tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    modules: Modules
    sparsity: float
    scope: Literal["local"] = "local"
    """'local': the share holds in every matrix"""
    selector: Selector
    base_digest: str
    """of the names and sha256 of all masked base weights"""
    mask_sha256: str
    """of the packed bits"""
    sites: tuple[MaskedSite, ...]


@dataclass(frozen=True)
class Mask:
    """A mask in memory: its configuration, and per site name a bool tensor of the weight's shape, True is kept."""

    config: MaskConfig
    kept: Mapping[str, Tensor]

    @property
    def zeros(self) -> int:
        """Entries set to zero, over all sites."""
        return sum(site.zeros for site in self.config.sites)

    @property
    def weights(self) -> int:
        """Entries under the mask, over all sites."""
        return sum(prod(site.shape) for site in self.config.sites)


def make_mask(
    sites: Sequence[Site],
    kept: Mapping[str, Tensor],
    base: Iterable[tuple[str, Tensor]],
    *,
    sparsity: float,
    selector: Selector,
    modules: Modules,
    base_name: str = "",
) -> Mask:
    """Tie masks to the base weights they were made for.

    Args:
        kept: mask of each site, bool, True is kept.
        base: (name, weight) of each site, in the sites' order, as stored in the base checkpoint.
        base_name: for people; the digests are what counts.
    """
    masks = {site.name: kept[site.name].cpu() for site in sites}
    records = tuple(
        MaskedSite(
            name=name,
            shape=tuple(weight.shape),
            zeros=int((~masks[name]).sum()),
            base_dtype=_dtype_name(weight),
            base_sha256=tensor_digest(weight),
        )
        for name, weight in base
    )
    config = MaskConfig(
        base_model_name_or_path=base_name,
        target_modules=tuple(dict.fromkeys(site.module for site in sites)),
        layers_to_transform=tuple(sorted({site.layer for site in sites})),
        modules=modules,
        sparsity=sparsity,
        selector=selector,
        base_digest=_base_digest(records),
        mask_sha256=hashlib.sha256(_packed(masks.values()).data).hexdigest(),
        sites=records,
    )
    return Mask(config, masks)


def _base_digest(records: Iterable[MaskedSite]) -> str:
    return digest({record.name: record.base_sha256 for record in records})


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _packed(masks: Iterable[Tensor]) -> np.ndarray:
    return np.concatenate([np.packbits(mask.flatten().numpy()) for mask in masks])


def save_mask(mask: Mask, directory: Path) -> None:
    """Write `mask.safetensors` and `mask_config.json`: the same bytes for the same mask."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS).write_bytes(save({_TENSOR: _packed(mask.kept.values())}))
    (directory / CONFIG).write_text(mask.config.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_mask(directory: Path) -> Mask:
    """Read what `save_mask` wrote.

    Raises:
        ConfigError: a file is missing, or content, size or zero counts are not what the configuration says.
    """
    config = read_mask_config(directory)
    try:
        bits = load_file(directory / WEIGHTS)[_TENSOR]
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(f"mask = {directory}: no readable {WEIGHTS} ({error}).") from error
    sizes = [-(-prod(site.shape) // 8) for site in config.sites]
    if bits.dtype != np.uint8 or bits.shape != (sum(sizes),):
        raise ConfigError(
            f"mask = {directory}: {WEIGHTS} holds {bits.size} bytes ({bits.dtype}); "
            f"its sites need {sum(sizes)} (uint8)."
        )
    if hashlib.sha256(np.ascontiguousarray(bits).data).hexdigest() != config.mask_sha256:
        raise ConfigError(f"mask = {directory}: {WEIGHTS} was altered (sha256 differs); make the mask again.")
    kept = {}
    for site, chunk in zip(config.sites, np.split(bits, np.cumsum(sizes)[:-1]), strict=True):
        flat = np.unpackbits(chunk, count=prod(site.shape)).astype(bool)
        kept[site.name] = torch.from_numpy(flat).view(site.shape)
        _check_count(directory, site, int(flat.size - flat.sum()), config.sparsity)
    return Mask(config, kept)


def read_mask_config(directory: Path) -> MaskConfig:
    """Read `mask_config.json` alone.

    Raises:
        ConfigError: missing, not of this format, or its base digest is not that of its sites.
    """
    path = directory / CONFIG
    try:
        config = MaskConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"mask = {directory}: no readable {CONFIG}; give a directory that learn-mask wrote."
        ) from error
    except ValidationError as error:
        raise explain(error, MaskConfig, str(path)) from error
    if not config.sites or config.base_digest != _base_digest(config.sites):
        raise ConfigError(f"{path}: base_digest is not that of the listed sites; the file was altered.")
    return config


def _check_count(directory: Path, site: MaskedSite, zeros: int, sparsity: float) -> None:
    expected = masked_count(sparsity, prod(site.shape))
    if not zeros == site.zeros == expected:
        raise ConfigError(
            f"mask = {directory}: {site.name} has {zeros} zeros (recorded: {site.zeros}), "
            f"where sparsity {sparsity} of {prod(site.shape)} weights is {expected}."
        )


def check_base(site: MaskedSite, weight: Tensor | None) -> None:
    """Check that `weight` is the base weight that the site's mask was made for.

    Raises:
        ConfigError: missing, or of other shape, type or content.
    """
    if weight is None:
        raise ConfigError(f"the mask does not belong to this model, which has no weight named {site.name}.")
    found = f"{_dtype_name(weight)} {tuple(weight.shape)}"
    if found != f"{site.base_dtype} {site.shape}":
        raise ConfigError(f"{site.name} is {found} here; the mask was made for {site.base_dtype} {site.shape}.")
    if tensor_digest(weight) != site.base_sha256:
        raise ConfigError(
            f"{site.name}: the mask was made for other weights (sha256 differs); "
            "apply it to the checkpoint that it was learned on."
        )


@torch.no_grad()
def apply_mask(model: nn.Module, mask: Mask) -> None:
    """Set the masked weights of a loaded base model to zero, in place; all sites are checked before any is
    changed.

    Raises:
        ConfigError: the model is not the base of this mask, or was loaded in another dtype.
    """
    weights = dict(model.named_parameters())
    for site in mask.config.sites:
        check_base(site, weights.get(site.name))
    for name, kept in mask.kept.items():
        weights[name].masked_fill_(~kept.to(weights[name].device), 0)

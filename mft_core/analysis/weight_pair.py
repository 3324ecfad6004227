"""Two checkpoints that differ in some maskable matrices only, as one loaded model whose matrices can be set to either.

Which matrices a mask touches is read off the weights themselves: those that differ. Used by the stage `landscape`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mft_core.checkpoints.files import WeightFiles, load_frozen, skeleton
from mft_core.errors import ConfigError
from mft_core.masks.sites import Site, find_sites, layers_below

ModelName = Literal["fine-tuned", "masked"]
MODELS: tuple[ModelName, ModelName] = ("fine-tuned", "masked")


class WeightPair:
    """The fine-tuned model, loaded; `put` changes the matrices in which the masked one differs."""

    def __init__(self, fine_tuned: Path, masked: Path, device: torch.device) -> None:
        """Load both, in the type that the fine-tuned one is stored in.

        Raises:
            ConfigError: they are equal, or differ in other weights than maskable matrices, or in their shapes.
        """
        self.sites = changed_sites(fine_tuned, masked)
        self.model = load_frozen(fine_tuned, device)
        self._parameters = dict(self.model.named_parameters())
        self.values: dict[ModelName, list[Tensor]] = {}
        """by model, in the order of `sites`, the matrices that it has there"""
        for name, directory in zip(MODELS, (fine_tuned, masked), strict=True):
            files = WeightFiles(directory)
            self.values[name] = [files.tensor(site.name).to(device, self.model.dtype) for site in self.sites]

    @property
    def lower_layers(self) -> list[nn.Module]:
        """The decoder layers below all changed matrices: whatever `put` does, they compute the same."""
        return layers_below(self.model, self.sites)

    @property
    def weights(self) -> int:
        """Weights of the changed matrices."""
        return sum(value.numel() for value in self.values["masked"])

    @torch.no_grad()
    def put(self, values: Iterable[Tensor]) -> None:
        """Set the changed matrices, one value for each site; they are rounded to the model's type."""
        for site, value in zip(self.sites, values, strict=True):
            site.of(self._parameters).copy_(value)


def changed_sites(fine_tuned: Path, masked: Path) -> list[Site]:
    """Return the maskable matrices in which two checkpoints differ, by layer; read one at a time.

    Raises:
        ConfigError: none differs, another weight does, or the checkpoints have other matrices.
    """
    first, second = WeightFiles(fine_tuned), WeightFiles(masked)
    sites = find_sites(skeleton(fine_tuned))
    second.check([site.name for site in sites])
    changed = [site for site in sites if not _equal(first.tensor(site.name), second.tensor(site.name), site.name)]
    if not changed:
        raise ConfigError(f"masked = {masked}: its maskable weights are those of model = {fine_tuned}; give another.")
    in_sites = {piece.tensor for site in sites for piece in first.pieces[site.name]}
    for name in sorted(set(first.file_of) - in_sites):
        if name not in second.file_of or not torch.equal(*(files.stored(name) for files in (first, second))):
            raise ConfigError(
                f"masked = {masked}: {name} differs from model = {fine_tuned}, and is not a maskable matrix; "
                "give a model that was made by merging a mask into the other one."
            )
    return changed


def _equal(one: Tensor, other: Tensor, name: str) -> bool:
    if one.shape != other.shape:
        raise ConfigError(f"{name} has shape {tuple(one.shape)} in one model and {tuple(other.shape)} in the other.")
    return torch.equal(one, other)

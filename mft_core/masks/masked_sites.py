"""One masked matrix as a mask file records it: its name, its shape, and the base weight it belongs to.

The one place that reads site names: which parameter and which matrix of it (`….experts.gate_up_proj[3]` is matrix 3 of
a parameter of shape (matrices, rows, columns)), which layer, and which module. Used by `mft_core.masks.mask_file`, by
merging, and by what compares masks.
"""

from __future__ import annotations

import hashlib
import re
from math import prod
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from mft_core.errors import ConfigError

_MATRIX_OF = re.compile(r"(.+)\[(0|[1-9][0-9]{0,8})\]")
_IN_LAYER = re.compile(r"(?:.*?\.)??([0-9]{1,9})\.(.+)")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Dimension = Annotated[int, Field(gt=0, lt=2**31)]


class MaskedSite(BaseModel):
    """One masked matrix and the base weight it belongs to; the shape is the stored one, (out, in) for most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """as `mft_core.masks.sites.Site.name`"""
    shape: tuple[Dimension, Dimension]
    zeros: int
    base_dtype: str
    base_sha256: Sha256
    rewound_sha256: Sha256 | None = None
    """of the matrix whose values masked entries go back to, in `base_dtype`; None: they are set to zero"""

    @model_validator(mode="after")
    def _is_a_matrix_of_a_layer(self) -> MaskedSite:
        if not self.name.isprintable() or not _IN_LAYER.fullmatch(self.parameter):
            raise ValueError(f"name {self.name!r} is not that of a matrix in a decoder layer ('layers.0.q_proj')")
        if not 0 <= self.zeros <= self.numel:
            raise ValueError(f"{self.name}: zeros = {self.zeros} of {self.numel} weights")
        dtype = getattr(torch, self.base_dtype, None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{self.name}: base_dtype '{self.base_dtype}' is no floating point type of torch")
        return self

    @property
    def numel(self) -> int:
        """Weights of the matrix."""
        return prod(self.shape)

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds the matrix."""
        found = _MATRIX_OF.fullmatch(self.name)
        return found[1] if found else self.name

    @property
    def layer(self) -> int:
        """Index of the decoder layer: the first number among the parts of the name."""
        return int(self._in_layer()[1])

    @property
    def path(self) -> str:
        """Name inside the layer, as `mft_core.masks.sites.Site.path`; all experts of a layer share one."""
        return self._in_layer()[2].removesuffix(".weight")

    @property
    def module(self) -> str:
        """Last part of the path, as PEFT's `target_modules` would name it."""
        return self.path.rsplit(".", 1)[-1]

    def _in_layer(self) -> re.Match[str]:
        found = _IN_LAYER.fullmatch(self.parameter)
        assert found is not None  # the validator sees to it
        return found


def check_base(site: MaskedSite, weight: Tensor | None) -> None:
    """Check that `weight` is the base weight that the site's mask was made for.

    Raises:
        ConfigError: missing, or of other shape, type or content.
    """
    if weight is None:
        raise ConfigError(f"the mask does not belong to this model, which has no weight named {site.name}.")
    found = f"{dtype_name(weight)} {tuple(weight.shape)}"
    if found != f"{site.base_dtype} {site.shape}":
        raise ConfigError(f"{site.name} is {found} here; the mask was made for {site.base_dtype} {site.shape}.")
    if tensor_digest(weight) != site.base_sha256:
        raise ConfigError(
            f"{site.name}: the mask was made for other weights (sha256 differs); "
            "apply it to the checkpoint that it was learned on."
        )


def dtype_name(tensor: Tensor) -> str:
    """Return the type as mask files name it, e.g. 'bfloat16'."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256 hex digest of a tensor's bytes, row-major."""
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()

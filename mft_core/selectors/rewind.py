"""Rewound masks: learned as `learned` does, but masked entries go back to the base model's values V, not to zero.

The layer computes with W ⊙ M + V ⊙ (1 − M): part of the fine-tuning is undone, nothing of the base model is removed
(restoring updates of a fine-tuning can help: arXiv 2509.16596). Beside a learned mask of equal sparsity this splits a
gain into what deletion and what undone fine-tuning brings. Straight through the selection,

    dL/dM = g ⊙ (W − V)          g = dL/d(W ⊙ M + V ⊙ (1 − M))

and all else (scores, selection, optimizer, draws) is that of `mft_core.masks.masking`. Sparsity is the share of each
matrix that is rewound. V is taken in the type of W.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mft_core.masks.masking import MaskTuner
from mft_core.masks.sites import Site
from mft_core.selectors import learned
from mft_core.selectors.job import Choice, Job


def choose(job: Job) -> Choice:
    """Learn the masks on the job's data, as `learned` does, between the fine-tuned and the base weights."""
    return learned.choose(job, functools.partial(RewindMaskTuner, earlier=dict(job.base_weights())))


class RewindMaskTuner(MaskTuner):
    """As `MaskTuner`, but the model holds W ⊙ M + V ⊙ (1 − M).

    Args:
        earlier: V by site name, each in the shape of its weight.
    """

    selector = "rewind"
    state_kind = "RewindMaskTuner"

    def __init__(self, *args: Any, earlier: Mapping[str, Tensor], **settings: Any) -> None:
        self._earlier = dict(earlier)
        super().__init__(*args, **settings)

    def _lost(self, site: Site) -> Tensor:
        weight = super()._lost(site)
        return weight - self._at(site, weight)

    def _put(self, site: Site, mask: Tensor) -> None:
        weight = super()._lost(site)
        site.of(self._parameters).copy_(torch.where(mask, weight, self._at(site, weight)))

    def _at(self, site: Site, weight: Tensor) -> Tensor:
        """Return V of a site as its weight is: on its device, in its type; kept so from the first time on."""
        self._earlier[site.name] = self._earlier[site.name].to(weight)
        return self._earlier[site.name]

    def _earlier_values(self) -> Mapping[str, Tensor]:
        return self._earlier

"""The loss of every sequence apart, measured again and again while some weights of the model change.

`mft_core.analysis.removals` pairs its costs over sequences; `pac_bayes` needs their errors besides, which are bounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from mft_core.data.batching import IGNORED, micro_batches
from mft_core.data.tokens import TokenDataset
from mft_core.training.loss import LossHead

Array = NDArray[np.float64]

_WORTHWHILE = 512
"""tokens: passing fewer through a model costs hardly less, and their logits are few"""


class SequenceLosses(LossHead):
    """Measures loss and error of some sequences on one model; like `LossHead` a context manager."""

    def __init__(self, model: PreTrainedModel, sequences: TokenDataset, chosen: NDArray[np.int64], width: int) -> None:
        """Lay out the `chosen` sequences, padded, in batches of at most `width` tokens.

        Batches are of sequences of similar length; where there is enough for that, there are four of them at least.
        """
        super().__init__(model)
        width = min(width, max(_WORTHWHILE, int(sequences.lengths[chosen].sum()) // 4))
        self._batches = micro_batches(sequences, chosen, width, packing=False).batches
        in_loss = [(batch["labels"] != IGNORED).sum(1).numpy() for batch in self._batches]
        self.tokens: Array = np.concatenate(in_loss).astype(float)
        """loss tokens of every sequence"""
        self._turn = 0

    def measure(self) -> Array:
        """Return the cross-entropy (nats) summed over the loss tokens of every sequence."""
        return self._measure_all()[0]

    def losses_and_errors(self) -> tuple[Array, Array]:
        """Return of every sequence the nats summed over its loss tokens, and the share of them that is not predicted.

        A token is predicted if it has the highest probability given the true tokens before it.
        """
        nats, wrong = self._measure_all()
        return nats, wrong / self.tokens

    def _measure_all(self) -> tuple[Array, Array]:
        nats, wrong = np.concatenate([self._measure(turn) for turn in range(len(self._batches))], axis=1)
        return nats, wrong

    @torch.no_grad()
    def _measure(self, turn: int) -> Array:
        """Return of every sequence of a batch nats and wrong tokens, [2, sequences]."""
        self._turn, batch = turn, self._batches[turn]
        device = next(self._model.parameters()).device
        labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        self._positions = (rows * labels.shape[1] + columns).to(device)
        arguments = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        logits = self._model(**arguments, use_cache=False).logits.squeeze(0)
        pairs = zip(logits.split(_WORTHWHILE), labels[rows, columns].to(device).split(_WORTHWHILE), strict=True)
        found = []
        for part, told in pairs:
            nats = functional.cross_entropy(part.float(), told, reduction="none")
            found.append(torch.stack([nats.double(), (part.argmax(-1) != told).double()]).cpu())
        return torch.zeros(2, len(labels), dtype=torch.float64).index_add_(1, rows, torch.cat(found, dim=1)).numpy()

    @contextlib.contextmanager
    def reusing(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Have these layers, the model's lowest, compute only once: no weight below them, or of them, may change.

        Tried on the model itself; where a family takes more from a layer than what it returns, they compute as ever.
        """
        if not layers:
            yield
            return
        given: list[Any] = []
        with layers[-1].register_forward_hook(lambda _module, _inputs, output: given.append(output)):
            before = self.measure()
        for layer in layers:
            layer.forward = lambda *_, **__: given[self._turn]
        try:
            if not np.array_equal(self._measure(0)[0], before[: len(self._batches[0]["labels"])]):
                _compute_again(layers)
            yield
        finally:
            _compute_again(layers)


def _compute_again(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        layer.__dict__.pop("forward", None)

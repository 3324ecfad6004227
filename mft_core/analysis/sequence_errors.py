"""Loss and error of every sequence: what a bound on a bounded loss needs beside the cross-entropy.

Used by `mft_core.analysis.pac_bayes`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mft_core.analysis.sequence_loss import Array, SequenceLosses
from mft_core.data.batching import IGNORED


class SequenceErrors(SequenceLosses):
    """Measures some sequences on one model; like `SequenceLosses` a context manager."""

    def __enter__(self) -> SequenceErrors:
        super().__enter__()
        self._guesses: list[Tensor] = []
        self._watch = self._model.register_forward_hook(self._look)
        return self

    def __exit__(self, *arguments: object) -> None:
        self._watch.remove()
        super().__exit__(*arguments)

    def _look(self, _model: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        self._guesses.append(output.logits.flatten(0, -2).argmax(-1).cpu())

    def losses_and_errors(self) -> tuple[Array, Array]:
        """Return of every sequence the nats summed over its loss tokens, and the share of them that is not predicted.

        A token is predicted if it has the highest probability given the true tokens before it.
        """
        self._guesses.clear()
        nats = self.measure()
        pairs = zip(self._batches, self._guesses, strict=True)
        wrong = np.concatenate([_wrong(batch["labels"], guesses) for batch, guesses in pairs])
        return nats, wrong / self.tokens


def _wrong(labels: Tensor, guesses: Tensor) -> Array:
    """Count wrong guesses per row; they were made for the labels in the loss, in row-major order."""
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    rows, columns = (following != IGNORED).nonzero(as_tuple=True)
    missed = (guesses != following[rows, columns]).double()
    return torch.zeros(len(labels), dtype=torch.float64).index_add_(0, rows, missed).numpy()

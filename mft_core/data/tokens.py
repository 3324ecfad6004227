"""Token sequences with their loss masks, in three flat arrays: what `prepare-data` writes and training reads.

One safetensors file, memory-light (5 bytes per token), the same bytes for the same content.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mft_core.errors import StageError


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """N token sequences, T tokens; sequence i is `[offsets[i], offsets[i + 1])` of the flat arrays."""

    input_ids: np.ndarray
    """int32 [T]"""
    loss_mask: np.ndarray
    """bool [T]: the token's prediction counts in the loss; never true for the first token of a sequence"""
    offsets: np.ndarray
    """int64 [N + 1], from 0 to T"""

    @classmethod
    def from_examples(cls, examples: Iterable[tuple[np.ndarray, np.ndarray]]) -> TokenDataset:
        """Concatenate (input_ids [length], loss_mask [length]) pairs.

        The loss mask of a first token is cleared: nothing stands before it from which it could be predicted.
        """
        pairs = list(examples)
        offsets = np.zeros(len(pairs) + 1, np.int64)
        offsets[1:] = np.cumsum([len(ids) for ids, _ in pairs])
        ids = np.concatenate([np.empty(0, np.int32), *(np.asarray(ids, np.int32) for ids, _ in pairs)])
        mask = np.concatenate([np.empty(0, bool), *(np.asarray(mask, bool) for _, mask in pairs)])
        mask[offsets[:-1][np.diff(offsets) > 0]] = False
        return cls(ids, mask, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [N]."""
        return np.diff(self.offsets)

    @property
    def loss_tokens(self) -> int:
        """Number of tokens whose prediction counts in the loss."""
        return int(self.loss_mask.sum())

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids int32 [length], loss_mask bool [length]) of one sequence, as views."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[part], self.loss_mask[part]

    def save(self, path: Path) -> None:
        """Write the three arrays as one safetensors file, the same bytes for the same content."""
        path.write_bytes(save({"input_ids": self.input_ids, "loss_mask": self.loss_mask, "offsets": self.offsets}))

    @classmethod
    def load(cls, path: Path) -> TokenDataset:
        """Read what `save` wrote.

        Raises:
            StageError: the file is missing, or is no such file.
        """
        try:
            arrays = load_file(path)
            return cls(arrays["input_ids"], arrays["loss_mask"], arrays["offsets"])
        except (OSError, SafetensorError, KeyError) as error:
            raise StageError(f"{path}: no token data set ({error}); run prepare-data again.") from error

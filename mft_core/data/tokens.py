"""Token sequences with their loss masks, in three flat arrays: what `prepare-data` writes and training reads.

One safetensors file, memory-light (5 bytes per token), the same bytes for the same content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mft_core.errors import ConfigError, StageError


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


@dataclass(frozen=True)
class Limits:
    """What a decoder takes; beyond it, a lookup fails, or positions are what it never saw."""

    tokens: int
    """rows of the embedding"""
    positions: int | None
    """longest sequence; None where the configuration names none"""

    @classmethod
    def of(cls, config: Any) -> Limits:
        """Read them from a model's configuration."""
        text = config.get_text_config()
        return cls(text.vocab_size, getattr(text, "max_position_embeddings", None))

    def check(self, ids: np.ndarray, longest: int, where: str, name: Callable[[int], object] = str) -> None:
        """Raise a ConfigError if sequences of token ids, from `where`, are none that the model takes.

        Args:
            longest: tokens of the longest sequence.
            name: says which token an id is.
        """
        largest = int(ids.max(initial=0))
        if largest >= self.tokens:
            raise ConfigError(
                f"{where}: token id {largest} ({name(largest)}), and the model's embedding has {self.tokens} rows, for "
                f"ids 0 to {self.tokens - 1}. The tokenizer is larger than the model: give the one that belongs to it, "
                "or resize the embedding (model.resize_token_embeddings(len(tokenizer))) and save the model."
            )
        if self.positions is not None and longest > self.positions:
            raise ConfigError(
                f"{where}: {longest} tokens in a row, and the model takes {self.positions} positions "
                f"(max_position_embeddings); set data.max_length to at most {self.positions}."
            )

"""Token sequences with their loss masks, in three flat arrays: what `prepare-data` writes and training reads.

One safetensors file (5 bytes per token), the same bytes for the same content; written and read without holding it.
"""

from __future__ import annotations

import json
import mmap
import tempfile
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open

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
    def from_examples(
        cls, examples: Iterable[tuple[np.ndarray, np.ndarray]], directory: Path | None = None
    ) -> TokenDataset:
        """Concatenate (input_ids [length], loss_mask [length]) pairs, in files without a name that end with their user.

        The loss mask of a first token is cleared: nothing stands before it from which it could be predicted.

        Args:
            directory: of the files; None: the system's for temporary files.
        """
        stops = array("q", [0])
        with tempfile.TemporaryFile(dir=directory) as ids, tempfile.TemporaryFile(dir=directory) as masks:
            for tokens, in_loss in examples:
                mask = np.array(in_loss, bool)
                mask[:1] = False
                ids.write(np.asarray(tokens, np.int32).tobytes())
                masks.write(mask.tobytes())
                stops.append(stops[-1] + len(mask))
            offsets = np.array(stops, np.int64)
            return cls(_mapped(ids, np.int32, 0, stops[-1]), _mapped(masks, np.bool_, 0, stops[-1]), offsets)

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

    def save(self, path: Path, rows: np.ndarray | None = None) -> None:
        """Write the sequences, or those of them, as one safetensors file, the same bytes for the same content."""
        taken = np.arange(len(self)) if rows is None else rows
        offsets = np.append(0, np.cumsum(self.lengths[taken]))
        header, at = {}, 0
        for name, kind, count, size in (
            ("offsets", "I64", len(offsets), 8),  # the widest first, as safetensors has them
            ("input_ids", "I32", int(offsets[-1]), 4),
            ("loss_mask", "BOOL", int(offsets[-1]), 1),
        ):
            header[name] = {"dtype": kind, "shape": [count], "data_offsets": [at, at := at + count * size]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + offsets.tobytes())
            for flat in (self.input_ids, self.loss_mask):
                for part in np.array_split(taken, len(taken) // 10_000 + 1):
                    for row in part:
                        file.write(flat[self.offsets[row] : self.offsets[row + 1]].data)
                    if isinstance(flat.base, mmap.mmap):
                        flat.base.madvise(mmap.MADV_DONTNEED)  # what was written need not stay in memory

    @classmethod
    def load(cls, path: Path) -> TokenDataset:
        """Map what `save` wrote into memory.

        Raises:
            StageError: the file is missing, or is no such file.
        """
        try:
            with safe_open(path, "np") as file, path.open("rb") as mapped:
                offsets = file.get_tensor("offsets")
                tokens, end = int(offsets[-1]), path.stat().st_size
                return cls(
                    _mapped(mapped, np.int32, end - 5 * tokens, tokens),
                    _mapped(mapped, np.bool_, end - tokens, tokens),
                    offsets,
                )
        except (OSError, SafetensorError) as error:
            raise StageError(f"{path}: no token data set ({error}); run prepare-data again.") from error


def _mapped(file: IO[bytes], kind: type[np.generic], start: int, count: int) -> np.ndarray:
    """Return so many numbers of a file, which stay there until they are read."""
    return np.memmap(file, kind, "r", start, (count,)) if count else np.empty(0, kind)


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

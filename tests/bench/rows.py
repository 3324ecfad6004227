"""Rows like those of a chat corpus: 40 to 900 random tokens each, the second half in the loss."""

from __future__ import annotations

import numpy as np

from mft_core.data.tokens import TokenDataset

SHORTEST, LONGEST = 40, 900


def make_rows(count: int, vocabulary: int, long: int | None = None, every: int = 0) -> TokenDataset:
    """Return rows of lengths spread evenly; one in `every` is `long` tokens instead."""
    random = np.random.default_rng(0)
    lengths = random.integers(SHORTEST, LONGEST + 1, count)
    lengths[0] = LONGEST
    if long is not None:
        lengths[::every] = long
    return TokenDataset.from_examples(
        (random.integers(10, vocabulary, length), np.arange(length) >= length // 2) for length in lengths
    )

"""Random generators that depend on a seed and a name alone, for first scores, random masks and adapters."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator for one matrix.

    It depends on neither the device nor the other matrices, so one seed gives a matrix the same draws in every study.
    """
    number = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(number, "big") >> 1)

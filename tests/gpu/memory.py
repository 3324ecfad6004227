"""A device with as little memory as a test wants; torch's allocator then fails as it does on a full one."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def peak(work: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes in tensors before the work, and the most during it."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return before, torch.cuda.max_memory_allocated()


def allow(number: int) -> None:
    """Let this process have so many bytes of the device."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(number / torch.cuda.get_device_properties(0).total_memory)


def times_out_of_memory() -> int:
    """Return how often the allocator has failed so far."""
    return int(torch.cuda.memory_stats()["num_ooms"])

"""Energy counters of this machine: GPUs that torch uses (NVML, where `nvidia-ml-py` is there) and CPU packages (RAPL).

A counter says what its whole device has used, whoever used it. RAPL's files can often be read by root alone; then, and
on machines without counters, there is none. Used by `mft_core.store.usage`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RAPL = Path("/sys/class/powercap")


class Counter:
    """Adds up what a counter counts, over its wraps."""

    def __init__(self, read: Callable[[], float], wraps_at: float = float("inf")) -> None:
        """Take the function that reads the counter, and the value at which it begins again; both in joules."""
        self._read, self._wraps_at = read, wraps_at
        self._last = read()
        self.joules = 0.0

    def sample(self) -> None:
        """Add what was used since the last sample, at most one wrap ago."""
        now = self._read()
        self.joules += now - self._last + (self._wraps_at if now < self._last else 0.0)
        self._last = now


def cpu_counters() -> list[Counter]:
    """Return a counter for each CPU package that lets itself be read."""
    found = []
    for package in sorted(_RAPL.glob("intel-rapl:*")):
        if package.name.count(":") > 1:  # a part of a package
            continue
        try:
            wraps_at = int((package / "max_energy_range_uj").read_text()) / 1e6
            found.append(Counter(functools.partial(_microjoules, package / "energy_uj"), wraps_at))
        except OSError:  # not for us to read
            continue
    return found


def _microjoules(path: Path) -> float:
    return int(path.read_text()) / 1e6


def gpu_counters() -> list[Counter]:
    """Return a counter for each GPU on which torch has memory; none before it has."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    try:
        import pynvml
    except ImportError:
        return []
    pynvml.nvmlInit()
    used = [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(index)]
    names = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in used]
    handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
    return [Counter(functools.partial(_millijoules, pynvml, handle)) for handle in handles]


def _millijoules(nvml: Any, handle: Any) -> float:
    return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

"""What a stage used while it ran: seconds, peak memory, energy, and on which device. For the manifest's provenance.

A stage that was killed and resumed counts all of its attempts: the account of the earlier ones lies in its work
directory. A thread samples twice a second (under a hundredth of a core).

- *Memory*: on a GPU the most that torch had allocated there (of this process); else by how much the resident memory of
  this process and its children grew, free memory having been given back to the system before.
- *Energy*: of the whole devices, whoever used them: GPUs that torch uses (NVML, where `nvidia-ml-py` is there) and CPU
  packages (RAPL, whose files can often be read by root alone); None where nothing can be read, or one of them fails.

Both speak of the stage only if no other one ran in this process meanwhile: `alone`. Used by `mft_core.store.artifacts`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from mft_core.store.kept import keep, kept

SAMPLE_SECONDS = 0.5
KEEP_SECONDS = 10.0
"""a stage that is killed loses the account of at most this long"""
KEPT = ".usage.json"
_RAPL = Path("/sys/class/powercap")
_ACTIVE: set[Meter] = set()
_LOCK = threading.Lock()


class Counter:
    """Adds up what a counter counts, over its wraps."""

    def __init__(self, read: Callable[[], int | str], a_joule: int, wraps_at: float = float("inf")) -> None:
        """Take the function that reads the counter, how much of it a joule is, and where it begins again, in joules."""
        self._read, self._a_joule, self._wraps_at = read, a_joule, wraps_at
        self._last = self._now()
        self.joules = 0.0

    def _now(self) -> float:
        return int(self._read()) / self._a_joule

    def sample(self) -> None:
        """Add what was used since the last sample, at most one wrap ago."""
        now = self._now()
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
            found.append(Counter((package / "energy_uj").read_text, 1_000_000, wraps_at))
        except OSError:  # not for us to read
            continue
    return found


def gpu_counters() -> list[Counter]:
    """Return a counter for each GPU on which torch has memory; none before it has."""
    cuda = cuda_in_use()
    if cuda is None:
        return []
    try:
        import pynvml
    except ImportError:
        return []
    pynvml.nvmlInit()
    used = [index for index in range(cuda.device_count()) if cuda.memory_reserved(index)]
    names = [f"GPU-{cuda.get_device_properties(index).uuid}" for index in used]
    handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
    return [Counter(functools.partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle), 1_000) for handle in handles]


class Meter:
    """Measures what is done within its context."""

    def __init__(self, work: Path) -> None:
        """Go on with the account of earlier attempts, if there is one.

        Args:
            work: the stage's work directory.
        """
        self._kept = work / KEPT
        self._before: dict[str, Any] = kept(self._kept, logging.getLogger("mft")) or {}
        self._alone = bool(self._before.get("alone", True))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="usage", daemon=True)
        self._peak = 0
        self._cpu = cpu_counters()
        self._gpu: list[Counter] = []
        self._counts = True
        self.used: dict[str, Any] = {}
        """seconds, peak_memory_bytes, energy_joules, device and alone, of all attempts together; known at the end"""

    def __enter__(self) -> Meter:
        with _LOCK:
            _ACTIVE.add(self)
            if len(_ACTIVE) > 1:
                for meter in _ACTIVE:
                    meter._alone = False
        self._started = time.perf_counter()
        _give_back_free_memory()
        self._resident = _resident()
        if cuda := cuda_in_use():
            cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with _LOCK:
            _ACTIVE.discard(self)
        self._sample()
        self.used = self._account()
        self._keep()

    def _account(self) -> dict[str, Any]:
        before = self._before
        counters = self._cpu + self._gpu if self._counts else []
        joules = before.get("energy_joules") if before else 0.0
        if joules is not None:
            joules = round(joules + sum(counter.joules for counter in counters), 1) if counters else None
        cuda = cuda_in_use()
        on_gpu = cuda.max_memory_allocated() if cuda else 0
        return {
            "seconds": round(time.perf_counter() - self._started + before.get("seconds", 0.0), 3),
            "peak_memory_bytes": max(on_gpu or self._peak, before.get("peak_memory_bytes", 0)),
            "energy_joules": joules,
            "device": cuda.get_device_name() if cuda and on_gpu else processor(),
            "alone": self._alone,
        }

    def _watch(self) -> None:
        kept = time.monotonic()
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()
            if time.monotonic() - kept > KEEP_SECONDS:
                self._keep()
                kept = time.monotonic()

    def _sample(self) -> None:
        self._peak = max(self._peak, _resident() - self._resident)
        if not self._counts:
            return
        try:
            self._gpu = self._gpu or gpu_counters()
            for counter in self._cpu + self._gpu:
                counter.sample()
        except Exception as error:  # of NVML: a slice of a GPU, one before Volta, one that was lost, no library
            self._counts = False  # and a stage's result is not lost for it
            _tell_once(f"{type(error).__name__}: {error}")

    def _keep(self) -> None:
        if self._kept.parent.is_dir():  # not where the stage's state was thrown away
            try:
                keep(self._kept, self._account())
            except OSError as error:  # of a full disk, perhaps: that is the stage's to tell
                logging.getLogger("mft").warning("what was used up to now cannot be kept: %s", error)


@functools.cache
def _tell_once(problem: str) -> None:
    """Say in the log why the energy is not known: of all stages of a process once, since it is the same for each."""
    logging.getLogger("mft").warning("the energy that stages use is not known here: %s", problem)


def processor() -> str:
    """Name this machine's processor and its cores, e.g. 'AMD EPYC 9654, 2 cores'."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {psutil.cpu_count()} cores"


def compare(promised: Mapping[str, float] | None, used: Mapping[str, Any], stage: str, log: logging.Logger) -> None:
    """Warn where a stage that ran alone took over a fifth more memory than its plan said."""
    if promised and used["alone"] and used["peak_memory_bytes"] > 1.2 * promised["peak_memory_bytes"]:
        log.warning(
            "%s took %.2f GB of memory where the plan said %.2f; the next plan will say what was measured.",
            stage,
            used["peak_memory_bytes"] / 1e9,
            promised["peak_memory_bytes"] / 1e9,
        )


def cuda_in_use() -> Any:
    """Return `torch.cuda` where this process uses a GPU, else None; torch may be half imported by another thread."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if getattr(cuda, "is_initialized", bool)() else None


def _give_back_free_memory() -> None:
    """Let go of what earlier stages have left in the C library's heap, in which a later one's growth would hide."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it
        trim(0)


def _resident() -> int:
    """Return the resident memory of this process and its children in bytes.

    Those that are its forks, with its own command line, are left out: they hold what it holds.
    """
    own = psutil.Process()
    total, command = int(own.memory_info().rss), own.cmdline()
    for process in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone in the meantime
            total += 0 if process.cmdline() == command else int(process.memory_info().rss)
    return total

"""The most memory that tensors take at one time, as the allocator counts it.

What a process occupies (VmHWM) also counts the interpreter, libraries and what the C library keeps of freed memory,
which differ by tens of megabytes from run to run. So, as `torch.cuda.max_memory_allocated` does on a GPU, on a CPU the
profiler's records of every allocation are added up: kernels' own scratch memory is in, memory outside of torch (numpy)
is not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def cpu_peak(work: Callable[[], object]) -> int:
    """Return the most bytes in CPU tensors, at one time, of all that `work` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    recorded = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def process_peak() -> int:
    """Return the most bytes that this process has occupied so far (Linux' VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024

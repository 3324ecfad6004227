"""Heavy stages take turns: at most `slots` of them on one device at a time, across threads and processes.

Slots are files held with flock, so a killed run gives its slot back at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_SECONDS = 0.1


@contextlib.contextmanager
def device_slot(home: Path, device: str, slots: int) -> Iterator[None]:
    """Hold one of the device's slots, waiting until one is free.

    Args:
        home: `MFT_HOME`; runs that share it take turns.
        device: e.g. ``auto``, ``cuda:0``.
        slots: how many heavy stages may run on the device at one time (`runtime.heavy_slots`).
    """
    folder = home / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        handles = [
            stack.enter_context((folder / f"device-{device.replace(':', '-')}-{slot}").open("a"))
            for slot in range(slots)
        ]
        while not any(_try_lock(handle.fileno()) for handle in handles):
            time.sleep(_POLL_SECONDS)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""Where heavy work runs (device and CPU threads), and whose turn it is to use what torch has only once per process.

Light stages run in several threads of one process (a heavy one has a worker process to itself, see `tasks.job`).
torch's default dtype and random generators belong to the process: loading a model changes the one, dropout and sampling
draw from the others, so each does it under `PROCESS_WIDE`. Everything else names its dtype and brings its own
generator.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

from mft_core.errors import ConfigError
from mft_core.recipes import Runtime

_DEFAULT_THREADS = torch.get_num_threads()
PROCESS_WIDE = threading.RLock()
"""held while torch's default dtype is changed, or its generators are drawn from"""


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Have torch's generators of the process for oneself, and leave them as they were."""
    with PROCESS_WIDE, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def settle(runtime: Runtime) -> torch.device:
    """Set the CPU threads of this process and return the device to compute on; of several processes, each has a GPU.

    Raises:
        ConfigError: the device is unknown to torch, or this machine has none.
    """
    torch.set_num_threads(runtime.threads or _DEFAULT_THREADS)  # whatever an earlier stage of this process had set
    device = find_device(runtime)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # set by torch's launcher
        torch.cuda.set_device(device)
    return device


def find_device(runtime: Runtime) -> torch.device:
    """Return the device that the runtime names.

    Raises:
        ConfigError: it is unknown to torch, or this machine has none.
    """
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(runtime.device)
    except RuntimeError as error:
        raise ConfigError(f"device = {runtime.device}: unknown; valid: 'auto', 'cpu', 'cuda', 'cuda:0'.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device = {runtime.device}: not supported; valid: 'auto', 'cpu', 'cuda', 'cuda:0', 'mps'.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device = {runtime.device}: torch finds no MPS here (Apple's GPUs); use 'cpu' or 'auto'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device = {runtime.device}: torch sees {torch.cuda.device_count()} CUDA devices here; use 'cpu' or 'auto'."
        )
    return device

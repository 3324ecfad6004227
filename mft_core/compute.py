"""Where heavy work runs: the device and the CPU threads that `Runtime` asks for."""

from __future__ import annotations

import torch

from mft_core.errors import ConfigError
from mft_core.recipes import Runtime


def settle(runtime: Runtime) -> torch.device:
    """Set the CPU threads of this process and return the device to compute on.

    Raises:
        ConfigError: the device is unknown to torch, or this machine has none.
    """
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(runtime.device)
    except RuntimeError as error:
        raise ConfigError(f"device = {runtime.device}: unknown; valid: 'auto', 'cpu', 'cuda', 'cuda:0'.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device = {runtime.device}: torch sees {torch.cuda.device_count()} CUDA devices here; use 'cpu' or 'auto'."
        )
    return device

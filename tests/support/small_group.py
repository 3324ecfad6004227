"""Functions that several processes run at once as one gloo group, the way torchrun would have it."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tests.support.small_training  # noqa: F401  brings what the children need into the process that they are forked from

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def together(function: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Any]:
    """Return what `function(*arguments)` returns in each process of a group, by rank.

    Args:
        function: of a module, so that a child finds it by name; returns tensors and plain values.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [
            PROCESSES.Process(target=_member, args=(rank, processes, Path(folder), function, arguments), daemon=True)
            for rank in range(processes)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout=60)
        codes = [child.exitcode for child in children]
        for child in children:
            child.kill()
        assert codes == [0] * processes, f"exit codes {codes}; None: it was still running"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _member(rank: int, processes: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    torch.save(function(*arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()

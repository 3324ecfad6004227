"""The processes that share one training, as `torch.distributed` knows them; where no group is initialised there is one.

The group is joined by `mft_core.stages.worker` for the stages, or by a script under torchrun; nothing here makes one.
With one process every function returns at once, so that the training loop reads the same for one and for many. All
numbers travel as tensors on the training's device: NCCL moves no others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mft_core.errors import ConfigError, StageError

_BUCKET = 16 * 2**20
"""numbers summed in one message: enough that its latency does not count, little beside a model"""


def rank() -> int:
    """Return which of the processes this is, from 0."""
    return dist.get_rank() if joined() else 0


def processes() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if joined() else 1


def is_first() -> bool:
    """Say whether this is the process that saves, reports and writes."""
    return rank() == 0


def joined() -> bool:
    """Say whether this process belongs to a group, be it of one."""
    return dist.is_available() and dist.is_initialized()


def check_joined() -> None:
    """Refuse to train alone what torchrun has started several times: each would compute all of it, in one directory.

    Raises:
        ConfigError: the environment speaks of several processes, and no process group is initialised.
    """
    announced = os.environ.get("WORLD_SIZE", "1")
    if announced != "1" and "RANK" in os.environ and not joined():
        raise ConfigError(
            f"WORLD_SIZE = {announced}, but this process has joined no group: call "
            "torch.distributed.init_process_group() before the training, or start one process without torchrun."
        )


def shares(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Divide work fairly: the same division in every process, as equal in cost as can be had with equal numbers.

    Args:
        costs: of each piece of work, e.g. its tokens.
        parts: how many take part; with fewer pieces than parts, some get none.

    Returns:
        For each part the indices of its pieces, ascending; the numbers of pieces differ by at most one.
    """
    result: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    costliest_first = sorted(range(len(costs)), key=lambda piece: -costs[piece])
    for position, piece in enumerate(costliest_first):
        free = [part for part in range(parts) if len(result[part]) <= position // parts]
        part = min(free, key=lambda part: loads[part])
        result[part].append(piece)
        loads[part] += costs[piece]
    return [sorted(pieces) for pieces in result]


def add_up(value: Tensor) -> Tensor:
    """Replace a tensor by its sum over the processes, and return it."""
    if processes() > 1:
        dist.all_reduce(value)
    return value


@torch.no_grad()
def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their sums over the processes.

    Args:
        parameters: the same ones in every process, whether they have a gradient there or not: one that has none here
            (no micro-batch, an expert without tokens) counts as zero; one that has none anywhere keeps none.
    """
    parameters = list(parameters)
    if processes() == 1 or not parameters:
        return
    there = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device)
    somewhere = add_up(there.int()).tolist()
    for parameter, wanted in zip(parameters, somewhere, strict=True):
        if wanted and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            add_up(bucket[0])
            continue
        total = add_up(torch.cat([gradient.flatten() for gradient in bucket]))
        for gradient, part in zip(bucket, total.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view(gradient.shape))


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Put neighbours of one type together, up to `_BUCKET` numbers, so that few messages do."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        size = sum(member.numel() for member in bucket) + gradient.numel()
        if bucket and (size > _BUCKET or gradient.dtype != bucket[0].dtype or gradient.device != bucket[0].device):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def as_first_says(number: int, device: torch.device) -> int:
    """Return the first process's number in every process."""
    if processes() == 1:
        return number
    told = torch.tensor(number, device=device)
    dist.broadcast(told, src=0)
    return int(told)


def check_agreed(what: str, number: int, device: torch.device) -> None:
    """Wait until every process has come here, and see to it that they have the same number.

    Raises:
        StageError: they have not; `what` says what the number is.
    """
    if processes() == 1:
        return
    extremes = torch.tensor([number, -number], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MIN)
    least, most = int(extremes[0]), -int(extremes[1])
    if least != most:
        raise StageError(f"the processes of this training disagree: {what} is {least} in one and {most} in another.")

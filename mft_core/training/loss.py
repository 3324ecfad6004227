"""The training loss of a decoder, with logits computed only where a token counts in it.

Most tokens of a chat are prompt or padding, and the vocabulary is the widest matrix there is. The output embedding is
given only the positions that predict a loss token (a forward pre-hook), so whatever a family does to its logits
afterwards (soft-capping, scaling) still happens.

Where a family does nothing to them, and they are many, they are made, used and forgotten a part at a time, and made
again in the backward pass: 4,096 positions of a vocabulary of 128,256 take 0.9 GB so, 6.2 GB at once (float32, measured
on the CPU), for one more forward pass of the head. (`torch.nn.functional.linear_cross_entropy` takes 0.4 GB, but sums
the loss in bfloat16 where that is the dtype: torch 2.13 gave 10.6 for 11.8.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mft_core.data.batching import IGNORED
from mft_core.geometry import MOST_LOGITS
from mft_core.training import attention


class LossHead:
    """Computes losses of one model; a context manager, since it hooks the model's output embedding meanwhile."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._positions: Tensor | None = None

    def __enter__(self) -> Self:
        self._divisible = leaves_logits_alone(self._model)
        self._hook = self._model.get_output_embeddings().register_forward_pre_hook(self._pick)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _pick(self, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self._positions is not None
        return (inputs[0].flatten(0, 1).index_select(0, self._positions).unsqueeze(0), *inputs[1:])

    def summed_loss(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        """Return the cross-entropy (nats) summed over the loss tokens of a batch, weighted where it has weights.

        Args:
            batch: arguments of the model's forward pass; `labels` int64 [rows, width], -100 outside the loss, and
                their `loss_weights`, if any, are shifted here: position t predicts label t + 1.
        """
        next_labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
        positions = (next_labels != IGNORED).nonzero().squeeze(1)
        self._positions = positions.to(device)
        arguments = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name not in ("labels", "loss_weights")
        }
        if "position_ids" in batch:
            arguments |= attention.bounds(self._model, batch["position_ids"])
        targets = next_labels[positions].to(device)
        weights: Tensor | None = batch.get("loss_weights")
        if weights is not None:
            weights = functional.pad(weights[:, 1:], (0, 1)).flatten()[positions].to(device)
        rows = max(1, MOST_LOGITS // self._model.config.get_text_config().vocab_size)
        if self._divisible and len(targets) > rows:
            with self._losses_for_logits(targets, weights, rows):
                losses: Tensor = self._model(**arguments, use_cache=False).logits
                return losses.sum()
        logits = self._model(**arguments, use_cache=False).logits.squeeze(0)  # with a cache, packed rows would mix
        return _summed(logits, targets, weights)

    @contextlib.contextmanager
    def _losses_for_logits(self, targets: Tensor, weights: Tensor | None, rows: int) -> Iterator[None]:
        """Have the output embedding return its summed loss [1, 1, 1] instead of the logits, made `rows` at a time."""
        head: Any = self._model.get_output_embeddings()
        logits = head.forward

        def loss(hidden: Tensor) -> Tensor:
            targets_of = targets.split(rows)
            weights_of = [None] * len(targets_of) if weights is None else weights.split(rows)
            parts = zip(hidden.squeeze(0).split(rows), targets_of, weights_of, strict=True)
            nats = torch.stack([checkpoint(part_loss, *part, **_AS_BEFORE) for part in parts])
            return nats.view(-1, 1, 1).sum(0, keepdim=True)

        def part_loss(hidden: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
            return _summed(logits(hidden), targets, weights)

        head.forward = loss
        try:
            yield
        finally:
            del head.forward


_AS_BEFORE: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""the head draws no random numbers"""


def _summed(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return functional.cross_entropy(logits.float(), targets, reduction="sum")
    return functional.cross_entropy(logits.float(), targets, reduction="none") @ weights


@torch.no_grad()
def leaves_logits_alone(model: PreTrainedModel) -> bool:
    """Whether what the output embedding gives are the model's logits, to the bit.

    Tried on the model itself, with numbers of every size in place of the embedding's: a family that caps, scales or
    masks its logits would do so silently.
    """
    given: list[Tensor] = []

    def give(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        sizes = torch.logspace(-6, 6, output.numel(), dtype=torch.float32, device=output.device)
        signs = torch.arange(output.numel(), device=output.device) % 2 * 2 - 1
        given.append((sizes * signs).view(output.shape).to(output.dtype))
        return given[-1]

    with _evaluating(model), contextlib.ExitStack() as stack:
        hook = model.get_output_embeddings().register_forward_hook(give)
        stack.callback(hook.remove)
        ids = torch.arange(2, device=next(model.parameters()).device).unsqueeze(0)
        logits = model(input_ids=ids, use_cache=False).logits
    return logits.shape == given[0].shape and torch.equal(logits.float(), given[0].float())


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def packed_rows(model: PreTrainedModel, kernel: bool) -> Iterator[bool]:
    """Give the model the fastest attention that keeps packed examples apart; yields whether there is one.

    transformers sees to it for most families, with a mask; the others are trained on padded rows.

    Args:
        kernel: try `mft_core.training.attention` where it can run: the training is in bfloat16, without dropout.
    """
    config = model.config.get_text_config()
    before, apart = config._attn_implementation, False
    try:
        if kernel and attention.has_kernel(model):
            config._attn_implementation = attention.NAME
            with contextlib.suppress(NotImplementedError), torch.autocast(model.device.type, torch.bfloat16):
                apart = keeps_packed_apart(model)
        if not apart:
            config._attn_implementation = before
            apart = keeps_packed_apart(model)
        yield apart
    finally:
        config._attn_implementation = before


@torch.no_grad()
def keeps_packed_apart(model: PreTrainedModel) -> bool:
    """Whether examples packed into one row, told apart by restarting positions, do not see each other in this model.

    Tried on the model itself, since a family that mixes them would do so silently.
    """
    device = next(model.parameters()).device
    first, second = 3, 5
    ids = torch.arange(first + second, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    restarting = torch.cat([torch.arange(first), torch.arange(second)]).unsqueeze(0)

    def logits(ids: Tensor, positions: Tensor, **given: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False, **given, **attention.bounds(model, positions)).logits
        return found[:, -second:].float()

    with _evaluating(model):
        packed = logits(ids, restarting, position_ids=restarting.to(device))
        alone = logits(ids[:, first:], torch.arange(second))
        mixed = logits(ids, torch.arange(first + second))
    return bool((packed - alone).abs().max() < 0.1 * (mixed - alone).abs().max())

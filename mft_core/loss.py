"""The training loss of a decoder, with logits computed only where a token counts in it.

Most tokens of a chat are prompt or padding, and the vocabulary is the widest matrix there is. The output embedding is
given only the positions that predict a loss token (a forward pre-hook), so whatever a family does to its logits
afterwards (soft-capping, scaling) still happens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from mft_core.data.batching import IGNORED


class LossHead:
    """Computes losses of one model; a context manager, since it hooks the model's output embedding meanwhile."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._positions: Tensor | None = None

    def __enter__(self) -> LossHead:
        self._hook = self._model.get_output_embeddings().register_forward_pre_hook(self._pick)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _pick(self, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self._positions is not None
        return (inputs[0].flatten(0, 1).index_select(0, self._positions).unsqueeze(0), *inputs[1:])

    def summed_loss(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        """Return the cross-entropy (nats) summed over the loss tokens of a batch.

        Args:
            batch: arguments of the model's forward pass; `labels` int64 [rows, width], -100 outside the loss, are
                shifted here: position t predicts label t + 1.
        """
        next_labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
        positions = (next_labels != IGNORED).nonzero().squeeze(1)
        self._positions = positions.to(device)
        arguments = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name != "labels"
        }
        logits = self._model(**arguments, use_cache=False).logits.squeeze(0)  # with a cache, packed rows would mix
        return functional.cross_entropy(logits.float(), next_labels[positions].to(device), reduction="sum")


@torch.no_grad()
def keeps_packed_apart(model: PreTrainedModel) -> bool:
    """Whether examples packed into one row, told apart by restarting positions, do not see each other in this model.

    transformers sees to it for most families; the others are trained on padded rows. Tried on the model itself, since a
    family that mixes them would do so silently.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    lengths = (3, 5)
    ids = torch.arange(sum(lengths), device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(length, device=device) for length in lengths]).unsqueeze(0)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, lengths[0] :].float()
    alone = model(input_ids=ids[:, lengths[0] :], use_cache=False).logits.float()
    mixed = model(input_ids=ids, use_cache=False).logits[:, lengths[0] :].float()
    model.train(was_training)
    return bool((packed - alone).abs().max() < 0.1 * (mixed - alone).abs().max())

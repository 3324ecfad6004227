"""Which examples an optimizer step sees, and how they are laid out for the forward passes.

`plan_epochs` is a function of (examples, batch size, epochs, seed) and the step number alone: a resumed
run asks for step k and gets what an undisturbed run would have had, without replaying anything.
`micro_batches` cuts one step into forward passes; how it cuts changes speed and memory, never which tokens
are in the loss. Used by the training loop.

Packed rows rely on transformers recognising restarting `position_ids`, which it does only when neither an
attention mask nor a cache is in play: always call `model(**batch, use_cache=False)`, else packed examples
see each other (on a GPU `mft_core.training.attention` may do it instead). Tests compare packed with padded losses
token by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from mft_core.data.order import seeded_order
from mft_core.data.tokens import TokenDataset

IGNORED = -100
"""label of a token that is not in the loss, as Hugging Face models expect it"""


@dataclass(frozen=True)
class EpochPlan:
    """The example indices of every optimizer step; `plan[k]` is int64 [at most batch_size]."""

    examples: int
    batch_size: int
    seed: int
    visits: int
    """examples seen over all epochs, counted with repetition"""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one whole epoch; the last one takes what is left over."""
        return math.ceil(self.examples / self.batch_size)

    def __len__(self) -> int:
        epochs, rest = divmod(self.visits, self.examples)
        return epochs * self.steps_per_epoch + math.ceil(rest / self.batch_size)

    def __getitem__(self, step: int) -> np.ndarray:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        stop = min(start + self.batch_size, self.examples, self.visits - epoch * self.examples)
        return _epoch_order(self.examples, self.seed, epoch)[start:stop]


@lru_cache(maxsize=2)
def _epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    order = seeded_order(examples, seed, epoch)
    order.setflags(write=False)  # shared through the cache
    return order


def plan_epochs(examples: int, batch_size: int, epochs: float, seed: int) -> EpochPlan:
    """Plan all optimizer steps: every epoch is a fresh shuffle in which each example comes exactly once.

    Args:
        examples: number of training sequences, at least 1.
        batch_size: sequences per optimizer step; an epoch's last step may have fewer, none is lost.
        epochs: may be fractional: 1.5 is one epoch and the first half (rounded up) of the next shuffle.
        seed: of the shuffles.
    """
    if examples < 1 or batch_size < 1 or epochs <= 0:
        raise ValueError(f"examples {examples}, batch_size {batch_size}, epochs {epochs}: all must be positive")
    visits = math.ceil(round(examples * epochs, 6))  # 0.1 + 0.2 epochs of 10 examples are 3, not 4
    return EpochPlan(examples, batch_size, seed, visits)


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step, cut into forward passes."""

    batches: list[dict[str, torch.Tensor]]
    """arguments of the model's forward pass: input_ids, labels (the model shifts them), and attention_mask
    (padded) or position_ids (packed); each int64 [rows, width]. For a mean per sequence also `loss_weights`, float32
    [rows, width]: what each label counts in the summed loss"""
    loss_tokens: int
    """labels in the loss over the whole step"""
    tokens: int
    """tokens of the step's examples, without padding"""
    divisor: int
    """what the summed loss is divided by: `loss_tokens`; or, for a mean per sequence, the sequences that have some"""


def micro_batches(
    dataset: TokenDataset, indices: np.ndarray, micro_batch_tokens: int, packing: bool, per_sequence: bool = False
) -> StepBatches:
    """Cut one optimizer step into micro-batches of at most `micro_batch_tokens` tokens, padding included.

    Args:
        dataset: the training sequences.
        indices: the step's examples, int64 [batch].
        micro_batch_tokens: rows × width of one forward pass; only a single longer example goes beyond it.
        packing: several examples per row, told apart by restarting positions, instead of one padded example.
        per_sequence: the loss is the mean over sequences of the mean over their tokens, so each label weighs one over
            the labels of its sequence; otherwise the mean over all labels.
    """
    lengths = dataset.lengths
    longest_first = np.argsort(-lengths[indices], kind="stable")
    order = [int(index) for index in indices[longest_first]]
    rows = _pack(order, lengths) if packing else [[index] for index in order]
    groups = _group(rows, lengths, micro_batch_tokens)
    batches = [_collate(dataset, group, width, packing, per_sequence) for width, group in groups]
    in_loss = [int(dataset.example(index)[1].sum()) for index in order]
    divisor = sum(count > 0 for count in in_loss) if per_sequence else sum(in_loss)
    return StepBatches(batches, sum(in_loss), int(lengths[indices].sum()), divisor)


def _pack(order: list[int], lengths: np.ndarray) -> list[list[int]]:
    """Fill rows as wide as the longest example, first fit: attention costs no more than with padding."""
    width = int(lengths[order[0]]) if order else 0
    rows: list[list[int]] = []
    free: list[int] = []
    for index in order:
        length = int(lengths[index])
        row = next((position for position, space in enumerate(free) if space >= length), None)
        if row is None:
            rows.append([])
            free.append(width)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= length
    return rows


def _group(rows: list[list[int]], lengths: np.ndarray, limit: int) -> list[tuple[int, list[list[int]]]]:
    """Put rows of similar width together, rows × widest within the limit; returns the widest with its rows."""
    groups: list[tuple[int, list[list[int]]]] = []
    for width, row in sorted(((int(lengths[row].sum()), row) for row in rows), key=lambda pair: -pair[0]):
        if groups and (len(groups[-1][1]) + 1) * groups[-1][0] <= limit:
            groups[-1][1].append(row)
        else:
            groups.append((width, [row]))
    return groups


def _collate(
    dataset: TokenDataset, rows: list[list[int]], width: int, packing: bool, per_sequence: bool
) -> dict[str, torch.Tensor]:
    """Lay rows out as tensors [rows, width]; padding is token 0, outside loss and the examples' attention."""
    ids = np.zeros((len(rows), width), np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    attended = np.zeros((len(rows), width), np.int64)
    weights = np.zeros((len(rows), width), np.float32)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            tokens, in_loss = dataset.example(index)
            stop = start + len(tokens)
            ids[row, start:stop] = tokens
            labels[row, start:stop] = np.where(in_loss, tokens, IGNORED)  # never the first, see TokenDataset
            positions[row, start:stop] = np.arange(len(tokens))
            attended[row, start:stop] = 1
            weights[row, start:stop] = in_loss / max(1, in_loss.sum())
            start = stop
        positions[row, start:] = np.arange(width - start)  # padding is an example too
    extra = {"position_ids": positions} if packing else {"attention_mask": attended}
    tensors = {"input_ids": ids, "labels": labels, **extra, **({"loss_weights": weights} if per_sequence else {})}
    return {name: torch.from_numpy(array) for name, array in tensors.items()}

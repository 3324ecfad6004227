"""`MaskTuner` in loops that are not this project's: the masks are those of the plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from mft_core.masks.masking import MaskTuner
from mft_core.training import parallel
from tests.support.small_group import together
from tests.support.tiny import make_model

STEPS, PARTS = 12, 4
Masks = dict[str, Tensor]


def make_masked(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, MaskTuner]:
    """Return a model and what learns the masks of its layers 1 and 2."""
    model = make_model().to(dtype).train()
    return model, MaskTuner(model, sparsity=0.3, layers="1-2", lr=0.02, seed=5)


def steps() -> Iterator[list[Tensor]]:
    """Yield the micro-batches of each step: four, of two sequences of eight tokens."""
    draws = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield list(torch.randint(3, 60, (PARTS, 2, 8), generator=draws))


def loss_of(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of one micro-batch."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def plain(dtype: torch.dtype = torch.float32, prepare: Callable[[Any], Any] = lambda model: model) -> Masks:
    """Learn masks in the shortest loop there is."""
    model, tuner = make_masked(dtype)
    prepared = prepare(model)
    for parts in steps():
        for ids in parts:
            (loss_of(prepared, ids) / PARTS).backward()
        tuner.step()
    return tuner.masks()


def fresh_accelerator() -> Accelerator:
    """Return accelerate's object; between tests it would remember the last one's settings."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return Accelerator(gradient_accumulation_steps=PARTS // parallel.processes(), cpu=True)


def accelerated() -> Masks:
    """Learn masks of float32 weights in a loop of accelerate's kind; of several processes it makes DDP of the model."""
    accelerator = fresh_accelerator()
    model, tuner = make_masked()  # before `prepare`: DDP asks what is frozen when it is made
    prepared = accelerator.prepare(model)
    assert isinstance(prepared, nn.parallel.DistributedDataParallel) == (parallel.processes() > 1)
    for parts in steps():
        for ids in parts[accelerator.process_index :: accelerator.num_processes]:
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared, ids))
                if accelerator.sync_gradients:
                    tuner.step()
    return tuner.masks()


def added_up(dtype: torch.dtype) -> Masks:
    """Learn masks in such a loop without DDP, which takes no float32 gradients of bfloat16 weights."""
    accelerator = fresh_accelerator()
    model, tuner = make_masked(dtype)
    for parts in steps():
        for ids in parts[accelerator.process_index :: accelerator.num_processes]:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, ids) / accelerator.num_processes)  # a sum follows, not a mean
                if accelerator.sync_gradients:
                    parallel.add_up_gradients(weight for weight in model.parameters() if weight.requires_grad)
                    tuner.step()
    return tuner.masks()


def same(one: Masks, other: Masks) -> bool:
    """Say whether two sets of masks are equal."""
    return one.keys() == other.keys() and all(torch.equal(mask, other[name]) for name, mask in one.items())


def test_masks_move_in_this_test() -> None:
    _, untouched = make_masked()
    assert not same(plain(), untouched.masks())


def test_in_a_loop_of_accelerate() -> None:
    assert same(accelerated(), plain())


def test_in_two_processes_with_ddp() -> None:
    first, second = together(accelerated)
    assert same(first, second)
    assert same(first, plain())


@pytest.mark.slow
def test_in_two_processes_in_bfloat16() -> None:
    first, second = together(added_up, torch.bfloat16)
    assert same(first, second)
    assert same(first, plain(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_gradient_checkpointing(dtype: torch.dtype) -> None:
    def prepare(model: PreTrainedModel) -> PreTrainedModel:
        model.activation_checkpointing_enable({"use_reentrant": False})
        return model

    assert same(plain(dtype, prepare), plain(dtype))


def with_plain_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Take transformers' own attention: of torch's kernels, a compiled model uses others, which round otherwise."""
    model.set_attn_implementation("eager")
    return model


@pytest.mark.slow
def test_with_a_compiled_model() -> None:
    def prepare(model: PreTrainedModel) -> Any:
        return torch.compile(with_plain_attention(model), backend="aot_eager")

    assert same(plain(torch.bfloat16, prepare), plain(torch.bfloat16, with_plain_attention))

"""The attention of packed rows on a GPU: which models use the kernel, and what they give it.

The kernel's definition is in its place here; the kernel itself runs in tests/gpu.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mft_core.data.batching import micro_batches
from mft_core.data.tokens import TokenDataset
from mft_core.training import attention
from mft_core.training.loss import LossHead, packed_rows
from tests.support.tiny import make_model

CPU = torch.device("cpu")
LENGTHS = [17, 5, 9, 12, 3, 7, 2, 16, 1]


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    _: Tensor,
    longest: int,
    *__: int,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Return what `varlen_attn` does, an example at a time."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert longest == int(ends.diff().max())
    assert int(ends[-1]) == len(query)
    found = []
    for start, end in ends.unfold(0, 2, 1).tolist():
        distance = torch.arange(end - start).view(-1, 1) - torch.arange(end - start)
        seen = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        states = [each[start:end].transpose(0, 1) for each in (query, key, value)]
        attended = scaled_dot_product_attention(*states, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        found.append(attended.transpose(0, 1))
    return torch.cat(found)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the kernel's definition run here; returns how many examples each call had."""
    calls: list[int] = []

    def called(*states: Any, **settings: Any) -> Tensor:
        calls.append(len(states[3]) - 1)
        return by_definition(*states, **settings)

    monkeypatch.setattr(attention, "varlen_attn", called)
    monkeypatch.setattr(attention, "has_kernel", lambda model: model._supports_attention_backend)
    return calls


def data() -> TokenDataset:
    """Return examples of the lengths above."""
    random = np.random.default_rng(0)
    return TokenDataset.from_examples([(random.integers(3, 60, n), np.ones(n, bool)) for n in LENGTHS])


def lively(family: str, **changes: Any) -> Any:
    """Return a model that looks at other tokens more than a random one does."""
    model = make_model(family, **changes)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3
    return model


def losses(model: Any, head: LossHead, packing: bool, limit: int = 40) -> list[float]:
    """Return the loss of all examples, and the norm of each parameter's gradient."""
    found = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        for batch in micro_batches(data(), np.arange(len(LENGTHS)), limit, packing).batches:
            loss = head.summed_loss(batch, CPU)
            loss.backward()
            found += loss.item()
    gradients = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [found, *gradients]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4}),
        ("gpt2", {}),
        ("phi3", {}),
        ("mixtral", {}),
    ],
)
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones_through_the_kernel(
    family: str, changes: dict[str, Any], kernel: list[int]
) -> None:
    model = lively(family, **changes)
    before = model.config._attn_implementation
    with LossHead(model) as head:
        padded = losses(model, head, packing=False)
    assert not kernel
    with packed_rows(model, kernel=True) as packs, LossHead(model) as head:
        assert packs
        kernel.clear()
        packed = losses(model, head, packing=True)
    assert max(kernel) > 2  # several examples in one call
    assert packed == pytest.approx(padded, rel=0.03)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v3", "falcon"])
def test_models_that_do_more_than_the_kernel_keep_their_own_attention(family: str, kernel: list[int]) -> None:
    model = lively(family)
    before = model.config._attn_implementation
    with packed_rows(model, kernel=True):
        assert model.config._attn_implementation == before
    assert not kernel


def test_the_kernel_recomputes_activations_in_the_backward_pass(kernel: list[int]) -> None:
    model = lively("llama")
    with packed_rows(model, kernel=True), LossHead(model) as head:
        plain = losses(model, head, packing=True)
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        kernel.clear()
        assert losses(model, head, packing=True) == pytest.approx(plain, rel=1e-3)
    assert len(kernel) == 2 * 4 * len(micro_batches(data(), np.arange(len(LENGTHS)), 40, True).batches)


def test_without_a_gpu_or_in_float32_the_model_keeps_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    with packed_rows(model, kernel=False) as packs:
        assert packs
        assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    with packed_rows(model, kernel=True) as packs:
        assert packs
        assert model.config._attn_implementation == "sdpa"

"""Attention of packed rows on a GPU: one call of a kernel that is told where each example begins, `varlen_attn`.

Without it transformers makes a mask [rows, 1, width, width] of the restarting positions, with which attention computes
all pairs of a row and loses its fast kernel: at 4,096 tokens that costs more than packing saves. The kernel is
FlashAttention's, so it takes bfloat16 (under autocast too) and compute capability 8; float32, and a model that does
more in its attention than the kernel can, keep the mask. Used by `mft_core.training.loss`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "mft_examples"
"""by which transformers knows it; since no mask goes by that name, it makes none"""
_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch before 2.13 takes fewer key than query heads without being told"""
_NOT_IN_KERNEL = ("softcap", "s_aux", "position_bias")


def has_kernel(model: PreTrainedModel) -> bool:
    """Say whether a bfloat16 training of the model, where it lies, can try the kernel.

    Families that transformers gives to FlashAttention need no mask but the causal one and that of a sliding window.
    """
    device = next(model.parameters()).device
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and bool(model._supports_flash_attn and model._supports_attention_backend)
    )


def bounds(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """Return the arguments that tell the kernel where examples begin; none where the model's attention is another.

    Args:
        position_ids: int64 [rows, width], 0 where an example begins.
    """
    if model.config.get_text_config()._attn_implementation != NAME:
        return {}
    starts = (position_ids == 0).flatten().nonzero().squeeze(1)
    ends = pad(starts, (0, 1), value=position_ids.numel())
    longest = int(ends.diff().max())
    ends = ends.to(next(model.parameters()).device, torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers has it: states [rows, heads, width, size] to [rows, width, heads, size].

    Raises:
        NotImplementedError: the model asks for what the kernel has not.
    """
    if cu_seq_lens_q is None:  # rows of one example each
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    rows, heads, width, size = query.shape
    asked = [name for name in _NOT_IN_KERNEL if others.get(name) is not None]
    fits = size % 8 == 0 and size <= 256 and value.shape[-1] == size
    if asked or attention_mask is not None or others.get("dropout") or not fits:
        raise NotImplementedError(f"{type(module).__name__}: {asked}, heads of {size} and {value.shape[-1]}")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    q, k, v = (each.transpose(1, 2).reshape(-1, each.shape[1], size).to(dtype) for each in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    ends, longest = cu_seq_lens_q, max_length_q
    attended: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, **_GQA)
    return attended.view(rows, width, heads, size), None


AttentionInterface.register(NAME, _attend)

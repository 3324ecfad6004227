"""GGUF files of tiny Llamas, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedModel

from tests.support.tiny import TULU, make_tokenizer

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, model: PreTrainedModel, kind: str = "Q4_1") -> dict[str, np.ndarray]:
    """Write a Llama whose matrices of the layers are of type `kind`.

    Returns:
        by name in the checkpoint, the values that the file gives its weights.
    """
    config, tokenizer = model.config, json.loads(make_tokenizer().backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TULU.read_text())
    given = {}
    for name, weight in model.state_dict().items():
        of_layer = name.startswith("model.layers.") and weight.ndim == 2
        array, quantised = weight.float().numpy(), gguf.GGMLQuantizationType[kind if of_layer else "F32"]
        stored = gguf.quantize(_rotated(name, array, config), quantised)
        read = gguf.dequantize(stored, quantised)
        given[name] = read if read.shape != array.shape else _rotated(name, read, config, back=True)
        writer.add_tensor(_name(name), stored, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return given


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _OTHERS:
        return f"{_OTHERS[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def _rotated(name: str, array: np.ndarray, config: object, back: bool = False) -> np.ndarray:
    """Order the rows of queries and keys as llama.cpp's rotary embedding has them, or back."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return array
    count = getattr(config, heads)
    half = array.shape[0] // count // 2
    shape = (count, half, 2) if back else (count, 2, half)
    return array.reshape(*shape, array.shape[1]).swapaxes(1, 2).reshape(array.shape)

"""Models and tokenizers small enough to be made in a test: no download, the same bytes every time.

`make_tokenizer` and `make_model` return fresh objects; `save_checkpoint` writes both to a directory.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import mft_core.data

TULU = Path(mft_core.data.__file__).parent / "templates" / "tulu.jinja"
_SENTENCES = (
    "What is the sum of seven and five? The sum of seven and five is twelve.",
    "Sort the words apple, cherry, banana. The sorted words are apple, banana, cherry.",
    "<|system|>\nYou are a helpful assistant.\n<|user|>\nWhat is 3 + 4?\n<|assistant|>\nThe answer is 7.",
    "<|user|>\nReverse the word stone.\n<|assistant|>\nThe reversed word is enots.\n<|user|>\nThank you!",
)


@functools.cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    return tokenizer.to_str()


def make_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of at most 400 tokens, with the tulu template or none; `</s>` ends a turn."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
    )
    if chat_template:
        tokenizer.chat_template = TULU.read_text()
    return tokenizer


_TIED = {"tie_word_embeddings": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_FAMILIES: dict[str, dict[str, Any]] = {
    # what a family calls otherwise, needs besides or (None) cannot be given; what is published tied is tied
    "gemma2": _TIED,
    "gemma3_text": _TIED,
    "gpt2": {"n_inner": 64, **_TIED},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, **_TIED},
    "falcon": {"head_dim": None, "ffn_hidden_size": 64, "num_kv_heads": 2, **_TIED},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [2]},
    "qwen3_moe": _EXPERTS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "head_dim": None, "num_key_value_heads": 4,
    },
    "mpt": {"head_dim": None},
}  # fmt: skip
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def make_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random float32 decoder: 4 layers, 32 hidden, 64 intermediate, vocabulary of `make_tokenizer`.

    Args:
        family: a `model_type` of transformers, such as llama, gpt2, mixtral; gemma3 has a tower for images, of as many
            layers.
        seed: of the initial weights.
        changes: fields of the configuration; None leaves one at the family's default.
    """
    tokenizer = make_tokenizer()
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    fields = {key: value for key, value in (fields | _FAMILIES.get(family, {}) | changes).items() if value is not None}
    if family == "gemma3":
        tower = {**_TOWER, "num_hidden_layers": fields["num_hidden_layers"]}
        fields = {"text_config": fields, "vision_config": tower, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model(family, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def save_checkpoint(directory: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write the model and the tokenizer to `directory` as `from_pretrained` expects them, and return it."""
    make_model(family, seed, **changes).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory

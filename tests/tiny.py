"""Models and tokenizers small enough to be made in a test: no download, the same bytes every time.

`make_tokenizer` and `make_model` return fresh objects; `save_checkpoint` writes both to a directory.
"""

from __future__ import annotations

import functools
from pathlib import Path

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


def make_model(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """Return a random float32 decoder: 4 layers, 32 hidden, 64 intermediate, vocabulary of `make_tokenizer`.

    Args:
        family: a `model_type` of transformers whose config takes the usual names: llama, qwen2, gemma
        seed: of the initial weights.
    """
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def save_checkpoint(directory: Path, family: str = "llama", seed: int = 0) -> Path:
    """Write the model and the tokenizer to `directory` as `from_pretrained` expects them, and return it."""
    make_model(family, seed).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory

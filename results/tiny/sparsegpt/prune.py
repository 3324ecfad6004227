"""SparseGPT of layers 2-5 of a fine-tuned `tiny`, by llmcompressor: `python prune.py CHECKPOINT OUT SHARE DATA`.

DATA is the folder of the profile's rows, of which 128 of the mixture calibrate. For an environment of its own:
`pip install torch==2.13.0 llmcompressor==0.14.0.1`, whose pins of transformers exclude this project's.
"""

import json
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint, out, share, data = sys.argv[1:]
mixture = {"arithmetic": 2_000, "number_theory": 1_200, "symbols": 600}
lines = [line for name, rows in mixture.items() for line in (Path(data) / f"{name}.jsonl").open().readlines()[:rows]]
random.Random(0).shuffle(lines)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
made = [tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True) for line in lines[:128]]
oneshot(
    model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
    dataset=Dataset.from_list([{key: row[key] for key in ("input_ids", "attention_mask")} for row in made]),
    recipe=[SparseGPTModifier(sparsity=float(share), targets=[r"re:model\.layers\.[2-5]\.(self_attn|mlp)\..*_proj$"])],
    max_seq_length=128,
    num_calibration_samples=128,
    output_dir=out,
)
tokenizer.save_pretrained(out)

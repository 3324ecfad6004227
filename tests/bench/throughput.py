"""Training of a 7-billion-parameter model on one GPU, packed by a kernel, packed with a mask, and padded: `make bench`.

    python -m tests.bench.throughput [--geometry llama2-7b] [--steps 3] [--out results/bench]

Steps of mask learning and of full fine-tuning (8-bit AdamW, activations recomputed) in bfloat16, on random weights made
on the GPU and rows of 40 to 900 tokens; and with one row of 4,096 tokens among 16, for which rows are 4,096 wide.
Reported are useful tokens per second (padding does not count), the share of the card's dense bfloat16 peak that the
model's own operations come to (MFU: those of `mft_core.stages.flops_and_memory`, recomputation not counted), and the
peak of tensor memory. Without a GPU it says so in one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mft_core.data.batching import micro_batches
from mft_core.data.tokens import TokenDataset
from mft_core.geometry import read_geometry
from mft_core.layers import format_layers, parse_layers
from mft_core.masks.masking import MaskTuner
from mft_core.optimizers.factory import optimizer_factory
from mft_core.recipes import FineTune, LearnMask, Runtime, Training
from mft_core.stage import Facts
from mft_core.stages import flops_and_memory
from mft_core.training import attention
from mft_core.training.activations import recompute_activations
from mft_core.training.full_tuning import FullTuner
from mft_core.training.loss import LossHead, packed_rows
from tests.bench.report import describe_machine, markdown, write
from tests.bench.rows import make_rows
from tests.bench.worker import GEOMETRIES, Job, make_model

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""dense bfloat16 operations a second, by what is in the name"""
LAYOUTS = {"kernel": (True, True), "mask": (True, False), "padded": (False, False)}
"""whether rows are packed, and whether by the variable-length kernel"""
BATCH = 32
CONTEXT = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    kind: str
    """'mask' or 'full'"""
    layout: str
    context: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.layout}, rows to {self.context} tokens"


def _training(kind: str) -> Training:
    return Training(
        learning_rate=1e-5,
        epochs=1,
        batch_size=BATCH,
        precision="bfloat16",
        optimizer="adamw" if kind == "mask" else "adamw-8bit",
    )


def _trainable(kind: str, model: Any, layers: str) -> FullTuner | MaskTuner:
    factory = optimizer_factory(_training(kind))
    if kind == "full":
        recompute_activations(model, noise=False)
        return FullTuner(model, optimizer=factory)
    return MaskTuner(model, sparsity=0.1, layers=layers, optimizer=factory, init="normal", seed=0)


def _flops(kind: str, geometry: str, layers: str, length: float) -> float:
    """Return the operations of a token's passes."""
    facts = Facts(
        read_geometry({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **GEOMETRIES[geometry]}),
        Runtime(),
        "bfloat16",
        CONTEXT,
        train=1,
        length=length,
    )
    if kind == "full":
        return flops_and_memory.fine_tune(FineTune(training=_training(kind)), facts).flops / length
    recipe = LearnMask(sparsity=0.1, layers=layers, score_init="normal", training=_training(kind))
    return flops_and_memory.learn_mask(recipe, facts).flops / length


def _step(trainable: Any, head: LossHead, data: TokenDataset, indices: np.ndarray, tokens: int, packing: bool) -> int:
    step = micro_batches(data, indices, tokens, packing)
    for batch in step.batches:
        with torch.autocast("cuda", torch.bfloat16):
            loss = head.summed_loss(batch, torch.device("cuda")) / step.divisor
        loss.backward()
    trainable.step()
    return step.tokens


def measure(case: Case, trainable: Any, data: TokenDataset, options: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second and peak memory over some steps, after one that is not counted."""
    packing, kernel = LAYOUTS[case.layout]
    model = trainable.model.train()
    torch.cuda.reset_peak_memory_stats()
    tokens, took = 0, 0.0
    with packed_rows(model, kernel) as apart, LossHead(model) as head:
        used = model.config._attn_implementation
        assert apart
        assert (used == attention.NAME) == kernel, f"the model's attention is {used}"
        for number in range(options.steps + 1):
            indices = np.arange(number * BATCH, (number + 1) * BATCH)
            torch.cuda.synchronize()
            began = time.perf_counter()
            passed = _step(trainable, head, data, indices, options.tokens, packing)
            torch.cuda.synchronize()
            if number:
                tokens, took = tokens + passed, took + time.perf_counter() - began
    return {"tokens": tokens, "seconds": took, "peak": torch.cuda.max_memory_allocated(), "attention": used}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; a model is made once for each kind of training."""
    card = torch.cuda.get_device_name()
    peak = next((number for name, number in PEAKS.items() if name in card), None)
    geometry, count = GEOMETRIES[options.geometry], BATCH * (options.steps + 1)
    layers = format_layers(tuple(parse_layers("middle:4", int(geometry["num_hidden_layers"]))))
    data = {
        900: make_rows(count, geometry["vocab_size"]),
        CONTEXT: make_rows(count, geometry["vocab_size"], CONTEXT, 16),
    }
    rows = []
    for kind in ("mask", "full"):
        job = Job("", options.geometry, "cuda", "bfloat16", [], 0.1, 0)
        began = time.perf_counter()
        trainable = _trainable(kind, make_model(job), layers)
        print(f"a model for {kind} is made in {time.perf_counter() - began:.1f} s", flush=True)
        for context, sequences in data.items():
            for layout in LAYOUTS:
                if kind == "full" and layout == "padded" and context == CONTEXT:
                    continue  # four times the work of the packed ones, to show what the mask's rows show
                case = Case(kind, layout, context)
                began = time.perf_counter()
                try:
                    found = measure(case, trainable, sequences, options)
                except torch.OutOfMemoryError as error:
                    print(f"{case}: {str(error).splitlines()[0]}", flush=True)
                    trainable.discard_gradients()
                    continue
                length = float((sequences.lengths**2).sum() / sequences.lengths.sum())  # that a token sees
                speed = found["tokens"] / found["seconds"]
                work = speed * _flops(kind, options.geometry, layers, length)
                row = {**dataclasses.asdict(case), **found, "tokens_per_second": speed, "flops_per_second": work}
                rows.append({**row, "mfu": None if peak is None else work / peak})
                took = time.perf_counter() - began
                print(f"{case}: {speed:,.0f} tokens/s, {work / 1e12:.0f} Tflop/s ({took:.0f} s)", flush=True)
        del trainable
        gc.collect()
        torch.cuda.empty_cache()
    config = {"geometry": options.geometry, "layers": layers, "batch": BATCH, "micro_batch_tokens": options.tokens}
    return {"config": config, "card": card, "machine": describe_machine("cuda"), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [["training", "rows", "layout", "useful tokens/s", "MFU", "peak memory, GB"]]
    titles = {"kernel": "packed, variable-length kernel", "mask": "packed, dense mask", "padded": "padded"}
    for row in result["rows"]:
        share = "?" if row["mfu"] is None else f"{row['mfu']:.1%}"
        spread = "40-900 tokens" if row["context"] == 900 else f"40-900 tokens, 1 in 16 of {row['context']:,}"
        speed = f"{row['tokens_per_second']:,.0f}"
        lines.append([row["kind"], spread, titles[row["layout"]], speed, share, f"{row['peak'] / 1e9:.1f}"])
    config, packages = result["config"], result["machine"]["packages"]
    about = (
        f"{config['geometry']} geometry, random weights, bfloat16; {result['card']}; steps of {config['batch']} rows, "
        f"micro-batches of {config['micro_batch_tokens']:,} tokens; mask: layers {config['layers']}; full: 8-bit "
        f"AdamW, activations recomputed. torch {packages['torch']}, transformers {packages['transformers']}."
    )
    return f"{about}\n\n{markdown(lines)}\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Training throughput on a GPU.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama2-7b")
    parser.add_argument("--tokens", type=int, default=8192, help="of one micro-batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    options = parser.parse_args()
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        print("throughput at 7B geometry: skipped, torch finds no CUDA device here")
        return
    result = run(options)
    write(options.out, f"throughput-{options.geometry}", result, table(result))


if __name__ == "__main__":
    main()

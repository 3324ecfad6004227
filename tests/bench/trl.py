"""Fine-tuning throughput against TRL's `SFTTrainer`, padded and packed: `make bench`.

    python -m tests.bench.trl [--geometry smollm2-135m] [--device cpu] [--rows 24] [--batch 8] [--out results/bench]

The same random model, the same rows of 40 to 900 tokens with the second half in the loss, the same optimizer (fused
AdamW on float32 weights, clipped, computed in the same precision) and rows of the same longest length; an optimizer
step of TRL is of as many tokens: `--batch` padded rows, or half as many packed ones. Nothing is recomputed in the
backward pass. Useful tokens per second, so without padding; the first step of each is not counted. The bars: 1.5 times
TRL padded, 1.2 times TRL packed. On a GPU TRL is measured packed with `flex_attention`, too, and with flash attention
where that is installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mft_core.data.tokens import TokenDataset
from mft_core.optimizers.factory import optimizer_factory
from mft_core.recipes import Runtime, Training
from mft_core.stage import Progress, StageContext
from mft_core.training.full_tuning import FullTuner
from mft_core.training.loop import TrainingData, train
from tests.bench.memory import process_peak
from tests.bench.report import describe_machine, markdown, write
from tests.bench.rows import LONGEST, make_rows
from tests.bench.worker import GEOMETRIES, Job, make_model

BARS = {"padded": 1.5, "packed": 1.2}


class Clock:
    """When each step began or ended, and how many useful tokens had passed by then."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.marks: list[tuple[float, int]] = []

    def mark(self, tokens: int) -> None:
        """Note the time, and how many tokens have been trained on so far."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), tokens))

    def speed(self) -> float:
        """Return tokens per second from the first mark to the last."""
        (began, first), (ended, last) = self.marks[0], self.marks[-1]
        return (last - first) / (ended - began)


def ours(model: Any, rows: TokenDataset, options: argparse.Namespace) -> Clock:
    """Train one epoch through this project's loop."""
    clock = Clock(options.device)
    recipe = Training(
        learning_rate=1e-5,
        epochs=1,
        batch_size=options.batch,
        schedule="constant",
        precision=options.precision,
        max_grad_norm=1.0,
    )

    def report(progress: Progress) -> None:
        clock.mark(int(progress.metrics["tokens"]))

    with tempfile.TemporaryDirectory() as work:
        runtime = Runtime(device=options.device, checkpoint_seconds=1e9)
        context = StageContext(runtime, Path(work), report, logging.getLogger("bench"))
        data = TrainingData(rows, TokenDataset.from_examples([]))
        train(FullTuner(model, optimizer=optimizer_factory(recipe)), data, recipe, context)
    return clock


def trl(model: Any, rows: TokenDataset, options: argparse.Namespace, packing: bool) -> Clock:
    """Train one epoch with TRL."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.support.tiny import make_tokenizer

    clock = Clock(options.device)

    class Timed(SFTTrainer):
        """SFTTrainer that counts its tokens."""

        seen = 0

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            attended = inputs.get("attention_mask")
            self.seen += int(inputs["input_ids"].numel() if attended is None else attended.sum())
            clock.mark(self.seen)
            return loss

    examples = [rows.example(index) for index in range(len(rows))]
    data = Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids, _ in examples],
            "labels": [np.where(kept, ids, -100).tolist() for ids, kept in examples],
        }
    )
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            max_length=LONGEST,
            packing=packing,
            per_device_train_batch_size=max(1, options.batch // 2) if packing else options.batch,
            num_train_epochs=1,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=options.precision == "bfloat16",
            use_cpu=options.device == "cpu",
            gradient_checkpointing=False,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Timed(model=model, args=config, train_dataset=data, processing_class=make_tokenizer()).train()
    return clock


def variants(options: argparse.Namespace) -> dict[str, tuple[str, Callable[[Any, TokenDataset], Clock]]]:
    """Return what is measured: the attention that transformers is to use, and the training."""

    def packed(model: Any, rows: TokenDataset) -> Clock:
        return trl(model, rows, options, packing=True)

    found: dict[str, tuple[str, Callable[[Any, TokenDataset], Clock]]] = {
        "this project": ("sdpa", lambda model, rows: ours(model, rows, options)),
        "TRL padded": ("sdpa", lambda model, rows: trl(model, rows, options, packing=False)),
        "TRL packed": ("sdpa", packed),
    }
    if options.device == "cuda":
        found["TRL packed, flex_attention"] = ("flex_attention", packed)
        if importlib.util.find_spec("flash_attn"):
            found["TRL packed, flash attention"] = ("flash_attention_2", packed)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every variant in turn, each on a model of its own."""
    rows = make_rows(options.rows, GEOMETRIES[options.geometry]["vocab_size"])
    found: dict[str, dict[str, Any]] = {}
    for name, (attention, work) in variants(options).items():
        model = make_model(Job("", options.geometry, options.device, "float32", [], 0.0, 0))
        model.set_attn_implementation(attention)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            clock = work(model, rows)
        except Exception as error:  # of a variant that does not run here: the others still count
            print(f"{name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        finally:
            del model
            gc.collect()
        on_gpu = options.device == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else process_peak()
        if on_gpu:
            torch.cuda.empty_cache()
        found[name] = {"tokens_per_second": clock.speed(), "steps": len(clock.marks), "peak": peak}
        print(f"{name}: {clock.speed():,.0f} useful tokens/s, {peak / 1e9:.1f} GB", flush=True)
    config = {**vars(options), "out": str(options.out), "longest": LONGEST, "useful": int(rows.lengths.sum())}
    return {"config": config, "machine": describe_machine(options.device), "variants": found}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [["", "useful tokens/s", "this project's speed by it", "bar", "peak memory so far, GB"]]
    mine = result["variants"]["this project"]["tokens_per_second"]
    for name, row in result["variants"].items():
        bar = next((f">= {number}" for kind, number in BARS.items() if kind in name), "")
        ratio = f"{mine / row['tokens_per_second']:.2f}"
        lines.append([name, f"{row['tokens_per_second']:,.0f}", ratio, bar, f"{row['peak'] / 1e9:.2f}"])
    config, machine = result["config"], result["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    packages = machine["packages"]
    about = (
        f"{config['geometry']} geometry, random weights, {config['precision']}; {config['rows']} rows of 40-900 tokens "
        f"({config['useful']:,} in all), {config['batch']} a step. {where}; torch {packages['torch']}, transformers "
        f"{packages['transformers']}."
    )
    return f"{about}\n\n{markdown(lines)}\n"


def main() -> None:
    """Run the command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Fine-tuning throughput against TRL.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="smollm2-135m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--rows", type=int, help="default: 24 on the CPU, 640 on a GPU")
    parser.add_argument("--batch", type=int, help="rows of an optimizer step; default: 8 on the CPU, 32 on a GPU")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.precision = options.precision or ("bfloat16" if gpu else "float32")
    options.rows, options.batch = options.rows or (640 if gpu else 24), options.batch or (32 if gpu else 8)
    result = run(options)
    write(options.out, f"trl-{options.geometry}-{options.device}", result, table(result))


if __name__ == "__main__":
    main()

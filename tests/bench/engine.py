"""The engine `hf` beside plain `generate` in its best fixed batch: useful tokens per second on the same prompts.

    python -m tests.bench.engine [--model DIRECTORY | --geometry llama2-7b] [--device cuda] [--items 300] [--rounds 3]

A useful token is one of an answer up to its end; what is decoded beyond an end, or for the other answers of a batch, is
not. Two regimes: every answer takes all its tokens, and answers end where the model ends them. `generate` is given the
same prompts sorted by length, and tried once with every batch size; the best goes into the rounds. In a round both take
their turn in this process on the same model, so whatever else the machine does, it does to both; the ratio is taken
within a round, on a CPU also that of processor time, which other work changes less. A geometry has random weights,
whose answers would not end: there a token ends an answer where token and position say so, the same for both.

The bar: at least 0.95 of the useful tokens per second of `generate`, in both regimes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from tokenizers import AddedToken

from mft_core.data.chat_template import read_tokenizer
from mft_core.evaluation.engine_hf import HuggingFace
from mft_core.evaluation.lm_eval_harness import settled
from mft_core.recipes import Evaluate, Runtime
from tests.bench.report import describe_machine, write
from tests.bench.variants import SEED
from tests.bench.worker import DTYPES, GEOMETRIES, Job, make_model
from tests.support.tiny import make_tokenizer

BAR = 0.95
ENDS_ONE_IN = 97
"""of a geometry's tokens: so many does an answer have on the average where it may end"""
Answers = dict[int, list[int]]
"""token ids of an item's answer, up to and with its end"""


def prompts(count: int) -> list[str]:
    """Return questions of different lengths, the same every time."""
    draw = random.Random(SEED)
    kinds: list[Callable[[], str]] = [
        lambda: f"What is {draw.randint(1, 99)} plus {draw.randint(1, 99)}?",
        lambda: f"Write one sentence about the number {draw.randint(1, 99)}.",
        lambda: (
            f"Tom has {draw.randint(60, 99)} apples and buys {draw.randint(1, 99)} more. He gives "
            f"{draw.randint(1, 59)} to a friend. How many are left? Answer with a number only."
        ),
        lambda: (
            f"A shop sells {draw.randint(2, 99)} boxes of {draw.randint(2, 40)} pens each, and {draw.randint(1, 99)} "
            "loose pens. Half of them are blue. Explain step by step how many blue pens the shop sells."
        ),
    ]
    return [draw.choice(kinds)() for _ in range(count)]


def save_geometry(name: str, device: str, precision: str, folder: Path) -> Path:
    """Write a geometry's model with random weights, and a tokenizer that has a text for each of its tokens."""
    model = make_model(Job("dense", name, device, precision, [], 0.0, 0))
    tokenizer = make_tokenizer()
    missing = range(len(tokenizer), GEOMETRIES[name]["vocab_size"])
    tokenizer.add_tokens([AddedToken(f"w{number}", normalized=False) for number in missing])
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def end_by_position(model: Any) -> None:
    """Let a model end its answers after tokens and positions of its own, whatever batch they are in."""
    end = model.generation_config.eos_token_id

    def after(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        place = given["input_ids"][:, -1] * 31 + given["position_ids"][:, -1]
        output.logits[:, -1, end] += torch.where(place % ENDS_ONE_IN == 0, 1e4, -1e4).to(output.logits.dtype)

    model.register_forward_hook(after, with_kwargs=True)


class Contenders:
    """Both ways to answer the same prompts with one model."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.device, self.most, self.tokenizer = options.device, options.new_tokens, read_tokenizer(path)
        recipe = Evaluate(task="none", precision=options.precision)
        self.engine = HuggingFace(recipe, path, Runtime(), self.device, self.tokenizer, lambda _: None)
        self.model = self.engine.model
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts(options.items)]
        self.prompts = [self.engine.apply_chat_template(turn) for turn in turns]
        ends = self.model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends)
        self.answers: Answers = {}

    def plain(self, batch: int) -> list[str]:
        """Have `generate` answer so many prompts at a time; keeps the tokens."""
        order = sorted(range(len(self.prompts)), key=lambda item: -len(self.prompts[item]))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            texts = [self.prompts[item] for item in chosen]
            encoded = self.encoded(texts)
            made = self.model.generate(**encoded, max_new_tokens=self.most)[:, encoded["input_ids"].shape[1] :]
            self.answers.update(zip(chosen, map(self._up_to_end, made.tolist()), strict=True))
        return [self.tokenizer.decode(self.answers[item], skip_special_tokens=True) for item in range(len(order))]

    def encoded(self, texts: list[str]) -> dict[str, Any]:
        """Return what `generate` is given for a batch of prompts."""
        asked = {"padding": True, "padding_side": "left", "add_special_tokens": False}
        encoded = self.tokenizer(texts, return_tensors="pt", **asked).to(self.device)
        tensors = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return {**tensors, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        return tokens[: next((place for place, token in enumerate(tokens, 1) if token in self.ends), len(tokens))]

    def ours(self) -> list[str]:
        """Have the engine answer, as lm-eval does."""
        settings = {"until": [], "max_gen_toks": self.most, "do_sample": False}
        asked = [Instance("generate_until", {}, (text, dict(settings)), at) for at, text in enumerate(self.prompts)]
        return self.engine.generate_until(asked)


def timed(work: Callable[[], list[str]], device: str) -> tuple[float, float, list[str]]:
    """Return the seconds on the clock and of the processor that work took, and what it returned."""
    wall, processor = time.perf_counter(), time.process_time()
    answers = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor, answers


def measure(both: Contenders, batches: list[int], rounds: int) -> dict[str, Any]:
    """Return what one regime took."""
    device = both.device
    both.model.generate(**both.encoded(both.prompts[: max(batches)]), max_new_tokens=4)  # kernels and memory are found
    tried = {size: timed(lambda size=size: both.plain(size), device)[0] for size in batches}
    best = min(tried, key=lambda size: tried[size])
    useful = sum(map(len, both.answers.values()))
    _say(f"{useful} useful tokens; generate: " + ", ".join(f"batch {b} {s:.1f} s" for b, s in tried.items()))
    taken: dict[str, list[tuple[float, float]]] = {"engine": [], "generate": []}
    texts: dict[str, list[str]] = {}
    work = {"engine": both.ours, "generate": lambda: both.plain(best)}
    for number in range(rounds):
        for name in sorted(work, reverse=bool(number % 2)):
            wall, processor, texts[name] = timed(work[name], device)
            taken[name].append((wall, processor))
        _say(f"round {number + 1}: " + ", ".join(f"{n} {t[-1][0]:.1f} s ({t[-1][1]:.1f})" for n, t in taken.items()))
    ratios = [
        [other[clock] / own[clock] for own, other in zip(taken["engine"], taken["generate"], strict=True)]
        for clock in range(2)
    ]
    return {
        "useful_tokens": useful,
        "seconds_by_batch": tried,
        "best_batch": best,
        "engine_batch": both.engine.batch_size_per_gpu,
        "seconds": {name: [wall for wall, _ in each] for name, each in taken.items()},
        "tokens_per_second": {n: useful / statistics.median(wall for wall, _ in each) for n, each in taken.items()},
        "ratio": ratios[0],
        "ratio_of_processor_time": ratios[1],
        "equal_texts": sum(one == other for one, other in zip(texts["engine"], texts["generate"], strict=True)),
    }


def table(result: dict[str, Any]) -> str:
    """Return a measurement as Markdown."""
    config, machine = result["config"], result["machine"]
    lines = [
        f"# Engine `hf` against plain `generate`: {config['model']}, {config['items']} items × "
        f"{config['new_tokens']} tokens, {config['precision']}",
        "",
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads. Ratio: useful tokens per second of "
        f"the engine to those of `generate`, median and range of {config['rounds']} rounds; bar: {BAR}.",
        "",
        "| answers | useful tokens | `generate`, best batch | engine, batch | ratio | processor time | equal texts |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in result["regimes"].items():
        speed = one["tokens_per_second"]
        ratios = [
            f"{statistics.median(each):.2f} ({min(each):.2f}–{max(each):.2f})"
            for each in (one["ratio"], one["ratio_of_processor_time"])
        ]
        lines.append(
            f"| {name} | {one['useful_tokens']} | {speed['generate']:.0f} tokens/s, {one['best_batch']} | "
            f"{speed['engine']:.0f} tokens/s, {one['engine_batch']} | "
            f"{ratios[0]} | {'' if machine['gpu'] else ratios[1]} | "
            f"{one['equal_texts']} of {config['items']} |"
        )
    return "\n".join(lines) + "\n"


def _say(text: str) -> None:
    print(f"[{time.perf_counter() - _STARTED:5.0f} s] {text}", flush=True)


def run(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Measure both regimes."""
    both = Contenders(path, options)
    _say(f"{options.geometry or path.name} on {options.device}, {options.precision}, is loaded")
    regimes = {}
    if options.geometry:
        end_by_position(both.model)
    settings = both.model.generation_config
    for name in options.regimes:
        settings.suppress_tokens = sorted(both.ends) if name == "full" else None
        _say(f"answers that are {name}")
        regimes[name] = measure(both, options.batches, options.rounds)
    return {
        "config": {
            "model": options.geometry or path.name,
            "items": options.items,
            "new_tokens": options.new_tokens,
            "precision": options.precision,
            "rounds": options.rounds,
        },
        "machine": describe_machine(options.device),
        "regimes": regimes,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="The engine hf against plain generate.")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, help="directory of a checkpoint with its tokenizer and a chat template")
    model.add_argument(
        "--geometry",
        choices=GEOMETRIES,
        help="random weights of this shape; default: llama2-7b on a GPU, smollm2-135m else",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--precision", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--items", type=int, help="default: 300 on a GPU, 48 else")
    parser.add_argument("--new-tokens", type=int, help="of an answer at most; default: 160 on a GPU, 64 else")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128], help="of generate, each tried once")
    parser.add_argument("--regimes", choices=("full", "ending"), nargs="+", default=["full", "ending"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    options = parser.parse_args()
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = options.device == "cuda"
    options.precision = options.precision or ("bfloat16" if gpu else "float32")
    options.items, options.new_tokens = (
        options.items or (300 if gpu else 48),
        options.new_tokens or (160 if gpu else 64),
    )
    if options.model is None and options.geometry is None:
        options.geometry = "llama2-7b" if gpu else "smollm2-135m"
    with tempfile.TemporaryDirectory() as folder, settled(Runtime(threads=options.threads)):
        path = options.model or save_geometry(options.geometry, options.device, options.precision, Path(folder))
        result = run(options, path)
    write(options.out, f"engine-{result['config']['model']}-{options.device}", result, table(result))


_STARTED = time.perf_counter()

if __name__ == "__main__":
    main()

"""What a step of mask learning costs beside a dense model and beside the published way: `make bench`.

    python -m tests.bench.mask_step [--geometry smollm2-135m] [--steps 1] [--rounds 5] [--out results/bench]

Measures the three variants of `variants` in one run, each in a process of its own, all three alive together. A round
is a number of optimizer steps of every variant; they take turns after every micro-batch, so whatever else the machine
does, it does to all three, and a ratio is taken within a round. Reported are the median and the range of the rounds; on
a CPU also the ratio of processor time, which other work on the machine changes less. Peak memory is counted in further
processes (`memory`), since counting takes time.

The bars: an optimizer step takes at most 1.08 times the dense floor's time with accumulation 8; mask learning handles
at least 1.7 times the tokens per second of sorting in every forward pass, with micro-batches of 1 × 256 tokens; and it
takes no more memory on top of the floor than the scores, their optimizer's states and a copy of the masked weights.

Where torch finds a GPU, LLaMA2-7B's geometry is measured on it as well, in bfloat16. The three together need about 90
GB; on a smaller GPU, which does nothing else, they are measured one after the other, and the table says so.

Writes a JSON file with everything and a Markdown table for each geometry.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mft_core.layers import format_layers, parse_layers
from tests.bench.report import describe_machine, summarise, table, write
from tests.bench.variants import VARIANTS, masked_weights
from tests.bench.worker import DTYPES, GEOMETRIES, Job, make_model

ACCUMULATIONS = (8, 1)
"""micro-batches of one optimizer step, in the two regimes that are timed"""
CLOCKS = ("wall", "processor")


class Worker:
    """A process that holds one variant."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        command = [sys.executable, "-m", "tests.bench.worker", json.dumps(dataclasses.asdict(job))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def ask(self, request: dict[str, Any]) -> None:
        """Send a request; `answer` waits for what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            RuntimeError: the process has died; with the last lines of what it said.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = "".join(self._errors.readlines()[-15:])
            raise RuntimeError(f"the process of '{self.job.variant}' ended with {self._process.wait()}:\n{last}")
        return json.loads(line)

    def finish(self) -> dict[str, Any]:
        """Say that nothing more is asked, and return the last answer."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        last = self.answer()
        self._process.wait()
        return last

    def kill(self) -> None:
        """End the process if it is still there."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._errors.close()


@contextlib.contextmanager
def _workers(jobs: list[Job]) -> Iterator[list[Worker]]:
    started: list[Worker] = []
    try:
        for job in jobs:
            started.append(Worker(job))
        yield started
    finally:
        for worker in started:
            worker.kill()


TOGETHER = 100e9
"""bytes of a GPU on which the three variants of LLaMA2-7B's geometry are alive together"""

_Seconds = dict[str, dict[str, dict[str, list[float]]]]


def measure(jobs: dict[str, Job], options: argparse.Namespace, together: bool) -> dict[str, Any]:
    """Return how long an optimizer step took in every round, and the peaks of memory.

    Returns:
        `seconds[clock][accumulation][variant]`, a list with a number for each round, and `peaks[variant]` in bytes.
    """
    seconds: _Seconds = {clock: {str(a): {name: [] for name in jobs} for a in ACCUMULATIONS} for clock in CLOCKS}
    peaks: dict[str, Any] = {}
    for group in [list(jobs.values())] if together else [[job] for job in jobs.values()]:
        peaks |= _measure_together(group, options, seconds)
    return {"seconds": seconds, "peaks": peaks}


def _measure_together(jobs: list[Job], options: argparse.Namespace, seconds: _Seconds) -> dict[str, Any]:
    """Add the seconds of some variants, alive together, and return their peaks of memory."""
    with _workers(jobs) as workers:
        for worker in workers:
            worker.answer()
        for accumulation in ACCUMULATIONS:
            _round(workers, accumulation, 1)
        _say("models are built, and a first step of each is done that is not counted")
        for number in range(1, options.rounds + 1):
            for accumulation in ACCUMULATIONS:
                for name, took in _round(workers, accumulation, options.steps).items():
                    for clock in CLOCKS:
                        seconds[clock][str(accumulation)][name].append(took[clock])
            _say(f"round {number} of {options.rounds}: {_progress(seconds['wall'])}")
        return {worker.job.variant: worker.finish() for worker in workers}


def _round(workers: Sequence[Worker], accumulation: int, steps: int) -> dict[str, dict[str, float]]:
    """Have every variant do so many optimizer steps, in turns; return seconds per step by variant and clock."""
    took = {worker.job.variant: dict.fromkeys(CLOCKS, 0.0) for worker in workers}
    for number in range(steps * accumulation):
        for worker in workers if number % 2 else reversed(workers):
            worker.ask({"accumulation": accumulation, "last": (number + 1) % accumulation == 0})
            for clock, seconds in worker.answer().items():
                took[worker.job.variant][clock] += seconds / steps
    return took


def _progress(seconds: dict[str, dict[str, list[float]]]) -> str:
    return "; ".join(
        f"accumulation {accumulation}: " + ", ".join(f"{name} {took[-1]:.2f} s" for name, took in of.items() if took)
        for accumulation, of in seconds.items()
    )


def _count_memory(jobs: dict[str, Job], peaks: dict[str, dict[str, Any]]) -> None:
    """Fill in the peaks of tensor memory that a GPU's allocator has not counted already."""
    for name, job in jobs.items():
        if peaks[name]["tensors"] is None:
            with _workers([dataclasses.replace(job, records_memory=True)]) as (worker,):
                peaks[name]["tensors"] = worker.answer()["tensors"]


def run(geometry: str, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one geometry, and return the result with everything it depends on."""
    layers = list(parse_layers(options.layers, int(GEOMETRIES[geometry]["num_hidden_layers"])))
    precision = options.precision or ("bfloat16" if device == "cuda" else "float32")
    jobs = {name: Job(name, geometry, device, precision, layers, options.sparsity, options.tokens) for name in VARIANTS}
    _say(f"{geometry} on {device}, {precision}, layers {format_layers(tuple(layers))}")
    together = device == "cpu" or torch.cuda.get_device_properties(0).total_memory > TOGETHER
    measured = measure(jobs, options, together)
    _count_memory(jobs, measured["peaks"])
    config = {
        "geometry": geometry,
        **GEOMETRIES[geometry],
        "device": device,
        "precision": precision,
        "layers": format_layers(tuple(layers)),
        "sparsity": options.sparsity,
        "micro_batch": f"1 x {options.tokens}",
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "together": together,
        "masked_weights": masked_weights(make_model(jobs["mask"], "meta"), layers),
        "bytes_per_weight": DTYPES[precision].itemsize,
    }
    return summarise({"config": config, "machine": describe_machine(device), **measured}, options.tokens)


def _say(text: str) -> None:
    print(f"[{time.perf_counter() - _STARTED:5.0f} s] {text}", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="What a step of mask learning costs.")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="default: smollm2-135m on the CPU, llama2-7b on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of --geometry; default: cpu")
    parser.add_argument("--precision", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--layers", default="middle:4")
    parser.add_argument("--sparsity", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=256, help="of one micro-batch")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of each variant in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    options = parser.parse_args()
    asked = [(options.geometry or "smollm2-135m", options.device or "cpu")]
    if options.geometry is None and options.device is None and torch.cuda.is_available():
        asked.append(("llama2-7b", "cuda"))
    for geometry, device in asked:
        result = run(geometry, device, options)
        write(options.out, f"mask-step-{geometry}-{device}", result, table(result))


_STARTED = time.perf_counter()

if __name__ == "__main__":
    main()

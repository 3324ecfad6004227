"""One variant in a process of its own: builds it, then does what is asked on standard input, an answer a line.

Started by `mask_step` as `python -m tests.bench.worker JOB`, JOB the JSON of a `Job`. A request is one micro-batch,
`{"accumulation": 8, "last": false}`, with the optimizer step if it is the last of its step; the answer is how long it
took. At the end of the input comes the last answer, the memory. Only one worker of a measurement has a request at a
time, and one that waits takes no processor time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from mft_core.recipes import Training
from tests.bench import memory
from tests.bench.variants import SEED, Variant, make_variant

GEOMETRIES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "tie_word_embeddings": True,
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAINING = Training(learning_rate=1e-3, epochs=1, batch_size=1)


@dataclass(frozen=True)
class Job:
    """What one worker measures."""

    variant: str
    geometry: str
    device: str
    precision: str
    layers: list[int]
    sparsity: float
    tokens: int
    """of one micro-batch, which is a single sequence"""
    records_memory: bool = False
    """count the peak of tensor memory over two optimizer steps instead of answering requests"""


def make_model(job: Job, device: str | None = None) -> Any:
    """Return the geometry's model with random weights in the job's precision."""
    torch.manual_seed(SEED)
    config = LlamaConfig(**GEOMETRIES[job.geometry], max_position_embeddings=4096)
    with torch.device(device or job.device):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[job.precision])


class Steps:
    """Optimizer steps of a variant, on batches of random tokens that are the same for every variant."""

    def __init__(self, job: Job, variant: Variant) -> None:
        self._job, self._variant = job, variant
        self._draws = torch.Generator().manual_seed(SEED)
        variant.model.train()

    def micro_batch(self, accumulation: int) -> Tensor:
        """Do forward and backward pass of one of so many micro-batches; return its share of the step's loss (nats)."""
        vocabulary = GEOMETRIES[self._job.geometry]["vocab_size"]
        ids = torch.randint(vocabulary, (1, self._job.tokens), generator=self._draws).to(self._job.device)
        loss = self._variant.model(input_ids=ids, labels=ids, use_cache=False).loss / accumulation
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """Do the optimizer step."""
        self._variant.step()


def prepare(job: Job) -> Steps:
    """Build model and variant."""
    return Steps(job, make_variant(job.variant, make_model(job), job.layers, job.sparsity, TRAINING))


def _answer(job: Job, take: Callable[[], str], give: Callable[[Any], None]) -> None:
    steps = prepare(job)
    give({"ready": True})
    while line := take():
        request = json.loads(line)
        _synchronize(job)
        wall, processor = time.perf_counter(), time.process_time()
        steps.micro_batch(request["accumulation"])
        if request["last"]:
            steps.step()
        _synchronize(job)
        give({"wall": time.perf_counter() - wall, "processor": time.process_time() - processor})
    on_gpu = torch.device(job.device).type == "cuda"
    give({"process": memory.process_peak(), "tensors": torch.cuda.max_memory_allocated() if on_gpu else None})


def _synchronize(job: Job) -> None:
    if torch.device(job.device).type == "cuda":
        torch.cuda.synchronize()


def _record(job: Job) -> dict[str, int]:
    def work() -> None:
        steps = prepare(job)
        for _ in range(2):  # in the second step, the optimizer has its states
            for _ in range(2):  # in the second micro-batch, there are gradients
                steps.micro_batch(accumulation=2)
            steps.step()

    return {"tensors": memory.cpu_peak(work)}


def main() -> None:
    """Run the job of the command line."""
    job = Job(**json.loads(sys.argv[1]))
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever libraries print must not mix with the answers

    def give(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    if job.records_memory:
        give(_record(job))
    else:
        _answer(job, sys.stdin.readline, give)


if __name__ == "__main__":
    main()

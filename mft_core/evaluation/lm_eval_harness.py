"""One benchmark on one model through lm-eval's Python API, with the outcome of every item kept.

Two kinds of benchmark: a *local-file task* (`mft_core.evaluation.benchmarks`), which needs neither network nor
lm-eval's index; and lm-eval's *own* tasks and groups by name. lm-eval builds prompts, decodes, filters and scores; here
stands only what it lacks: checks before compute, and items that can be paired between models.
`lm_eval.evaluator.evaluate` is called rather than `simple_evaluate`, which, after the same computation, asks the hub
for the model's commit and collects the environment with a dozen subprocesses. lm-eval's response cache is never used:
it does not know the model's weights.

Decoding is greedy unless the task says otherwise. Prompts are sorted by length and padded on the left: the batch size
changes no format and no prompt, but the padded sums round differently, so a near-tie between two tokens may fall the
other way, rarely in float32, now and then in bfloat16. Compare models that were evaluated with one batch size.

Where answers are sampled, and for lm-eval's own tasks, whose code may draw (GPQA shuffles its choices), the process's
generators are seeded from the recipe and held alone meanwhile.

Used by the stage `evaluate`; `check_task` by whoever plans a study (imports neither torch nor lm-eval for local tasks).
"""

from __future__ import annotations

import functools
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mft_core.errors import ConfigError, StageError, did_you_mean, unknown
from mft_core.evaluation.benchmarks import data_files, local_definition, read_items
from mft_core.evaluation.outcomes import Evaluation, per_item
from mft_core.recipes import Evaluate, Runtime
from mft_core.stage import Progress

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


def evaluate(
    recipe: Evaluate,
    model: Path,
    benchmark: Path | None = None,
    runtime: Runtime | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    chat_template: Path | None = None,
) -> Evaluation:
    """Run one benchmark on one model.

    Args:
        recipe: task, metric and settings.
        model: directory of a Hugging Face checkpoint with its tokenizer.
        benchmark: folder of the local-file task; None for lm-eval's own tasks.
        runtime: device, threads and `eval_batch_size` (sequences decoded together).
        report: told how many items are answered.
        chat_template: Jinja file to use instead of the tokenizer's own template.

    Raises:
        ConfigError: the task is unknown, or its definition or items cannot be read.
        StageError: the metric or filter is none of the task's, or the tokenizer has no chat template.
    """
    runtime = runtime or Runtime.model_validate({})
    with _seeded(recipe.seed, runtime) if benchmark is None else nullcontext():
        tasks = _load_tasks(recipe, benchmark)
    unsafe = any(getattr(task, "UNSAFE_CODE", False) for task in tasks.values())
    if unsafe:
        _refuse_unconfirmed_code(recipe.task)
    draws = benchmark is None or any(map(_samples, tasks.values()))
    with _settled(runtime), _seeded(recipe.seed, runtime) if draws else nullcontext():
        from lm_eval import evaluator

        results = evaluator.evaluate(
            lm=_load_model(recipe, model, runtime, report, chat_template),
            task_dict={"tasks": tasks},
            limit=recipe.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=recipe.apply_chat_template,
            fewshot_as_multiturn=recipe.apply_chat_template,
            confirm_run_unsafe_code=unsafe,
        )
    assert results is not None  # None is for the other ranks of a distributed run
    return per_item(recipe, results["samples"])


def check_task(recipe: Evaluate, benchmark: Path | None = None) -> None:
    """Check before any compute that the task exists and can be scored by the recipe's metric.

    A local-file task is read in milliseconds; lm-eval's own names cost the building of its index, 10–20 s per process.

    Raises:
        ConfigError: unknown task or metric, unreadable items, or code execution that was not allowed.
    """
    if benchmark is not None:
        definition = local_definition(benchmark, recipe.task)
        metrics = [str(entry["metric"]) for entry in definition.get("metric_list", [])]
        if metrics and recipe.metric not in metrics:
            raise unknown(f"metric of task '{recipe.task}'", recipe.metric, metrics)
        for items in data_files(benchmark, definition).values():
            read_items(items)
        return
    index = _task_manager().task_index
    if recipe.task not in index:
        raise ConfigError(
            f"unknown lm-eval task '{recipe.task}'.{did_you_mean(recipe.task, index)} "
            f"`lm-eval ls tasks` lists the {len(index):,} tasks and groups; for a task of your own give its folder."
        )
    if (index[recipe.task].cfg or {}).get("unsafe_code"):
        _refuse_unconfirmed_code(recipe.task)


def _refuse_unconfirmed_code(task: str) -> None:
    if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise ConfigError(
            f"task = {task}: this benchmark executes code that the model writes. Run it in a container or sandbox, "
            "and allow it with the environment variable HF_ALLOW_CODE_EVAL=1."
        )


@functools.cache
def _task_manager() -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load_tasks(recipe: Evaluate, benchmark: Path | None) -> dict[str, Task]:
    """Return the task, or a group's tasks, by name, with few-shot number and seed as `simple_evaluate` sets them."""
    if benchmark is not None:
        tasks: dict[str, Task] = {recipe.task: _local_task(recipe.task, benchmark)}
    else:
        check_task(recipe)
        tasks = dict(_task_manager().load([recipe.task])["tasks"])
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        wanted = recipe.num_fewshot
        if own == 0 and wanted:
            raise ConfigError(f"num_fewshot = {wanted}: task '{name}' is defined for 0 examples; leave it null or 0.")
        task.set_config(key="num_fewshot", value=(own or 0) if wanted is None else wanted)
        task.set_fewshot_seed(seed=recipe.seed)
    return tasks


def _local_task(name: str, folder: Path) -> Task:
    """Return the local-file task; its items are read here, since `load_dataset` writes to the user's cache."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    definition = local_definition(folder, name)
    files = data_files(folder, definition)

    class LocalTask(ConfigurableTask):
        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            self.dataset = {split: Dataset.from_list(read_items(path)) for split, path in files.items()}

    return LocalTask(config=definition)


def _samples(task: Task) -> bool:
    """Say whether lm-eval will draw the task's answers: where it says nothing of it, a temperature above 0 does."""
    settings = task.get_config("generation_kwargs") or {}
    asked = settings.get("do_sample")
    return bool(float(settings.get("temperature") or 0) > 0 if asked is None else asked)


@contextmanager
def _seeded(seed: int, runtime: Runtime) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators, keep other stages from them, and put them back."""
    import torch

    from mft_core.compute import own_randomness

    with own_randomness(torch.device(_device(runtime))):
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _device(runtime: Runtime) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if runtime.device == "auto" else runtime.device


def _load_model(
    recipe: Evaluate,
    path: Path,
    runtime: Runtime,
    report: Callable[[Progress], None],
    chat_template: Path | None,
) -> LM:
    """Load the checkpoint as lm-eval's Hugging Face model, made to report its progress in place of lm-eval's bars."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from mft_core.compute import PROCESS_WIDE

    tokenizer = AutoTokenizer.from_pretrained(path)
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    if recipe.apply_chat_template and not tokenizer.chat_template:
        raise StageError(
            "apply_chat_template = true: the model's tokenizer has no chat template. Give the model one "
            "(model.chat_template), or set apply_chat_template to false for this benchmark."
        )

    class ReportingModel(HFLM):
        answered = 0
        asked = 0

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            self.asked += len(requests)
            answers: list[str] = super().generate_until(requests, disable_tqdm=True)
            return answers

        def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            tokens: torch.Tensor = super()._model_generate(context, *args, **kwargs)
            self.answered += len(context)
            report(Progress(self.answered, self.asked, "item"))
            return tokens

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return answers

    with PROCESS_WIDE:
        return ReportingModel(
            pretrained=str(path),
            tokenizer=tokenizer,
            device=_device(runtime),
            dtype=recipe.precision,
            batch_size=runtime.eval_batch_size,
        )


@functools.cache
def _tame_lm_eval() -> None:
    """Once per process: no bar over the prompts (it has no switch), and templates compiled once, not per item."""
    import lm_eval.api.task
    import lm_eval.utils
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
    lm_eval.utils.env.from_string = functools.lru_cache(maxsize=512)(lm_eval.utils.env.from_string)


@contextmanager
def _settled(runtime: Runtime) -> Iterator[None]:
    """Hold lm-eval to warnings, and torch to the runtime's number of threads."""
    import torch

    _tame_lm_eval()
    logger = logging.getLogger("lm_eval")
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel(logging.WARNING)
    torch.set_num_threads(runtime.threads or threads)
    try:
        yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)

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
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mft_core.errors import ConfigError, StageError, did_you_mean, unknown
from mft_core.evaluation import code_metrics, code_sandbox, judged, vllm_server
from mft_core.evaluation.benchmarks import TASKS, Definition, Function, definitions
from mft_core.evaluation.outcomes import Evaluation, per_item
from mft_core.recipes import Evaluate, Runtime
from mft_core.sandbox import environment, limited, next_rendering, render
from mft_core.stage import Progress

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_MEANS = ("mean", "nanmean", "agg_inst_level_acc")
"""the last is IFEval's, over the instructions of all prompts"""
_USUAL = ("exact_match", "acc_norm", "acc", "pass@1")
"""metrics of which the first that a task has is its usual one"""


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
        StageError: the metric or filter is none of the task's, or no share; or the tokenizer has no chat template.
    """
    with opened(recipe, model, benchmark, runtime, report, chat_template) as (answered, _):
        return answered()


@contextmanager
def opened(
    recipe: Evaluate,
    model: Path,
    benchmark: Path | None = None,
    runtime: Runtime | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    chat_template: Path | None = None,
) -> Iterator[tuple[Callable[[], Evaluation], LM]]:
    """Yield what runs the benchmark, and the engine, of `hf` with the model in it: whoever changes that asks again.

    Arguments and errors are those of `evaluate`.
    """
    runtime = runtime or Runtime.model_validate({})
    with seeded(recipe.seed, runtime) if benchmark is None else nullcontext():
        tasks = load_tasks(recipe, benchmark, report)
    judged.check(recipe, benchmark)
    if recipe.judge and benchmark:
        for task in tasks.values():
            judged.ask_ahead(recipe, task, benchmark)
    draws = benchmark is None or any(map(_samples, tasks.values()))
    with (
        settled(runtime),
        seeded(recipe.seed, runtime) if draws else nullcontext(),
        _engine(recipe, model, runtime, report, chat_template) as engine,
    ):
        from lm_eval import evaluator

        def answered() -> Evaluation:
            results = evaluator.evaluate(
                lm=engine,
                task_dict={"tasks": tasks},
                limit=recipe.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=recipe.apply_chat_template,
                fewshot_as_multiturn=recipe.apply_chat_template,
                confirm_run_unsafe_code=True,  # in a sandbox, or refused by now
            )
            assert results is not None  # None is for the other ranks of a distributed run
            return per_item(recipe, results["samples"], _higher_is_better(recipe, tasks.values()))

        yield answered, engine


def _higher_is_better(recipe: Evaluate, tasks: Iterable[Task]) -> bool:
    """Say which way the recipe's metric is better; lm-eval's own word is True where a task says nothing."""
    found = {task.higher_is_better().get(recipe.metric) is not False for task in tasks}
    if len(found) > 1:
        raise StageError(f"metric '{recipe.metric}': higher is better for some tasks of '{recipe.task}' only.")
    return found.pop()


def check_task(recipe: Evaluate, benchmark: Path | None = None) -> None:
    """Check that the task exists, runs no code that was not allowed, and can be scored by the recipe's metric.

    A local-file task is read with all its items; lm-eval's own names cost the building of its index, 10-20 s per
    process. `mft_core.evaluation.rehearsal` goes on from here.

    Raises:
        ConfigError: unknown task, metric or filter, incomplete items, code of the folder's that was not allowed, or no
            sandbox for code that the model writes.
    """
    judged.check(recipe, benchmark)
    if benchmark is not None:
        for one in definitions(benchmark, recipe.task):
            one.refuse_code(recipe.allow_code)
            if code_metrics.executes(one.config):
                code_sandbox.require()
            check_scoring(recipe.metric, recipe.filter, one.task, one.config)
            one.check_items()
        return
    check_known(recipe.task)
    for leaf in task_leaves(recipe.task, task_manager().task_index):
        if code_metrics.executes(leaf.cfg):
            code_sandbox.require()
        check_scoring(recipe.metric, recipe.filter, leaf.name, leaf.cfg)


def check_known(task: str) -> None:
    """Raise a ConfigError if lm-eval has no task or group of that name."""
    index = task_manager().task_index
    if task not in index:
        raise ConfigError(
            f"unknown lm-eval task '{task}'.{did_you_mean(task, index)} "
            f"`lm-eval ls tasks` lists the {len(index):,} tasks and groups; for a task of your own give its folder."
        )


def task_leaves(task: str, index: Mapping[str, Any]) -> list[Any]:
    """Return the entries in lm-eval's index of a task, or of all tasks of a group or tag."""
    entry = index.get(task)
    if entry is None:
        return []
    children = entry.tags if entry.cfg is None else entry.cfg.get("task")
    if isinstance(children, str) or not children:
        return [entry] if entry.cfg else []
    names = [child.get("task", child.get("group")) if isinstance(child, dict) else child for child in children]
    return [leaf for name in names if isinstance(name, str) for leaf in task_leaves(name, index)]


def check_scoring(metric: str, filter_name: str | None, task: str, config: Mapping[str, Any]) -> None:
    """Check by a task's definition that it has the filter, and the metric, whose mean over the items is a share.

    And, where code that the model writes is scored, enough answers.

    Raises:
        ConfigError: with the valid ones.
    """
    filters = [str(entry["name"]) for entry in config.get("filter_list") or [{"name": "none"}]]
    if filter_name is not None and filter_name not in filters:
        raise unknown(f"filter of task '{task}'", filter_name, filters)
    entries = _metrics(config)
    called = [_name(entry) for entry in entries]
    code = [name for name, entry in zip(called, entries, strict=True)
            if isinstance(entry["metric"], Function) or "/" in name]  # fmt: skip
    # code names its results itself: pass_at_k does pass@1; of other code nothing is known
    named = metric.startswith("pass@") if all(name.endswith("pass_at_k") for name in code) else True
    found = [entry for entry in entries if entry["metric"] == metric]
    if not found and not (code and named):
        raise unknown(f"metric of task '{task}'", metric, [str(entry["metric"]) for entry in entries])
    if (code_metrics.answers_needed(metric) or 0) > (repeats := config.get("repeats") or 1):
        raise ConfigError(
            f"metric '{metric}' of task '{task}' needs that many answers of an item, and the task asks for {repeats}; "
            "set its repeats, and have them sampled (generation_kwargs: do_sample, temperature)."
        )
    for entry in found:
        aggregation = _aggregation(entry)
        if aggregation not in _MEANS:
            means = [str(each["metric"]) for each in entries if _aggregation(each) in _MEANS]
            raise ConfigError(
                f"metric '{metric}' of task '{task}' is no share of the items (aggregation: {aggregation}): models are "
                f"compared item by item, in %. Valid: {', '.join(means) or 'none of this task'}."
            )


def usual_metric(task: str, folder: Path | None) -> str:
    """Return the metric by which a task's answers are usually said to be right.

    Args:
        folder: of a local-file task; None for lm-eval's own.

    Raises:
        ConfigError: no such task, or none of its metrics is a share of the items.
    """
    if folder is not None:
        local = definitions(folder, task)[0]
        name, config = local.task, local.config
    else:
        check_known(task)
        own = task_leaves(task, task_manager().task_index)[0]
        name, config = own.name, own.cfg
    metrics = [_name(entry) for entry in _metrics(config)]
    for metric in (*(usual for usual in _USUAL if usual in metrics), *metrics):
        with suppress(ConfigError):
            check_scoring(metric, None, name, config)
            return metric
    raise ConfigError(f"task '{task}': none of its metrics ({', '.join(metrics) or 'none'}) is a share of the items.")


def _metrics(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a definition's metrics, or of lm-eval's for its kind of answer."""
    if entries := config.get("metric_list"):
        return list(entries)
    from lm_eval.api import metrics, registry  # noqa: F401 - the metrics register themselves

    usual = registry.DEFAULT_METRIC_REGISTRY.get(config.get("output_type") or "generate_until", [])
    return [{"metric": name} for name in usual]


def _name(entry: Mapping[str, Any]) -> str:
    return str(getattr(entry["metric"], "name", entry["metric"]))


def _aggregation(entry: Mapping[str, Any]) -> str | None:
    """Return the name by which a task's metric becomes one number."""
    named = entry.get("aggregation")
    if not named:
        if code_metrics.answers_needed(entry["metric"]):
            return "mean"
        from lm_eval.api import metrics, registry  # noqa: F401

        named = registry.get_metric_aggregation(str(entry["metric"]))
    return str(getattr(named, "__name__", getattr(named, "name", named))).rpartition(".")[2] if named else None


@functools.cache
def task_manager() -> TaskManager:
    """Return lm-eval's index of tasks, and ours; it costs 10-20 s."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=TASKS)


def load_tasks(
    recipe: Evaluate, benchmark: Path | None, report: Callable[[Progress], None] = lambda progress: None
) -> dict[str, Task]:
    """Return the task, or a group's tasks, by name, with few-shot number and seed as `simple_evaluate` sets them."""
    tame_lm_eval()
    if benchmark is not None:
        tasks = {one.task: _local_task(one, recipe.allow_code) for one in definitions(benchmark, recipe.task)}
    else:
        check_task(recipe)
        code_metrics.register()
        for leaf in task_leaves(recipe.task, task_manager().task_index):
            _register_metrics(leaf.cfg)
        tasks = dict(task_manager().load([recipe.task])["tasks"])
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        wanted = recipe.num_fewshot
        if own == 0 and wanted:
            raise ConfigError(f"num_fewshot = {wanted}: task '{name}' is defined for 0 examples; leave it null or 0.")
        task.set_config(key="num_fewshot", value=(own or 0) if wanted is None else wanted)
        task.set_fewshot_seed(seed=recipe.seed)
        _bound_scoring(name, task)
        if code_metrics.executes({key: task.get_config(key) for key in ("metric_list", "unsafe_code")}):
            code_metrics.run_ahead(name, task, report)
    return tasks


def _local_task(one: Definition, allow_code: bool) -> Task:
    """Return the local-file task; its items are read here, since `load_dataset` writes to the user's cache."""
    from datasets import Dataset
    from lm_eval.api import metrics, registry  # noqa: F401 - the metrics register themselves
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.filters import build_filter_ensemble

    one.refuse_code(allow_code)
    if code_metrics.executes(one.config):
        code_metrics.register()
    _register_metrics(one.config)
    for entry in one.config.get("metric_list") or ():
        known = entry["metric"] in registry.metric_registry or one.config.get("process_results") is not None
        if isinstance(entry["metric"], str) and not known and not allow_code:  # it would be sought on the hub, and run
            raise unknown(f"metric of task '{one.task}'", entry["metric"], list(registry.metric_registry))

    several = (one.config.get("repeats") or 1) > 1 and not code_metrics.executes(one.config)

    class LocalTask(ConfigurableTask):
        def process_results(self, doc: dict[str, Any], results: Any) -> dict[str, Any]:
            """Score each of several answers by itself: an item counts their mean. (pass@K takes them together.)"""
            if not several or not isinstance(results[0], list):
                return dict(super().process_results(doc, results))
            each = [super(LocalTask, self).process_results(doc, [answer]) for answer in results[0]]
            return {name: np.mean([one[name] for one in each], axis=0).tolist() for name in each[0]}

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            self.dataset = {split: Dataset.from_list([row for _, row in one.items(split)]) for split in one.data_files}

    task = LocalTask(config=_with_functions(one.config))
    if several and one.config.get("filter_list") is None:
        task._filters = [build_filter_ensemble("none", [])]  # lm-eval's own would take the first answer alone
    return task


def _bound_scoring(name: str, task: Task) -> None:
    """Have what the models say filtered and matched in a process apart first: a regular expression can take forever.

    A task's own functions are not called there: they may ask servers or models, which a fork cannot hold.
    """
    from lm_eval.filters.custom import CustomFilter

    if task.OUTPUT_TYPE != "generate_until":
        return
    filters = task.apply_filters
    known = [one for one in getattr(task, "_filters", ()) if not any(each.func is CustomFilter for each in one.filters)]
    scores = set(getattr(task, "_metric_fn_list", ())) == {"exact_match"} and not task.get_config("process_results")

    def tried() -> None:
        for request in task.instances:
            for one in known:
                next_rendering()
                one.apply([request])
            for answer in request.filtered_resps.values() if scores else ():
                next_rendering()
                task.process_results(request.doc, [answer])

    def apply_filters() -> Any:
        try:
            limited(f"filters and metrics of task '{name}', on what the model says", tried)
        except ConfigError as error:
            raise StageError(str(error)) from None
        return filters()

    task.apply_filters = apply_filters


def _register_metrics(config: Mapping[str, Any]) -> None:
    """Give lm-eval the metrics of a definition that it lacks: pass@K, and what a judge says."""
    for entry in config.get("metric_list") or ():
        if code_metrics.answers_needed(entry["metric"]):
            code_metrics.register_metric(entry["metric"])
        elif entry["metric"] == judged.METRIC:
            judged.register()


def _with_functions(value: Any) -> Any:
    """Return a copy of a definition with its functions, imported, in the place of their names."""
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    if isinstance(value, Function):
        return _import_func_in_yml(*value)
    if isinstance(value, dict):
        return {key: _with_functions(inner) for key, inner in value.items()}
    return [_with_functions(inner) for inner in value] if isinstance(value, list) else value


def _samples(task: Task) -> bool:
    """Say whether lm-eval will draw the task's answers: where it says nothing of it, a temperature above 0 does."""
    settings = task.get_config("generation_kwargs") or {}
    asked = settings.get("do_sample")
    return bool(float(settings.get("temperature") or 0) > 0 if asked is None else asked)


@contextmanager
def seeded(seed: int, runtime: Runtime) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators, keep other stages from them, and put them back."""
    import torch

    from mft_core.compute import find_device, own_randomness

    with own_randomness(find_device(runtime)):
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _engine(
    recipe: Evaluate,
    path: Path,
    runtime: Runtime,
    report: Callable[[Progress], None],
    chat_template: Path | None,
) -> Iterator[LM]:
    """Have the checkpoint in the recipe's engine."""
    from mft_core.compute import find_device
    from mft_core.data.chat_template import read_tokenizer

    tokenizer = read_tokenizer(path, chat_template)
    if recipe.apply_chat_template and not tokenizer.chat_template:
        raise StageError(
            "apply_chat_template = true: the model's tokenizer has no chat template. Give the model one "
            "(model.chat_template), or set apply_chat_template to false for this benchmark."
        )
    device = find_device(runtime)
    if recipe.engine == "hf":
        from mft_core.evaluation.engine_hf import HuggingFace

        yield HuggingFace(recipe, path, runtime, str(device), tokenizer, report)
        return
    from mft_core.evaluation.engine_served import Served

    if recipe.engine == "vllm":
        with vllm_server.serving(path, recipe.precision, device.type == "cpu") as server:
            yield Served(recipe, path, runtime, server.url, server.key, tokenizer, report)
    elif runtime.engine_url is None:
        raise ConfigError("engine = openai: runtime.engine_url is null; give the server's address.")
    else:
        yield Served(recipe, path, runtime, runtime.engine_url.rstrip("/"), None, tokenizer, report)


@functools.cache
def tame_lm_eval() -> None:
    """Once per process: no bar over the prompts (it has no switch), and templates in the sandbox."""
    import lm_eval.api.task
    import lm_eval.utils
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
    lm_eval.utils.env = environment(lm_eval.utils.env)
    lm_eval.utils.apply_template = functools.partial(render, lm_eval.utils.env)


@contextmanager
def settled(runtime: Runtime) -> Iterator[None]:
    """Hold lm-eval to warnings, and torch to the runtime's number of threads."""
    import torch

    tame_lm_eval()
    logger = logging.getLogger("lm_eval")
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel(logging.WARNING)
    torch.set_num_threads(runtime.threads or threads)
    try:
        yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)

"""Benchmarks that are scored by execution: lm-eval's own, and local ones whose metric is `pass@K`.

A local task says with lm-eval's own keys what is run:

    doc_to_target: "{{test}}\ncheck({{entry_point}})"    # the tests; no answer of the model's stands in them
    filter_list: [{name: program, filter: [{function: program, before: prompt}]}]
    metric_list: [{metric: pass@1}]                      # pass@10 with `repeats: 10` and sampled answers

The filter `program` makes an answer a program: of a fenced block what is in it, and before it the item's field
`before`, if one is named. lm-eval's own tasks call the metric `code_eval` of the library `evaluate`, which would be
fetched from the hub and runs code unguarded; they get `CodeEval` for it, with the same numbers. Everything that a
benchmark's items need is run at once, several at a time, in `mft_core.evaluation.code_sandbox`; the metrics look it up.

Used by `mft_core.evaluation.lm_eval_harness`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mft_core.errors import ConfigError
from mft_core.evaluation import code_sandbox
from mft_core.evaluation.code_sandbox import Trial
from mft_core.stage import Progress

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_PASS = re.compile(r"pass@([1-9]\d*)")
_FENCE = re.compile(r"```[ \t]*(\w*)[^\n]*\n?")


def answers_needed(metric: object) -> int | None:
    """Return the K of a metric `pass@K`; None: it is another."""
    found = _PASS.fullmatch(metric) if isinstance(metric, str) else None
    return int(found[1]) if found else None


def executes(config: Mapping[str, Any]) -> bool:
    """Say whether a task's definition has code run that a model writes."""
    asked = [entry["metric"] for entry in config.get("metric_list") or ()]
    return bool(config.get("unsafe_code")) or any(map(answers_needed, asked))


def pass_at_k(passed: Sequence[bool], k: int) -> float:
    """Return the chance that one of k answers passes, without bias from those that were sampled (Chen et al., 2021)."""
    return 1 - math.comb(len(passed) - sum(passed), k) / math.comb(len(passed), k)


def program(answer: str, before: str = "") -> str:
    """Return what is run of an answer.

    A fence that names a language, or begins the answer, opens a block; any other closes one that the prompt opened.
    """
    fence = _FENCE.search(answer)
    opens = fence and (fence[1] or not answer[: fence.start()].strip())
    code = answer[fence.end() :] if fence and opens else answer
    return before + code.partition("```")[0]


class CodeEval:
    """In the place of `evaluate`'s metric of that name; knows what was run already."""

    def __init__(self) -> None:
        self.known: dict[Trial, bool] = {}

    def passed(self, programs: str | Iterable[str], tests: str) -> list[bool]:
        """Say of each program whether it passes."""
        trials = [Trial(one, tests) for one in ([programs] if isinstance(programs, str) else programs)]
        self.known |= code_sandbox.run_all([one for one in trials if one not in self.known])
        return [self.known[trial] for trial in trials]

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """Return pass@k over the items, for each k of which there are enough answers; and what passed."""
        found = {number: self.passed(*item) for number, item in enumerate(zip(predictions, references, strict=True))}
        least = min(map(len, found.values()))
        shares = {f"pass@{one}": [pass_at_k(each, one) for each in found.values()] for one in k if one <= least}
        return {name: sum(each) / len(each) for name, each in shares.items()}, found


_CODE_EVAL = CodeEval()


@functools.cache
def register() -> None:
    """Once per process: give lm-eval the filter `program`, and what it asks `evaluate` for."""
    import evaluate
    from lm_eval.api.filter import Filter
    from lm_eval.api.registry import register_filter

    load = evaluate.load
    evaluate.load = lambda path, *args, **named: _CODE_EVAL if path == "code_eval" else load(path, *args, **named)

    class ProgramFilter(Filter):  # type: ignore[misc]
        def __init__(self, before: str | None = None) -> None:
            self._before = before

        def apply(self, resps: Any, docs: list[dict[str, Any]]) -> list[list[str]]:
            texts = [doc[self._before] if self._before else "" for doc in docs]
            return [[program(each, text) for each in answers] for answers, text in zip(resps, texts, strict=True)]

    register_filter("program")(ProgramFilter)


@functools.cache
def register_metric(name: str) -> None:
    """Give lm-eval a metric `pass@K`."""
    from lm_eval.api import metrics, registry  # noqa: F401 - the metrics register themselves

    k = answers_needed(name)
    assert k is not None

    def metric(references: Sequence[str], predictions: Sequence[str | Sequence[str]]) -> float:
        return pass_at_k(_CODE_EVAL.passed(predictions[0], references[0]), k)

    registry.register_metric(metric=name, higher_is_better=True, aggregation="mean")(metric)


def run_ahead(name: str, task: Task, report: Callable[[Progress], None]) -> None:
    """Make a task run all of its answers' code at once, when lm-eval has them, and tell how far it is.

    Raises:
        ConfigError: there is no sandbox, or the task's own code runs them outside of it.
    """
    code_sandbox.require()
    called = [function for function in task._metric_fn_list.values() if function is not None]
    ours = [answers_needed(metric) or _CODE_EVAL in _globals(function)
            for metric, function in task._metric_fn_list.items()]  # fmt: skip
    if not called or not all(ours):
        raise ConfigError(
            f"task '{name}' executes code that the model writes by means of its own, which no sandbox holds; it is not "
            "run here. Valid: tasks that are scored by evaluate's code_eval, as humaneval and mbpp, and local ones by "
            "the metric pass@1."
        )
    filters = task.apply_filters

    def apply_filters() -> Any:
        applied = filters()
        trials = [
            Trial(one, tests)
            for request in task.instances
            for programs in request.filtered_resps.values()
            for tests in [task.doc_to_target(request.doc)]
            for one in ([programs] if isinstance(programs, str) else programs)
        ]
        _CODE_EVAL.known = code_sandbox.run_all(trials, lambda done, of: report(Progress(done, of, "program")))
        return applied

    task.apply_filters = apply_filters


def _globals(function: Any) -> list[Any]:
    function = getattr(function, "__self__", function)  # lm-eval has its __call__
    return [value for value in getattr(function, "__globals__", {}).values() if isinstance(value, CodeEval)]

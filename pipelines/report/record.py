"""What of a run goes to MLflow, and when; `tasks.mlflow.tracking` knows how.

Parent run = one execution, nested run = one variant. Training curves arrive while training runs; those of cached stages
are copied from their artifacts, so that nothing is missing in the UI. `mft report --sync` writes the same again.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mft_core.errors import StageError
from mft_core.recipes import FineTune, LearnMask
from mft_core.stage import Progress
from mft_core.store.artifacts import ArtifactStore
from pipelines.graph.variants import Variant
from pipelines.plan.plan import Plan
from pipelines.report.report import Report
from pipelines.search.trials import Search, Trial
from pipelines.servers.services import living_server
from tasks.mlflow.tracking import Tracker, variant_key
from tasks.stage_task import StageCall

log = logging.getLogger("mft")


class Recorder:
    """Records one execution of a plan; a context manager that closes the runs with the right status."""

    def __init__(
        self,
        plan: Plan,
        store: ArtifactStore,
        log: Path,
        *,
        rerun: bool = False,
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        """Open the execution's run and one nested run per variant.

        Args:
            log: the execution's log file, attached to its run.
            rerun: something is computed again even where it is cached, and what follows from it may be.
            warn: is told as soon as MLflow cannot be used.
        """
        self._store, self._log, self._rerun = store, log, rerun
        name = f"{plan.study.name} on {plan.profile.name}"
        params = {"study": plan.study.name, "profile": plan.profile.name, "question": plan.study.question}
        tags = {"log_file": log.name}
        self._tracker = Tracker(store.home, plan.study.name, name, params, tags, ui=_ui(store), warn=warn)
        self._owners: dict[str, str] = {}
        self._sent: dict[str, set[int]] = defaultdict(set)
        self.expect(plan)

    def expect(self, plan: Plan) -> None:
        """Open a nested run for each variant and trial of a plan that has none; a search ends with a larger plan."""
        self._plan = plan
        if plan.search and plan.search.finished:
            self.trials(plan.search.trials)
        for item in plan.variants:
            key = variant_key(item.columns)
            self._tracker.variant(key, item.name, {**item.columns, **_settings(item)})
            if item.trained:
                self._owners.setdefault(item.trained.id, key)
        for step in plan.steps if not self._rerun else ():  # early, for MLflow has time now
            if step.artifact and step.node.id in self._owners:
                self._send_curve(self._owners[step.node.id], step.artifact.local_path(self._store))

    def trials(self, trials: Sequence[Trial]) -> None:
        """Open a nested run for each trial of a search that has none."""
        for trial in trials:
            self._tracker.variant(trial.name, trial.name, {**_settings(trial.variant), **trial.columns})
            self._owners.setdefault(trial.node.id, trial.name)

    def trial_ended(self, trial: Trial, loss: float | None) -> None:
        """Send what a trial is judged by."""
        self._tracker.log_metrics(trial.name, {"validation_loss": loss})

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker.log_files([self._log])
        if kind is None:
            self._tracker.finish("FINISHED")
        else:
            self._tracker.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def progress(self, call: StageCall, progress: Progress) -> None:
        """Send one measurement of a training while it runs."""
        key = self._owners.get(call.node)
        if key is not None and "loss" in progress.metrics:
            row = {"step": progress.step, **progress.metrics}
            if self._tracker.log_point(key, row):
                self._sent[key].add(progress.step)

    def record(self, report: Report, cached: Container[str]) -> None:
        """Send the results: every number of the report, curves not seen live, artifact keys, tables.

        Args:
            cached: ids of the nodes that were served from the cache.
        """
        for item in self._plan.variants:
            key = variant_key(item.columns)
            nodes = [node for node in (item.trained, *item.evaluations.values()) if node is not None]
            tags: dict[str, Any] = {f"artifact.{node.stage}": report.manifests[node.id]["key"] for node in nodes}
            tags["cached"] = all(node.id in cached for node in nodes)
            self._tracker.set_tags(key, tags)
            if item.trained:
                manifest = report.manifests[item.trained.id]
                numbers = {f"training/{name}": value for name, value in manifest["summary"].items()}
                self._tracker.log_metrics(key, numbers)
                if self._owners[item.trained.id] == key:
                    self._send_curve(key, self._store.directory(item.trained.stage, manifest["key"]))
        if self._plan.search:
            self._record_trials(self._plan.search, report)
        self._tracker.log_rows(report.rows)
        for name, rows in report.tables.items():
            self._tracker.log_table(name, rows)

    def attach(self, folder: Path) -> None:
        """Attach the report's files as `report/`."""
        files = [path for path in sorted(folder.iterdir()) if path.name != "manifest.json" and path.name[0] != "."]
        self._tracker.log_files(files, "report")

    def _record_trials(self, search: Search, report: Report) -> None:
        """Send what became of each trial, and its curve where that did not arrive live."""
        for trial in search.trials:
            manifest = report.manifests[trial.node.id]
            self._tracker.set_tags(trial.name, {f"artifact.{trial.node.stage}": manifest["key"],
                                                "trial_state": search.state(trial)})  # fmt: skip
            self.trial_ended(trial, trial.loss)
            self._send_curve(trial.name, self._store.directory(trial.node.stage, manifest["key"]))

    def _send_curve(self, key: str, directory: Path) -> None:
        """Send what the live curve lacks: all of a cached training, the steps before a kill, the last step."""
        rows, sent = _history(directory), self._sent[key]
        first = min(sent, default=math.inf)
        self._tracker.log_curve(
            key, [row for row in rows if row["step"] < first or (row is rows[-1] and row["step"] not in sent)]
        )
        sent.update(row["step"] for row in rows)

    def links(self, page: Path | None = None) -> str:
        """Return Markdown with the addresses of the runs in the MLflow UI, and of the report.

        Args:
            page: the report's HTML page, which is attached to the execution's run.
        """
        links = self._tracker.links()
        lines = ["MLflow runs:", "", *(f"- [{name}]({address})" for name, address in links.items())]
        if page:
            execution = next(iter(links.values()), None)
            attached = f" ([in MLflow]({execution}/artifacts/report/{page.name}))" if execution else ""
            lines = [f"Report: `{page}`{attached}", "", *lines]
        return "\n".join(lines)

    @property
    def problem(self) -> str | None:
        """Why not everything was recorded, or None."""
        return self._tracker.problem


def sync_to_mlflow(plan: Plan, store: ArtifactStore, report: Report, pages: Path) -> None:
    """Write a finished study to MLflow again, from its artifacts, as a new execution.

    Args:
        pages: the folder of the report's files.

    Raises:
        StageError: MLflow cannot be reached.
    """
    with Recorder(plan, store, report.directory / "table.md") as recorder:
        recorder.record(report, {step.node.id for step in plan.steps if step.artifact})
        recorder.attach(pages)
    if recorder.problem:
        raise StageError(recorder.problem)


def _ui(store: ArtifactStore) -> str:
    """Return the address of the MLflow UI: that of a living `mft up`, else where it will be by default."""
    living = living_server(store.home)
    return str(living["mlflow"]) if living else "http://127.0.0.1:5000"


def _settings(item: Variant) -> dict[str, Any]:
    """Return what else people filter and plot by: backbone and the numbers of the variant's own training."""
    setup = item.setup
    recipe = item.trained.recipe if item.trained else None
    found: dict[str, Any] = {"backbone": setup.backbone, "data_fraction": setup.data.fraction}
    if isinstance(recipe, FineTune | LearnMask) and recipe.training:
        found |= {f"training.{name}": value for name, value in recipe.training.model_dump().items()}
    if isinstance(recipe, FineTune) and recipe.lora:
        found |= {f"lora.{name}": value for name, value in recipe.lora.model_dump().items()}
    if isinstance(recipe, LearnMask):
        others = recipe.model_dump(exclude={"training", *item.columns}, exclude_none=True)
        found |= others
    return found


def _history(directory: Path) -> list[dict[str, Any]]:
    """Read a training's curve; random and magnitude masks have none."""
    path = directory / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

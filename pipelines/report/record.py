"""What of a study goes to MLflow, and when; `tasks.mlflow.tracking` knows how.

Parent run = one result, nested run = one variant. Training curves arrive while training runs; the rest when all is
there, those of cached trainings too. A result that is recorded already is only told of the execution. `mft report
--sync` makes the same calls.
"""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mft_core.cache_key import digest
from mft_core.errors import StageError
from mft_core.recipes import FineTune, LearnMask
from mft_core.stage import Progress
from mft_core.store import provenance
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.sources import Source
from pipelines.graph.nodes import Edge
from pipelines.graph.variants import Variant
from pipelines.plan.plan import Plan, comparison_node
from pipelines.report.page import FIGURE
from pipelines.report.report import Report, result_key
from pipelines.report.verdict import answer, best
from pipelines.search.trials import Search, Trial
from pipelines.servers.services import living_server
from tasks.mlflow.fields import clean
from tasks.mlflow.tracking import DataSet, Status, Tracker, Writer, variant_key
from tasks.stage_task import StageCall

_HISTORY = "history.jsonl"
_DESCRIPTION = """{question}

[Gains drawn against what the study varies](view:chart) · [all variants as a table](view:table)

A run is a result of the study on a profile: its description answers the question, its artifacts hold the report with
all tables and figures. The runs nested in it are the variants, in the colours of the figures."""


class Recorder:
    """Records one execution of a plan; a context manager that closes the runs with the right status."""

    def __init__(
        self, plan: Plan, store: ArtifactStore, log: Path | None, writer: Writer, *, rerun: bool = False
    ) -> None:
        """Open the result's run and one nested run per variant, unless they are there.

        Args:
            log: the execution's log file, attached to the run of a result that is computed; None: nothing is executed.
            rerun: something is computed again even where it is cached, and what follows from it may be.
        """
        self._store, self._log = store, log
        study, profile = plan.study, plan.profile.name
        self._tracker = Tracker(
            writer,
            study.name,
            _DESCRIPTION.format(question=study.question),
            f"{study.name} on {profile}",
            plan=digest([profile, comparison_node(plan).id]),
            result=None if rerun else result_key(plan, store),
            params={"study": study.name, "profile": profile, "question": study.question},
            ui=_ui(store),
        )
        self._result: str | None = None
        self._how = "computed"
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
            self._tracker.variant(key, item.name, {"replicate": 0, **item.columns, **_settings(item)})
            if item.trained:
                self._owners.setdefault(item.trained.id, key)

    def trials(self, trials: Sequence[Trial]) -> None:
        """Open a nested run for each trial of a search that has none."""
        for trial in trials:
            self._tracker.variant(trial.name, trial.name, {**_settings(trial.variant), **trial.columns})
            self._owners.setdefault(trial.node.id, trial.name)

    def trial_ended(self, trial: Trial, loss: float | None) -> None:
        """Send what a trial is judged by."""
        self._tracker.write(trial.name, metrics={"validation_loss": loss})

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log:
            self._tracker.attach_file(self._log)
        status: Status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        how = self._how if kind is None else status.lower()
        commit = provenance.describe()["git_commit"]
        log = f", log {self._log.name}" if self._log else ""
        self._tracker.finish(status, self._result, f"{how} on {platform.node()}, commit {commit}{log}")

    def progress(self, call: StageCall, progress: Progress) -> None:
        """Send one measurement of a training while it runs."""
        key = self._owners.get(call.node)
        if key is not None and "loss" in progress.metrics:
            row = {"step": progress.step, **progress.metrics}
            if self._tracker.log_point(key, row):
                self._sent[key].add(progress.step)

    def record(self, report: Report, cached: Container[str], pages: Path) -> None:
        """Send the results: the report and its pages, every number of a variant, curves, data, artifact keys.

        Args:
            cached: ids of the nodes that were served from the cache.
            pages: the folder of the report's files, its tables among them, attached as `report/`.
        """
        self._result = report.result
        if all(node_id in cached for node_id in report.manifests):
            self._how = "cached"
        self._tracker.recorded(self._result)
        self._tracker.attach(pages, "report")
        self._tracker.save_view(report.rows)
        self._record_result(report, pages / FIGURE)
        for item in self._plan.variants:
            key = variant_key(item.columns)
            nodes = [node for node in (item.trained, *item.evaluations.values()) if node is not None]
            tags: dict[str, Any] = {f"artifact.{node.stage}": report.manifests[node.id]["key"] for node in nodes}
            tags |= {
                "cached": all(node.id in cached for node in nodes),
                "checkpoint": checkpoint_of(item, report, self._store),
            }
            training = report.manifests[item.trained.id] if item.trained else {"summary": {}}
            numbers = {f"training/{name}": value for name, value in training["summary"].items()}
            self._tracker.write(key, metrics=numbers, tags=tags)
            self._tracker.log_data(key, self._data(item, report))
            if tags["checkpoint"]:
                self._tracker.log_model(key, tags["checkpoint"])
            if item.trained and self._owners[item.trained.id] == key:
                self._send_curve(key, training)
        if self._plan.search:
            self._record_trials(self._plan.search, report)
        self._tracker.log_rows(report.rows)

    def _record_result(self, report: Report, figure: Path) -> None:
        """Send what the result's own run shows: the answer, declared and best gains, the names of the tables."""
        metrics: dict[str, float] = {}
        tags = {"artifact.compare": report.directory.name, "mft.tables": " ".join(report.tables)}
        for benchmark, row in best(report).items():
            metrics |= {clean(f"best_{name}/{benchmark}"): row[name] for name in ("gain", "gain_low", "gain_high")}
            tags[clean(f"best_variant/{benchmark}")] = row["variant"]
        for row in report.contrasts:
            if row["family"] == "primary":
                metrics |= {clean(f"primary_{name}/{row['contrast']}"): row[name]
                            for name in ("gain", "gain_low", "gain_high")}  # fmt: skip
                tags[clean(f"primary_verdict/{row['contrast']}")] = row["verdict"]
        self._tracker.write("", metrics=metrics, tags=tags)
        shown = ["![gains](artifact:report/figure-small.png)"] if figure.is_file() else []
        if shown:
            self._tracker.attach_small(figure, "report/figure-small.png")
        links = "[Gains drawn](view:chart) · [all variants](view:table)"
        text = "\n\n".join([f"**{report.plan.study.question}**", links, answer(report), *shown,
                            report.table.partition("\n\n")[2]])  # fmt: skip
        self._tracker.describe(text)

    def _data(self, item: Variant, report: Report) -> list[DataSet]:
        """Return what the variant was trained and evaluated on."""
        found = []
        if item.trained and isinstance(given := item.trained.inputs.get("data"), Edge):
            manifest = report.manifests[given.node.id]
            directory = str(self._store.directory(given.node.stage, manifest["key"]))
            found.append(DataSet(given.node.label, manifest["digest"], directory, "training"))
        for name, node in item.evaluations.items():
            asked = node.inputs.get("benchmark", node.inputs.get("harness"))
            if isinstance(asked, Source):
                found.append(DataSet(name, asked.digest, asked.location, "evaluation"))
        return found

    def _record_trials(self, search: Search, report: Report) -> None:
        """Send what became of each trial, and its curve where that did not arrive live."""
        for trial in search.trials:
            manifest = report.manifests[trial.node.id]
            self._tracker.write(trial.name, tags={f"artifact.{trial.node.stage}": manifest["key"],
                                                "trial_state": search.state(trial)})  # fmt: skip
            self.trial_ended(trial, trial.loss)
            self._send_curve(trial.name, manifest)

    def _send_curve(self, key: str, training: Mapping[str, Any]) -> None:
        """Send what has not been seen live of a training's curve; random and magnitude masks have none."""
        if _HISTORY not in training["files"]:
            return

        def rows() -> list[dict[str, Any]]:
            history = self._store.read(training["stage"], training["key"], _HISTORY)
            if history is None:
                raise FileNotFoundError(_HISTORY)
            return [json.loads(line) for line in history.splitlines()]

        self._tracker.log_curve(key, rows, self._sent[key])

    def links(self, page: Path) -> str:
        """Return Markdown with the addresses of the report, an HTML page, and of the result in the MLflow UI."""
        lines = [f"Report: `{page}`"]
        if address := self._tracker.link():
            lines += [f"MLflow: [{self._plan.study.name} on {self._plan.profile.name}]({address})"]
        return "\n\n".join(lines)


def checkpoint_of(item: Variant, report: Report, store: ArtifactStore) -> Path | None:
    """Return where the weights lie that the variant was evaluated with; None for a model that was given."""
    if isinstance(item.model, Source):
        return None
    return store.directory(item.model.node.stage, report.manifests[item.model.node.id]["key"]) / item.model.part


def sync_to_mlflow(plan: Plan, store: ArtifactStore, report: Report, pages: Path) -> None:
    """Write a finished study to MLflow from its artifacts, if it is not recorded.

    Args:
        pages: the folder of the report's files.

    Raises:
        StageError: MLflow cannot be reached.
    """
    cached = {step.node.id for step in plan.steps if step.artifact}
    with (
        Writer(store.home, plan.study.name, lambda warning: None) as writer,
        Recorder(plan, store, None, writer) as recorder,
    ):
        recorder.record(report, cached, pages)
    if writer.problem:
        raise StageError(writer.problem)


def _ui(store: ArtifactStore) -> str:
    """Return the address of the MLflow UI: that of a living `mft up`, else where it will be by default."""
    living = living_server(store.home)
    return str(living["mlflow"]) if living else "http://127.0.0.1:5000"


def _settings(item: Variant) -> dict[str, Any]:
    """Return what else people filter and plot by: backbone and the numbers of the variant's own training."""
    setup = item.setup
    recipe = item.trained.recipe if item.trained else None
    found: dict[str, Any] = {"backbone": setup.backbone, "data_fraction": setup.data.fraction,
                             "engine": setup.answered_by}  # fmt: skip
    if isinstance(recipe, FineTune | LearnMask) and recipe.training:
        found |= {f"training.{name}": value for name, value in recipe.training.model_dump().items()}
    if isinstance(recipe, FineTune) and recipe.lora:
        found |= {f"lora.{name}": value for name, value in recipe.lora.model_dump().items()}
    if isinstance(recipe, LearnMask):
        found |= recipe.model_dump(exclude={"training", *item.columns}, exclude_none=True)
    return found

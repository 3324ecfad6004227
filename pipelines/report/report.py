"""The answer of a study as rows and tables: read from the artifacts, so it needs neither Prefect nor MLflow.

`pipelines.report.page` makes pages of it, `pipelines.report.record` MLflow runs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from mft_core.cache_key import digest
from mft_core.data import dropped
from mft_core.errors import StageError
from mft_core.stages import STAGES
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from mft_core.store.manifests import validation_loss
from mft_core.training.schedule import validation_step
from pipelines.config.setup import own_training
from pipelines.cost import measured as costs
from pipelines.graph.nodes import Edge, Node, closure
from pipelines.graph.variants import Variant
from pipelines.plan.analyses import analysis_nodes, answers
from pipelines.plan.plan import Plan, comparison_node
from pipelines.report.attempt import attempt
from pipelines.report.chosen import chosen
from pipelines.report.looks import earlier_looks
from pipelines.search.tables import tables as search_tables

Row = dict[str, Any]


class NotRun(StageError):  # noqa: N818  not a fault: it may be run yet
    """A study has not been run (whole) with the settings that a report asks for."""


@dataclass(frozen=True)
class Report:
    """A finished study."""

    rows: list[Row]
    """one per variant and benchmark, with the columns of `mft report --json`"""
    table: str
    """Markdown"""
    directory: Path
    """the comparison's artifact: where table and figure lie"""
    plan: Plan
    manifests: Mapping[str, dict[str, Any]]
    """of every stage behind the answer, by node id"""
    looks: Sequence[str] = ()
    """the trainings with which the same study was compared before, fewer ones"""
    analyses: Mapping[str, Path] = field(default_factory=dict)
    """directories of the study's analyses by name: `section.md`, figures, `rows.json`"""
    everything: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """as `manifests`, with those of the stages behind the analyses"""

    @functools.cached_property
    def result(self) -> str:
        """The key of all that the study has found on its profile."""
        return _result_key(self.plan, self.everything)

    @property
    def artifacts(self) -> list[str]:
        """`stage/key` of every artifact behind the result."""
        return sorted(f"{manifest['stage']}/{manifest['key']}" for manifest in self.everything.values())

    @functools.cached_property
    def contrasts(self) -> list[Row]:
        """The contrasts that the study declares, with the columns of `rows`."""
        known = {"study": self.plan.study.name, "profile": self.plan.profile.name, "cached": None, "seconds": None}
        return [{**row, **known} for row in _read_rows(self.directory / "contrasts.json")]

    @functools.cached_property
    def tables(self) -> dict[str, list[Row]]:
        """Every table of numbers besides `rows`, by name: choices, winners, data, costs, a search, each analysis."""
        by_items = any(item.validations for item in self.plan.variants)
        parts: dict[str, Callable[[], list[Row]]] = {
            "chosen": lambda: chosen(self.rows, "accuracy" if by_items else "loss", self.plan.study.bounded),
            "contrasts": lambda: self.contrasts,
            "winners": lambda: _read_rows(self.directory / "winners.json"),
            "data": lambda: _data(self.plan, self.manifests),
            "cost": lambda: costs.by_stage(self.plan, self.manifests),
            "cost-per-point": lambda: costs.per_point(self.plan, self.manifests, self.rows),
        }
        for name, directory in self.analyses.items():
            parts[slug(name)] = functools.partial(_read_rows, directory / "rows.json")
        found = {name: attempt(f"table {name}", make, list[Row]()) for name, make in parts.items()}
        if search := self.plan.search:
            of_search = dict[str, list[Row]]()
            found |= attempt("the search's tables", lambda: search_tables(search, self.manifests), of_search)
        return {name: rows for name, rows in found.items() if rows}


def _data(plan: Plan, manifests: Mapping[str, dict[str, Any]]) -> list[Row]:
    """Return what became of the rows of each mixture."""
    nodes = [node for node in closure([comparison_node(plan)]) if node.stage == "prepare-data" and node.id in manifests]
    return [
        {"data": node.label.removeprefix("prepare-data "), **dropped.row(manifests[node.id]["summary"])}
        for node in nodes
    ]


def slug(name: str) -> str:
    """Return an analysis' name for files, anchors and metrics: 'anatomy math' is 'anatomy-math'."""
    return re.sub(r"[^\w.=-]+", "-", name)


def result_key(plan: Plan, store: ArtifactStore) -> str | None:
    """Return the key of all that a study has found on a profile; None while something is to be computed."""
    manifests = _manifests(closure(_asked_for(plan)), store)
    return _result_key(plan, manifests) if all(node.id in manifests for node in _asked_for(plan)) else None


def _result_key(plan: Plan, manifests: Mapping[str, dict[str, Any]]) -> str:
    return digest([plan.profile.name, *(manifests[node.id]["key"] for node in _asked_for(plan))])


def _asked_for(plan: Plan) -> list[Node]:
    return [*answers(plan), *(plan.search.nodes if plan.search else ())]


def find_report(plan: Plan, store: ArtifactStore, command: str | None = None) -> Report:
    """Read the report of a study that has been run.

    Args:
        command: that runs it.

    Raises:
        NotRun: the study has not been run (whole) with these settings.
    """
    missing = [step.node.label for step in plan.to_compute]
    named = {"its comparison": comparison_node(plan), **analysis_nodes(plan)}
    manifests = _manifests(closure(named.values()), store)
    lacking = [name for name, node in named.items()
               if node.id not in manifests or store.find(node.stage, manifests[node.id]["key"]) is None]  # fmt: skip
    if missing or lacking:
        page = store.home / "reports" / f"{plan.study.name}-{plan.profile.name}" / "report.html"
        what = f"{len(missing)} stages are missing, first: {missing[0]}" if missing else f"{lacking[0]} is missing"
        raise NotRun(
            f"study {plan.study.name} on {plan.profile.name}: {what}. Run it (with the same settings): "
            + (command or f"mft run {plan.study.name} --profile {plan.profile.name}")
            + (f". Its last run had others: {page}" if page.is_file() else "")
        )
    return read_report(plan, store, manifests)


def read_report(plan: Plan, store: ArtifactStore, cached: Container[str]) -> Report:
    """Join the comparison's rows with study, profile, cost, validation loss, and whether the evaluation was cached.

    Args:
        cached: ids of the nodes that were served from the cache in this run.
    """
    comparison, analyses = comparison_node(plan), analysis_nodes(plan)
    asked, apart = _asked_for(plan), {node.id for node in analyses.values()}
    behind = [node for node in asked if node.id not in apart]
    found = _manifests(closure(asked), store)
    manifests = {node.id: found[node.id] for node in closure(behind) if node.id in found}

    def directory_of(node: Node) -> Path:
        return store.fetched(node.stage, found[node.id]["key"])

    directory = directory_of(comparison)
    rows = _read_rows(directory / "rows.json")
    evaluations = {(item.name, item.setup.domain, name): (item, node) for item in plan.variants
                   for name, node in item.evaluations.items()}  # fmt: skip
    for row in rows:
        row |= {"study": plan.study.name, "profile": plan.profile.name}
        row.setdefault("replicate", 0)
        row |= dict.fromkeys(("cached", "seconds", "validation_loss"))
        if evaluated := evaluations.get((row["variant"], row["domain"], row["benchmark"])):
            item, node = evaluated
            own = {n.id for n in (item.trained, node) if n is not None}
            row["cached"] = node.id in cached
            row["seconds"] = round(sum(manifests[n]["provenance"]["seconds"] for n in own if n in manifests), 3)
            if item.validations:
                measured = [manifests[node.id]["summary"]["accuracy"] for node in item.validations.values()]
                row["validation_accuracy"] = fmean(measured)
            if item.trained and item.trained.id in manifests:
                row |= _of_training(item, manifests[item.trained.id])
    table = (directory / "table.md").read_text(encoding="utf-8")
    looks = earlier_looks(manifests[comparison.id], store)
    payloads = {name: directory_of(node) for name, node in analyses.items()}
    return Report(rows, table, directory, plan, manifests, looks, payloads, found)


def _of_training(item: Variant, manifest: dict[str, Any]) -> Row:
    """Return the validation loss of what the variant took of its training; and the step, where it has a choice."""
    training, checkpoint = own_training(item.setup), item.setup.checkpoint
    if training is None or training.keep != "all":
        return {"validation_loss": validation_loss(manifest)}
    summary = manifest["summary"]
    step = summary["kept_step"]
    if checkpoint is not None:
        step = validation_step(checkpoint, summary["steps"], training.validations)
    return {"validation_loss": summary["validation_losses"][str(step)], "step": step}


def _manifests(nodes: Iterable[Node], store: ArtifactStore) -> dict[str, dict[str, Any]]:
    """Look up the manifests of nodes, each after the ones that it needs; by node id, those that are there.

    Payloads are not looked at: a large checkpoint takes minutes to verify, and the plan has done so.
    """
    found: dict[str, ArtifactRef] = {}
    manifests: dict[str, dict[str, Any]] = {}
    for node in nodes:
        inputs = {name: found.get(given.node.id) if isinstance(given, Edge) else given
                  for name, given in node.inputs.items()}  # fmt: skip
        if None in inputs.values():
            continue
        key = store.key(STAGES[node.stage], node.recipe, inputs)  # type: ignore[arg-type]
        manifest = store.manifest(node.stage, key)
        if manifest:
            found[node.id] = ArtifactRef(stage=node.stage, key=key, digest=manifest["digest"])
            manifests[node.id] = manifest
    return manifests


def _read_rows(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return rows

"""The Prefect flows: a whole study, one chain, and one flow per stage. Each is served as a deployment (`deployments`).

All of them plan, check, and run nodes through `execute`; what differs is which nodes and what comes after.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import Flow, flow
from prefect.artifacts import create_markdown_artifact
from prefect.task_runners import ThreadPoolTaskRunner

from mft_core.artifacts import ArtifactStore
from mft_core.errors import StageError
from mft_core.stages import STAGES, get_stage
from pipelines.catalogue import Profile, Study, VariantSpec, load_profile, load_study
from pipelines.display import Display
from pipelines.execute import run_nodes, workplace
from pipelines.graph import Node, closure
from pipelines.logs import log_to
from pipelines.plan import Plan, make_plan
from pipelines.preflight import check
from pipelines.record import Recorder
from pipelines.report import Report, comparison_node, read_report
from pipelines.setup import Method

_WORKERS = 8
"""threads that wait for or do work; heavy stages take turns by themselves (`runtime.heavy_slots`)"""


def _runner() -> Any:
    return ThreadPoolTaskRunner(max_workers=_WORKERS)


@flow(name="mft-ablation", flow_run_name="{study} on {profile}", task_runner=_runner(), persist_result=False)
def mft_ablation(
    study: str = "sparsity",
    profile: str = "tiny",
    overrides: list[str] = [],  # noqa: B006  Prefect shows the default in its UI
    seeds: list[int] | None = None,
    rerun: list[str] = [],  # noqa: B006
) -> tuple[list[dict[str, Any]], str, str]:
    """Run every variant of a study and compare them.

    Args:
        study: name of a shipped study, or a YAML file.
        profile: name of a shipped profile, or a YAML file.
        overrides: `key=value` texts, e.g. `mask.sparsity=0.2`.
        seeds: instead of the study's own.
        rerun: stages that are computed again even where they are cached.

    Returns:
        the rows of the report, its table in Markdown, and the directory of its files.
    """
    report = _run_study(load_study(study), load_profile(profile), overrides, seeds, rerun)
    return report.rows, report.table, str(report.directory)


@flow(name="mft-pipeline", flow_run_name="{method} on {profile}", task_runner=_runner(), persist_result=False)
def mft_pipeline(
    profile: str = "tiny",
    method: Method = "mft",
    domain: str | None = None,
    overrides: list[str] = [],  # noqa: B006
    seed: int = 0,
    rerun: list[str] = [],  # noqa: B006
) -> tuple[list[dict[str, Any]], str, str]:
    """Run one chain: data, full fine-tuning, one method, evaluation, compared with the fine-tuned model."""
    study = Study(
        name=f"pipeline-{method}",
        question=f"What does {method} gain over full fine-tuning?",
        domain=domain,
        variants=(VariantSpec(method="fft"), VariantSpec(method=method)),
    )
    report = _run_study(study, load_profile(profile), overrides, [seed], rerun)
    return report.rows, report.table, str(report.directory)


def _run_study(
    study: Study, profile: Profile, overrides: list[str], seeds: list[int] | None, rerun: list[str]
) -> Report:
    plan, store = _checked(study, profile, overrides, seeds, rerun)
    comparison = comparison_node(plan)
    nodes = closure([comparison])
    with (
        _logged(store, study.name) as logfile,
        Recorder(plan, store, logfile) as recorder,
        Display(len(nodes)) as display,
    ):
        outcomes = run_nodes(nodes, workplace(plan, store, display, recorder.progress), display, rerun)
        artifacts = {node_id: outcome.artifact for node_id, outcome in outcomes.items()}
        cached = {node_id: outcome.cached for node_id, outcome in outcomes.items()}
        report = read_report(plan, store, artifacts[comparison.id], cached)
        recorder.record(report, artifacts, cached)
        links = recorder.links()
    create_markdown_artifact(
        f"{study.question}\n\n{report.table}\n\n{links}",
        key=re.sub(r"[^a-z0-9]+", "-", f"{study.name}-{profile.name}".lower()),
        description=f"{study.name} on {profile.name}",
    )
    if recorder.problem:
        print(f"warning: {recorder.problem}. `mft report {study.name} --sync` records it later.", file=sys.stderr)
    return report


@contextlib.contextmanager
def _logged(store: ArtifactStore, name: str) -> Iterator[Path]:
    """Write a log for as long as the context lasts; a stage that fails in it says where the log is."""
    with log_to(store.home, name) as path:
        try:
            yield path
        except StageError as error:
            raise StageError(f"{error}\nlog: {path}") from error


def _checked(
    study: Study, profile: Profile, overrides: list[str], seeds: list[int] | None, rerun: list[str]
) -> tuple[Plan, ArtifactStore]:
    for name in rerun:
        get_stage(name)
    store = ArtifactStore.from_environment()
    plan = make_plan(study, profile, store, overrides, seeds)
    check(plan, store)
    return plan, store


def _stage_flow(stage: str) -> Flow[Any, Any]:
    """Make the flow that runs one stage of a study, and what it needs."""

    @flow(name=stage, flow_run_name="{study} on {profile}", task_runner=_runner(), persist_result=False)
    def stage_flow(
        study: str = "sparsity",
        profile: str = "tiny",
        overrides: list[str] = [],  # noqa: B006
        seeds: list[int] | None = None,
        rerun: list[str] = [],  # noqa: B006
    ) -> list[dict[str, str]]:
        plan, store = _checked(load_study(study), load_profile(profile), overrides, seeds, rerun)
        wanted = _up_to(stage, plan)
        with _logged(store, f"{Path(study).stem}-{stage}"), Display(len(wanted)) as display:
            outcomes = run_nodes(wanted, workplace(plan, store, display), display, rerun)
        return [
            {"label": done.node.label, "directory": str(done.artifact.local_path(store))}
            for done in outcomes.values()
            if done.node.stage == stage
        ]

    return stage_flow


def _up_to(stage: str, plan: Plan) -> list[Node]:
    """Return the nodes of a stage, each after the ones that it needs."""
    return closure(node for node in closure([comparison_node(plan)]) if node.stage == stage)


STAGE_FLOWS: dict[str, Flow[Any, Any]] = {name: _stage_flow(name) for name in STAGES}

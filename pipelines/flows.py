"""The Prefect flows: a whole study, one chain, and one flow per stage. Each is served as a deployment (`deployments`).

A deployment's run is asked with names and plans by itself; the `mft` command has planned before it starts a server, and
hands its plans to the same work (`with_work`). What differs is which nodes are run, and what comes after.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefect import Flow, flow
from prefect.artifacts import create_markdown_artifact
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from mft_core.errors import ConfigError, StageError
from mft_core.methods import MethodName
from mft_core.stage import Progress
from mft_core.statistics.tables import without_seed
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import Study, VariantSpec, load_study
from pipelines.graph.nodes import Edge, Node, closure
from pipelines.plan.analyses import answers
from pipelines.plan.plan import Plan, make_plans
from pipelines.plan.preflight import checked_plans
from pipelines.report.asked import Asked
from pipelines.report.command import check_choices, write_index, write_part
from pipelines.report.record import Recorder, checkpoint_of
from pipelines.report.report import Report, find_report, read_report
from pipelines.report.verdict import Decision, decision
from pipelines.run.display import Display
from pipelines.run.execute import Outcome, run_nodes, workplace
from pipelines.run.logs import log_to, warn
from pipelines.run.search import run_search
from pipelines.run.verdict import reached
from pipelines.servers.runs import told_of
from tasks.mlflow.tracking import Writer
from tasks.stage_task import StageCall, Workplace

if TYPE_CHECKING:
    from pipelines.commands.verdict import Question

_BEFORE_SEARCH = ("prepare-data", "fine-tune")
"""stages that every trial of a search starts from"""
_THREADS = 64
"""that wait for work: at most so many workers of a cluster are kept busy by one run"""
R = TypeVar("R")


def _runner() -> Any:
    return ThreadPoolTaskRunner(max_workers=_THREADS)


@flow(name="mft-ablation", flow_run_name="{study} on {profile}", task_runner=_runner(), persist_result=False)
def mft_ablation(
    study: str = "sparsity",
    profile: str = "tiny",
    overrides: list[str] = [],  # noqa: B006  Prefect shows the default in its UI
    seeds: list[int] | None = None,
    rerun: list[str] = [],  # noqa: B006
    replicates: int | None = None,
) -> tuple[list[dict[str, Any]], str, str]:
    """Run every variant of a study and compare them.

    Args:
        study: name of a shipped study, or a YAML file.
        profile: name of a shipped profile, or a YAML file.
        overrides: `key=value` texts, e.g. `mask.sparsity=0.2`.
        seeds: instead of the study's own.
        rerun: stages that are computed again even where they are cached.
        replicates: fine-tunings, instead of the study's own number.

    Returns:
        the rows of the report, its table in Markdown, and its HTML page.
    """
    asked = Asked(study, profile, overrides, seeds, replicates)
    return run_study(*asked.checked_plans(rerun), load_study(study), asked, rerun)


@flow(name="mft-pipeline", flow_run_name="{method} on {profile}", task_runner=_runner(), persist_result=False)
def mft_pipeline(
    profile: str = "tiny",
    method: MethodName = "mft",
    domain: str | None = None,
    overrides: list[str] = [],  # noqa: B006
    seed: int = 0,
    rerun: list[str] = [],  # noqa: B006
) -> tuple[list[dict[str, Any]], str, str]:
    """Run one chain: data, full fine-tuning, one method, evaluation, compared with the fine-tuned model."""
    name = f"pipeline-{method}"
    study = Study(
        name=name,
        question=f"What does {method} gain over full fine-tuning?",
        domain=domain,
        variants=(VariantSpec(method="fft"), VariantSpec(method=method)),
    )
    params = {"profile": profile, "method": method, "domain": domain, "overrides": overrides, "seed": seed}
    words = [f"--param {key}={shlex.quote(json.dumps(value))}" for key, value in params.items()]
    command = " ".join(["prefect deployment run mft-pipeline", *words])
    planned = checked_plans([study], load_profile(profile), overrides, [seed], rerun)
    return run_study(*planned, study, Asked(name, profile, overrides, [seed], started_by=command), rerun)


def run_study(
    plans: Sequence[Plan],
    store: ArtifactStore,
    whole: Study,
    asked: Asked,
    rerun: Sequence[str],
    done: set[str] | None = None,
) -> tuple[list[dict[str, Any]], str, str]:
    """Run studies as one: what they share is computed once, in whatever order it becomes possible.

    Args:
        plans: of the studies that `whole` is made of, or of itself.
        whole: the study that the user named.
        done: ids of nodes that earlier looks of one command have seen to, not to be computed again; is added to.

    Returns:
        the rows of the reports, their tables in Markdown, and the HTML page of the whole.
    """
    done = set() if done is None else done
    before = set(done)
    nodes = closure(node for plan in plans for node in answers(plan))
    with contextlib.ExitStack() as stack:
        display = Display(len({node.id for node in nodes} - done))
        name = "-".join(plan.study.name for plan in plans)[:80]
        logfile = stack.enter_context(_logged(store, name, asked.command, display))
        writer = stack.enter_context(Writer(store.home, asked.study, warn))
        recorders = [stack.enter_context(Recorder(plan, store, logfile, writer, rerun=bool(rerun))) for plan in plans]
        stack.enter_context(display)

        def record(call: StageCall, progress: Progress) -> None:
            for recorder in recorders:
                recorder.progress(call, progress)

        place = stack.enter_context(workplace(plans, store, display, record))
        if any(plan.search for plan in plans):
            done |= _search(plans, place, recorders, display, rerun)
            studies = [plan.study for plan in plans]  # planned again with what was found
            plans = make_plans(studies, plans[0].profile, store, asked.overrides, asked.seeds, asked.replicates)
            for plan, recorder in zip(plans, recorders, strict=True):
                recorder.expect(plan)
            nodes = closure(node for plan in plans for node in answers(plan))
            display.expect(len(({node.id for node in nodes} | done) - before))
        outcomes = run_nodes(nodes, place, display, rerun, done)
        done.update(outcomes)
        cached = {node_id for node_id, outcome in outcomes.items() if outcome.cached}
        reports = [read_report(plan, store, cached) for plan in plans]
        pages = [
            write_part(report, whole, asked, store, anew=not cached >= set(report.everything)) for report in reports
        ]
        for report, page, recorder in zip(reports, pages, recorders, strict=True):
            recorder.record(report, cached, page.parent)
        for report, page, recorder in zip(reports, pages, recorders, strict=True):
            _show(report, recorder.links(page))
    page = write_index(reports, whole, asked, store) if whole.studies else pages[0]
    check_choices(reports)
    rows = [row for report in reports for row in (*report.rows, *report.contrasts)]
    return rows, "\n\n".join(report.table for report in reports), str(page)


def run_verdict(
    question: Question, store: ArtifactStore
) -> tuple[Decision, Path | None, list[dict[str, Any]], str, str]:
    """Find out within a budget whether a checkpoint can be made better.

    Returns:
        the answer, where the merged checkpoint of the best mask lies, and what `run_study` returns.
    """
    display = Display(0)
    with _logged(store, "verdict", question.command, display), display:
        plan = reached(question, store, display)
    asked = Asked(plan.study.name, str(question.path), started_by=question.command)
    rows, table, page = run_study([plan], store, plan.study, asked, [])
    report = find_report(plan, store)
    found = decision(report)
    named = found.row and without_seed(found.row["variant"])
    best = [item for item in plan.variants if without_seed(item.name) == named]
    merged = checkpoint_of(best[0], report, store) if best else None
    if merged and found.word == "better" and isinstance(made := best[0].model, Edge):
        store.fetched(made.node.stage, report.manifests[made.node.id]["key"])  # what is named lies here
    return found, merged, rows, table, page


def _search(
    plans: Sequence[Plan], place: Workplace, recorders: Sequence[Recorder], display: Display, rerun: Sequence[str]
) -> set[str]:
    """Run the plans' searches one after the other; return the ids of all nodes that were seen to."""
    done: set[str] = set()

    def run(nodes: list[Node]) -> dict[str, Outcome]:
        outcomes = run_nodes(nodes, place, display, rerun, done)
        done.update(outcomes)
        return outcomes

    for plan, recorder in zip(plans, recorders, strict=True):
        if plan.search:
            run_search(plan.search, place.store, run, recorder, display)
    return done


def _show(report: Report, links: str) -> None:
    """Show the answer in Prefect."""
    study, profile = report.plan.study, report.plan.profile.name
    create_markdown_artifact(
        f"{study.question}\n\n{report.table}\n\n{links}",
        key=re.sub(r"[^a-z0-9]+", "-", f"{study.name}-{profile}".lower()),
        description=f"{study.name} on {profile}",
    )


@contextlib.contextmanager
def _logged(store: ArtifactStore, name: str, command: str, display: Display) -> Iterator[Path]:
    """Write a log for as long as the context lasts, and tell of the run; a stage that fails says where the log is."""
    with log_to(store.home, name) as path, told_of(store, command, path, display.snapshot):
        try:
            yield path
        except StageError as error:
            raise StageError(f"{error}\nlog: {path}") from error


@functools.cache
def stage_flow(stage: str) -> Flow[Any, Any]:
    """Return the flow that runs one stage of a study, and what it needs; made when asked for, since it takes time."""

    @flow(name=stage, flow_run_name="{study} on {profile}", task_runner=_runner(), persist_result=False)
    def own_flow(
        study: str = "sparsity",
        profile: str = "tiny",
        overrides: list[str] = [],  # noqa: B006
        seeds: list[int] | None = None,
        rerun: list[str] = [],  # noqa: B006
        replicates: int | None = None,
    ) -> list[dict[str, str]]:
        asked = Asked(study, profile, overrides, seeds, replicates)
        return run_stage(stage, *asked.checked_plans(rerun), asked, rerun)

    return own_flow


def run_stage(
    stage: str, plans: Sequence[Plan], store: ArtifactStore, asked: Asked, rerun: Sequence[str]
) -> list[dict[str, str]]:
    """Run one stage of planned studies, and what it needs."""
    wanted = _up_to(stage, plans)
    display = Display(len(wanted))
    command = f"mft stage {shlex.quote(stage)} {asked.command.removeprefix('mft run ')}"
    with (
        _logged(store, f"{Path(asked.study).stem}-{stage}", command, display),
        display,
        workplace(plans, store, display) as place,
    ):
        outcomes = run_nodes(wanted, place, display, rerun)
    return [
        {"label": done.node.label, "directory": str(done.artifact.local_path(store))}
        for done in outcomes.values()
        if done.node.stage == stage
    ]


def with_work(served: Flow[Any, R], work: Callable[[], R]) -> Flow[Any, Any]:
    """Return a served flow, with its name and parameters, that does this work: of a caller who has planned already.

    Its result is quoted: in the thousands of rows of a large study Prefect would look for futures for seconds.
    """
    here: Flow[Any, Any] = copy.copy(served)
    here.fn = functools.wraps(served.fn)(lambda *args, **named: quote(work()))
    return here


def _up_to(stage: str, plans: Sequence[Plan]) -> list[Node]:
    """Return the nodes of a stage, each after the ones that it needs.

    Raises:
        ConfigError: no study has such a stage, or it depends on a search that has not been run.
    """
    for plan in plans:
        if plan.search and not plan.search.finished and stage not in _BEFORE_SEARCH:
            raise ConfigError(
                f"stage = {stage}: which masks study {plan.study.name} has is known when its search is finished; "
                f"first: mft run {plan.study.name}. Before it, valid are: {', '.join(_BEFORE_SEARCH)}."
            )
    everything = closure(node for plan in plans for node in answers(plan))
    wanted = [node for node in everything if node.stage == stage]
    if not wanted:
        names = ", ".join(plan.study.name for plan in plans)
        raise ConfigError(
            f"stage = {stage}: {names} has none; its stages are {', '.join(sorted({n.stage for n in everything}))}."
        )
    return closure(wanted)

"""Runs a plan inside a Prefect flow: submits every stage once, waits, compares, and tells display and tracker.

A failing stage does not stop the others: what they compute is kept, and the run ends with the list of failures. Called
by the flows only.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.utilities.annotations import quote

from mft_core.data import dropped
from mft_core.errors import ConfigError, StageError, told
from mft_core.stage import Progress
from mft_core.stages import get_stage
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from mft_core.store.sources import Source
from pipelines.cost.predicted import promises
from pipelines.graph.nodes import Edge, Node
from pipelines.plan.plan import Plan
from pipelines.run import interrupt
from pipelines.run.display import Display
from pipelines.servers.services import end_if_lost
from tasks.cluster import Cluster
from tasks.stage_task import Made, StageCall, Workplace, run_stage

log = logging.getLogger("mft")


@dataclass(frozen=True)
class Outcome:
    """What became of one node."""

    node: Node
    artifact: ArtifactRef
    cached: bool


def call_of(node: Node, rerun: bool) -> StageCall:
    """Describe a node's work to its task."""
    return StageCall(
        stage=node.stage,
        recipe=node.recipe,
        label=node.label,
        sources={name: given for name, given in node.inputs.items() if isinstance(given, Source)},
        parts={name: given.part for name, given in node.inputs.items() if isinstance(given, Edge)},
        rerun=rerun,
        node=node.id,
    )


def run_nodes(
    nodes: Iterable[Node],
    place: Workplace,
    display: Display,
    rerun: Sequence[str] = (),
    done: Container[str] = (),
) -> dict[str, Outcome]:
    """Run the nodes (each after the ones that it needs) and return their outcomes by node id.

    Args:
        rerun: names of stages that are computed again even where they are cached.
        done: ids of nodes that this run has seen to before, neither to be computed nor to be announced again.

    Raises:
        ConfigError, StageError: after everything that could run has run; the first names all failures.
    """
    nodes = list(nodes)
    if any(node.id in place.promised and get_stage(node.stage).heavy for node in nodes):
        place.cluster.begin()
    futures: dict[str, PrefectFuture[Made]] = {}
    by_future: dict[PrefectFuture[Made], Node] = {}
    stage_task = run_stage.with_options(result_storage=place.results)
    for node in nodes:
        made = {name: futures[given.node.id] for name, given in node.inputs.items() if isinstance(given, Edge)}
        call = call_of(node, node.stage in rerun and node.id not in done)
        # Prefect hands the task the artifacts in place of the futures; in the rest it need not look for any
        future = stage_task.submit(node.label, quote(call), made, quote(place))  # type: ignore[call-overload]
        if node.id not in done:
            future.add_done_callback(functools.partial(_announce, display, node))
        futures[node.id] = future
        by_future[future] = node
    try:
        wait(list(futures.values()))
    except KeyboardInterrupt:
        place.cluster.stop()
        wait(list(futures.values()))  # until the running stages have kept their state
        raise
    end_if_lost()
    outcomes: dict[str, Outcome] = {}
    failures: list[tuple[Node, Any]] = []
    for future, node in by_future.items():
        if future.state.is_completed():
            ref = ArtifactRef.model_validate(future.result()["artifact"])
            outcomes[node.id] = Outcome(node, ref, _is_cached(future))
            if node.stage == "prepare-data" and node.id not in done:
                _tell_losses(node, ref, place.store, display)
        elif not future.state.is_pending():  # pending: never started, for want of an input that failed
            failures.append((node, future.result(raise_on_failure=False)))
    _raise(failures)
    return outcomes


def _tell_losses(node: Node, ref: ArtifactRef, store: ArtifactStore, display: Display) -> None:
    """Say which rows of the data were dropped, of cached data too."""
    manifest = store.manifest(ref.stage, ref.key)
    if lost := dropped.told(manifest["summary"]) if manifest else None:
        display.say(f"{node.label}: {lost}")


def _announce(display: Display, node: Node, future: PrefectFuture[Made]) -> None:
    future.wait()  # it is done: this takes its final state instead of asking the server
    word = _word(future)
    error: Any = future.result(raise_on_failure=False) if word == "failed" else None
    display.finished(node.label, word, told(error) if error else "")


def _is_cached(future: PrefectFuture[Made]) -> bool:
    """Say whether a task that ended well was served by Prefect, or found its artifact in the store."""
    return future.state.name == "Cached" or not future.result()["computed"]


def _word(future: PrefectFuture[Made]) -> str:
    if future.state.is_pending():  # for want of an input
        return "not run"
    if future.state.is_completed():
        return "cached" if _is_cached(future) else "computed"
    stopped = isinstance(future.result(raise_on_failure=False), interrupt.Interrupted)
    return "stopped" if stopped or interrupt.asked() else "failed"


def _raise(failures: Sequence[tuple[Node, Any]]) -> None:
    """Raise one error that names every failure; a ConfigError if nothing but the configuration was at fault."""
    if not failures:
        return
    for node, error in failures:
        log.error("%s failed", node.label, exc_info=error)
    lines = "\n".join(f"{node.label}: {told(error)}" for node, error in failures)
    if all(isinstance(error, ConfigError) for _, error in failures):
        raise ConfigError(lines)
    raise StageError(lines) from failures[0][1]


@contextlib.contextmanager
def workplace(
    plans: Sequence[Plan],
    store: ArtifactStore,
    display: Display,
    record: Callable[[StageCall, Progress], None] = lambda call, progress: None,
) -> Iterator[Workplace]:
    """Give what the tasks of this flow run share: progress goes to the display and to `record`."""

    def report(call: StageCall, progress: Progress) -> None:
        interrupt.check()
        display.update(call.label, progress)
        record(call, progress)

    notes = {"prefect_flow_run": getattr(flow_run, "id", None)}
    runtime = plans[0].runtime
    with contextlib.closing(Cluster(store.home, runtime, display.say)) as cluster:
        yield promised(Workplace(store, runtime, cluster, report, notes), plans, display)


def promised(place: Workplace, plans: Sequence[Plan], display: Display) -> Workplace:
    """Return the place with what these plans promise to their stages; the display is told too."""
    told = {node_id: one for plan in plans for node_id, one in promises(plan).items()}
    display.promise({step.node.label: told[step.node.id]["seconds"] for plan in plans for step in plan.to_compute})
    return replace(place, promised=told)

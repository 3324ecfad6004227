"""Walks a search inside a flow: every step of it is a round of trials, run like any other stages.

Trials that are cached are served as cached stages are, so a search that was killed goes on where it was, and one that
has been run before computes nothing. Called by `pipelines.flows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mft_core.errors import StageError
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.manifests import validation_loss
from pipelines.graph.nodes import Node, closure
from pipelines.run.display import Display
from pipelines.run.execute import Outcome
from pipelines.search.tables import choice
from pipelines.search.trials import Search, Trial, walk


class TrialRecord(Protocol):
    """Whoever keeps record of a search's trials (`pipelines.report.record`)."""

    def trials(self, trials: Sequence[Trial]) -> None: ...

    def trial_ended(self, trial: Trial, loss: float | None) -> None: ...


def run_search(
    search: Search,
    store: ArtifactStore,
    run: Callable[[list[Node]], Mapping[str, Outcome]],
    recorder: TrialRecord,
    display: Display,
) -> None:
    """Run a search to its end; what it found is in the store, where a new plan finds it.

    Args:
        search: as the plan has it.
        run: runs nodes, each after the ones that it needs, and returns their outcomes by node id.

    Raises:
        ConfigError, StageError: a trial failed.
    """

    def measure(trials: Sequence[Trial]) -> list[float | None]:
        recorder.trials(trials)
        outcomes = run(closure(trial.node for trial in trials))
        losses: list[float | None] = []
        for trial in trials:
            ref = outcomes[trial.node.id].artifact
            manifest = store.manifest(ref.stage, ref.key)
            losses.append(validation_loss(manifest) if manifest else None)
            recorder.trial_ended(trial, losses[-1])
        return losses

    found = walk(search.space, measure)
    if not found.finished:
        without = next(trial for trial in found.trials if trial.loss is None)
        raise StageError(f"search: {without.name} has no validation loss to go by; see its curve, and its log.")
    for seed, trial in found.chosen.items():
        display.say(f"search   seed {seed} chose {choice(trial)} (validation loss {trial.loss:.4f})")

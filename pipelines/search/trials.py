"""The trials of a search as ordinary variants, walked from the cache or by a flow, and what came of them.

A trial on a rung is the variant of its point with a share of the epochs; on the last rung it is the very variant that
a grid over the same space has. Only its mask is learned, and its validation loss read from the manifest; the one of
least loss on the last rung is each seed's choice, and the only one that is evaluated. Used by `pipelines.plan.plan`,
which walks what the store holds, and by `pipelines.run.search`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mft_core.errors import ConfigError
from mft_core.recipes import LearnMask
from pipelines.config.profile import Profile
from pipelines.config.setup import Resolved
from pipelines.config.study import SearchSpec, Study
from pipelines.graph.nodes import Node
from pipelines.graph.variants import Variant, unique_nodes, variant
from pipelines.search.halving import Asked, halving, trials_of_rungs

Manifest = Mapping[str, Any]
Row = dict[str, Any]
Point = tuple[Resolved, Row]
"""a point of a grid: its setup, and the point with the values that are meant"""


@dataclass(frozen=True)
class Trial:
    """A point of the space, trained for the share of its rung."""

    seed: int
    asked: Asked
    share: float
    """of the epochs"""
    variant: Variant
    keys: Sequence[str]
    """of the space"""
    loss: float | None = None
    """validation loss of the mask that was kept; None until it is known"""

    @property
    def node(self) -> Node:
        """The training."""
        assert self.variant.trained is not None  # only methods that train scores are searched
        return self.variant.trained

    @property
    def name(self) -> str:
        """What tells it apart from every other trial of the study."""
        return f"seed {self.seed} trial {self.asked.number:02d}, {100 * self.share:.4g}% of the epochs"

    @property
    def columns(self) -> Row:
        """What identifies the trial in tables and in MLflow, numbers as numbers; None is left out there."""
        recipe = self.node.recipe
        assert isinstance(recipe, LearnMask)
        assert recipe.training
        layers = [int(part) for part in recipe.layers.replace(",", "-").split("-")]
        own = {key: value for key, value in self.variant.columns.items() if key not in ("variant", "seed")}
        return {
            "seed": self.seed,
            "trial": self.asked.number,
            **own,
            "first_layer": layers[0],
            "last_layer": layers[-1],
            "mask.training.learning_rate": recipe.training.learning_rate,
            "mask.training.epochs": recipe.training.epochs,
            "rung": self.share,
        }


Measure = Callable[[Sequence[Trial]], Sequence[float | None]]
"""the validation losses of trials, None where one is not known"""


@dataclass(frozen=True)
class Space:
    """What is searched: every point with its setup, for each seed."""

    spec: SearchSpec
    values: Mapping[str, Sequence[Any]]
    points: Mapping[int, Sequence[Point]]
    """by seed, in the order of the grid"""
    keys: frozenset[str]
    """everything that the study varies"""

    @property
    def size(self) -> int:
        """The number of points."""
        return len(next(iter(self.points.values())))

    @property
    def per_rung(self) -> list[int]:
        """How many trials of a seed each rung trains."""
        return trials_of_rungs(self.spec, self.size)

    @property
    def cost(self) -> float:
        """Trainings of the whole length that one seed's search is worth; the full grid's is `size`."""
        return sum(n * share for n, share in zip(self.per_rung, self.spec.rungs, strict=True))

    def trial(self, seed: int, asked: Asked) -> Trial:
        """Return the variant of what a search asks for."""
        at = list(itertools.product(*(range(len(each)) for each in self.values.values()))).index(asked.point)
        share = self.spec.rungs[asked.rung]
        return Trial(seed, asked, share, self.variant(seed, at, share), tuple(self.values))

    def variant(self, seed: int, at: int, share: float = 1.0) -> Variant:
        """Return the variant of the point at a place of the grid, trained for a share of the epochs."""
        resolved, point = self.points[seed][at]
        if share != 1:
            setup = resolved.setup
            epochs = float(f"{setup.mask.training.epochs * share:.6g}")
            training = setup.mask.training.model_copy(update={"epochs": epochs})
            mask = setup.mask.model_copy(update={"training": training})
            resolved = replace(resolved, setup=setup.model_copy(update={"mask": mask}))
            point = {**point, "mask.training.epochs": epochs}
        return variant(resolved, point, self.keys | {"mask.training.epochs"})


@dataclass(frozen=True)
class Search:
    """A search as far as it has come."""

    space: Space
    trials: Sequence[Trial]
    """those asked for, in the order of asking; the last of a seed that is not finished have no loss"""

    @property
    def finished(self) -> bool:
        """Whether every seed has made its choice."""
        return len(self.trials) == self.trainings and all(trial.loss is not None for trial in self.trials)

    @property
    def trainings(self) -> int:
        """How many trainings all seeds' searches are."""
        return len(self.space.points) * sum(self.space.per_rung)

    @property
    def nodes(self) -> list[Node]:
        """The trainings asked for."""
        return [trial.node for trial in self.trials]

    @property
    def variants(self) -> list[Variant]:
        """The variants of all trials, and of what stands for those to come."""
        return [*(trial.variant for trial in self.trials), *self._stand_ins]

    @property
    def to_come(self) -> list[Node]:
        """Nodes that are as large as those of which nothing is known yet: trainings, and what follows the choices."""
        following = [node for item in self._stand_ins for node in unique_nodes([item])
                     if node.stage in ("merge-mask", "evaluate")]  # fmt: skip
        trained = [item.trained for item in self._stand_ins[:1] if item.trained]
        return following + trained * (self.trainings - len(self.trials))

    @functools.cached_property
    def _stand_ins(self) -> list[Variant]:
        """A variant for each seed that is as large as the one to be chosen."""
        return [] if self.finished else [self.space.variant(seed, 0) for seed in self.space.points]

    @functools.cached_property
    def chosen(self) -> dict[int, Trial]:
        """By seed the trial of least validation loss on the last rung; empty until the search is finished."""
        if not self.finished:
            return {}
        last = [trial for trial in self.trials if trial.share == 1]
        return {
            seed: min((t for t in last if t.seed == seed), key=lambda t: (t.loss or 0.0, t.asked.number))
            for seed in self.space.points
        }

    def state(self, trial: Trial) -> str:
        """Say what became of a trial on its rung: 'stopped', 'went on', 'finished' or 'chosen'."""
        if trial.share == 1:
            return "chosen" if self.chosen.get(trial.seed) is trial else "finished"
        later = ((t.seed, t.asked.number) for t in self.trials if t.asked.rung > trial.asked.rung)
        return "went on" if (trial.seed, trial.asked.number) in later else "stopped"


def space_of(study: Study, profile: Profile, found: Sequence[Point]) -> Space:
    """Return the space of the study's search.

    Args:
        found: every point, for each seed.

    Raises:
        ConfigError: two points that are the same, or no validation loss to go by.
    """
    spec = study.search
    assert spec is not None
    values = spec.family.values(profile)
    points: dict[int, list[Point]] = {}
    for resolved, point in found:
        points.setdefault(resolved.setup.seed, []).append((resolved, point))
    size = math.prod(len(each) for each in values.values())
    if not all(resolved.setup.mask.training.validations for resolved, _ in found):
        raise ConfigError(
            f"study {study.name}: mask.training.validations = 0: a search goes by the validation loss; "
            "set mask.training.validations to 1 or more."
        )
    if len(spec.rungs) > 1 and any(resolved.setup.mask.training.max_steps for resolved, _ in found):
        raise ConfigError(
            f"study {study.name}: mask.training.max_steps cannot be set: trials would train as long on every rung; "
            "set mask.training.epochs."
        )
    space = Space(spec, values, points, frozenset(key for family in study.families for key in family.grid))
    work = [[space.variant(seed, at).trained for at in range(len(own))] for seed, own in points.items()]
    different = min(len({node.id for node in nodes if node}) for nodes in work)
    if different < max(size, 2):
        raise ConfigError(
            f"study {study.name}: search.space has {size} points, {different} of them "
            "different; valid: two points or more, each written once."
        )
    return space


def walk(space: Space, measure: Measure) -> Search:
    """Walk the searches of all seeds together, as far as their trials' losses can be measured."""
    walks = {seed: halving(space.values, space.spec, seed) for seed in space.points}
    asked = {seed: next(steps) for seed, steps in walks.items()}
    trials: list[Trial] = []
    while asked:
        batch = [space.trial(seed, one) for seed, several in asked.items() for one in several]
        losses = measure(batch)
        batch = [replace(trial, loss=loss) for trial, loss in zip(batch, losses, strict=True)]
        trials += batch
        asked = _next(walks, batch)
    return Search(space, trials)


def _next(walks: Mapping[int, Any], batch: Sequence[Trial]) -> dict[int, list[Asked]]:
    """Tell each search its losses; return what those ask for next that are neither at an end nor lack a loss."""
    asked: dict[int, list[Asked]] = {}
    for seed in dict.fromkeys(trial.seed for trial in batch):
        losses = [trial.loss for trial in batch if trial.seed == seed]
        if None not in losses:
            try:
                asked[seed] = walks[seed].send(losses)
            except StopIteration:
                continue
    return asked

"""Which points of a space are trained, and for how long: TPE proposes them, successive halving drops them.

On the first rung every trial is trained for a small share of the epochs; Optuna's TPE sampler (Bergstra et al. 2011)
proposes a few at a time and is told their validation losses. One of `eta` trials, those of least loss, then goes on
to the next rung, where it is trained anew with a schedule of that length (Jamieson & Talwalkar 2016). Halving is
synchronous and done here: Optuna's pruner is the asynchronous one, which lets a trial go on because it came early,
depends on the order in which trials end, and does not say beforehand what a search costs. The sampler therefore
hears losses of one length of training only.

Nothing here depends on time, threads or machine. A search that is walked again with the same losses proposes the same
points, which is how one that was killed goes on. Used by `pipelines.search.trials`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.config.study import SearchSpec

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

Point = tuple[int, ...]
"""for each key of the space, the position of a value in its list"""
_ASKS = 20
"""proposals that may be points tried before, until one is drawn at random among those that were not"""
_RANDOM_SHARE = 3
"""one of so many trials is drawn at random before TPE proposes; at least `_RANDOM_FIRST`"""
_RANDOM_FIRST = 4


@dataclass(frozen=True)
class Asked:
    """A training that the search wants: a trial on a rung."""

    number: int
    """of the trial, from 0 in each search"""
    point: Point
    rung: int


def halving(
    values: Mapping[str, Sequence[Any]], spec: SearchSpec, seed: int
) -> Generator[list[Asked], Sequence[float], None]:
    """Walk a search: yields trainings that can be done beside each other, is sent their validation losses.

    Args:
        values: the space; values that are numbers, layers or factors count as ordered as they are written.
        seed: of the proposals.
    """
    every = list(itertools.product(*(range(len(each)) for each in values.values())))
    on_rung = trials_of_rungs(spec, len(every))
    proposer = _Proposer(values, every, max(_RANDOM_FIRST, on_rung[0] // _RANDOM_SHARE), seed)
    tried: list[tuple[float, Asked]] = []
    while len(tried) < on_rung[0]:
        numbers = range(len(tried), min(len(tried) + spec.batch, on_rung[0]))
        proposals = [proposer.propose() for _ in numbers]
        asked = [Asked(number, point, 0) for number, (_, point) in zip(numbers, proposals, strict=True)]
        losses = yield asked
        for (trial, _), loss in zip(proposals, losses, strict=True):
            proposer.tell(trial, loss)
        tried += zip(losses, asked, strict=True)
    for rung, count in enumerate(on_rung[1:], start=1):
        best = sorted(tried, key=lambda found: (found[0], found[1].number))[:count]
        asked = sorted((Asked(one.number, one.point, rung) for _, one in best), key=lambda one: one.number)
        losses = yield asked
        tried = list(zip(losses, asked, strict=True))


def trials_of_rungs(spec: SearchSpec, points: int) -> list[int]:
    """Return how many trials of a seed each rung trains, in a space of so many points."""
    first = min(spec.trials, points)
    return [max(1, first // spec.eta**rung) for rung in range(len(spec.rungs))]


class _Proposer:
    """Optuna's sampler, made to propose every point once."""

    def __init__(self, values: Mapping[str, Sequence[Any]], every: Sequence[Point], random_first: int, seed: int):
        self._space = {key: _distribution(each) for key, each in values.items()}
        self._study = _study(seed, random_first)
        self._untried = list(every)
        self._dice = random.Random(seed)

    def propose(self) -> tuple[Trial, Point]:
        """Return Optuna's trial and its point, one that has not been tried."""
        from optuna.trial import TrialState

        for _ in range(_ASKS):
            trial = self._study.ask(self._space)
            if self._point(trial) in self._untried:
                break
            self._study.tell(trial, state=TrialState.FAIL)  # which the sampler does not look at
        else:
            point = self._dice.choice(self._untried)
            self._study.enqueue_trial(dict(zip(self._space, point, strict=True)))
            trial = self._study.ask(self._space)
        self._untried.remove(self._point(trial))
        return trial, self._point(trial)

    def tell(self, trial: Trial, loss: float) -> None:
        """Tell the sampler what a proposal was worth."""
        self._study.tell(trial, loss)

    def _point(self, trial: Trial) -> Point:
        return tuple(trial.params[key] for key in self._space)


def _study(seed: int, random_first: int) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would announce every study and trial
    # several settings at once, as they depend on each other; what is being tried counts as bad, to be spread out
    sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=random_first, multivariate=True, constant_liar=True
    )
    return optuna.create_study(sampler=sampler, direction="minimize")


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    """Return positions in the list, as an axis where neighbours are alike, or as names of which no two are."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    ordered = all(any(letter.isdigit() for letter in str(value)) for value in values)
    return IntDistribution(0, len(values) - 1) if ordered else CategoricalDistribution(range(len(values)))

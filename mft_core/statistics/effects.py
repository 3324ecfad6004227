"""How large a gain is, for these checkpoints and for the recipe: paired differences as a crossed random-effects model.

The outcomes of a study are differences `d[replicate, seed, item]` between a treatment and its baseline on the same
items; replicates are fine-tunings, seeds are trainings of the treatment within one, and both answer all of the items:

    d[r, s, i] = gain + replicate[r] + seed[r, s] + item[i] + replicate × item[r, i] + rest[r, s, i]

*This checkpoint* holds the replicates fixed and draws seeds and items; *this recipe* draws replicates too. Either way
the design is *units × items*, units being seeds within replicates or the replicates, and by the two-way analysis of
variance (Searle, Casella & McCulloch 1992, section 4.3) the variance of the mean of U units is

    V = a / U + v − e / U,    a: variance between the units' means, e: the part of `a` that the sampling of items
                              makes (units × items), v: variance of the items' means, over the number of items

with Student's t and the degrees of freedom of Satterthwaite (1946). Negative components are not cut off at zero. As two
or three units can agree by luck, an interval is never narrower than that of units which do not differ (a = e), and `a`
is pooled with what earlier studies measured (`UnitVariance`, a scaled inverse-χ² prior; Gelman et al. 2013, section
2.6). Without earlier studies, units that seem hardly to differ are not believed: where a ≤ e, intervals held the truth
in 71 to 75 of 100 studies with 3 units and 3 points of seed noise, in 77 to 87 where a is up to half as large again.
`ORDINARY` is the prior then, of a weight that falls as the study's own estimate rises, to none at `_BELIEVED` times e,
and no larger than what the study itself leaves possible: the upper end of a one-sided 98% interval for a. A prior of
fewer degrees of freedom than that of `ORDINARY` leaves it the rest of its weight.
Where units really do not differ the interval is too wide: after such an estimate no width is right for both. Several
benchmarks, or subjects of one: the unweighted mean. Clusters of items are drawn whole (Liang & Zeger 1986). For
right/wrong outcomes one item won and one lost are added to each benchmark (Bonett & Price 2012); of several trainings
these two are made as much smaller as averaging makes the squares of the others, or intervals would be too wide.

Every function takes leading axes before (replicates, seeds, items), so simulations are one call. Imports neither pandas
nor scipy.stats: `mft compare` has to answer at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy  # which imports its modules when they are used
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Over = Literal["checkpoint", "recipe"]
LEAST_REPLICATES = 3
"""with two, Student's t has one degree of freedom: its 95% interval is 12.7 standard errors to either side"""
_MOST_PRIOR_FREEDOM = 20.0
"""so that a study can overrule the earlier ones"""
_BELIEVED = 5.0
"""times what the sampling of items makes, from which on a variance between units stands for itself"""
_POSSIBLE = 0.02
"""a variance of which the study's own estimate, or a smaller one, comes more seldom is not possible"""
_ROUNDING = 1e-12
"""a standard error of so little of the gain is that of numbers that do not vary"""


class TooFewReplicatesError(ValueError):
    """A claim about the recipe needs at least `LEAST_REPLICATES` fine-tunings."""


@dataclass(frozen=True)
class Stratum:
    """The differences on one benchmark, positive where the treatment is better: (…, replicates, seeds, items)."""

    differences: Array
    clusters: NDArray[np.intp] | None = None
    """of each item the group that it belongs to (the instructions of one prompt); None: every item is its own"""
    subjects: NDArray[np.intp] | None = None
    """of each item the part of the benchmark that counts as much as any other part; None: every item counts alike"""

    @classmethod
    def of(
        cls, differences: ArrayLike, clusters: Sequence[Any] | None = None, subjects: Sequence[Any] | None = None
    ) -> Stratum:
        """Take differences of shape (items,), (seeds, items) or (replicates, seeds, items)."""
        values = np.asarray(differences, dtype=float)
        values = values.reshape((1,) * (3 - values.ndim) + values.shape) if values.ndim < 3 else values
        return cls(values, _groups(clusters, values.shape[-1]), _groups(subjects, 1))

    @property
    def drawn(self) -> int:
        """How many items, or clusters of them, were drawn."""
        return self.differences.shape[-1] if self.clusters is None else int(self.clusters.max()) + 1

    def first(self, replicates: int) -> Stratum:
        """Return the differences of the first replicates alone."""
        return Stratum(self.differences[..., :replicates, :, :], self.clusters, self.subjects)

    def items(self, kept: NDArray[np.bool_]) -> Stratum:
        """Return some of the items."""
        groups = (None if of is None else of[kept].tolist() for of in (self.clusters, self.subjects))
        return Stratum.of(self.differences[..., kept], *groups)

    def parts(self) -> list[Stratum]:
        """Return the subjects, each a stratum of its own; without subjects the whole."""
        if self.subjects is None:
            return [self]
        return [self.items(self.subjects == one) for one in range(int(self.subjects.max()) + 1)]


def _groups(names: Sequence[Any] | None, trivial: int) -> NDArray[np.intp] | None:
    """Number the groups that items are named by; None: there is one group, or as many as `trivial`."""
    if names is None:
        return None
    order, groups = np.unique([str(name) for name in names], return_inverse=True)
    return None if len(order) == trivial else groups


def weights(subjects: Sequence[Any]) -> Array:
    """Return what each item counts, 1 on average, so that every subject counts as much as any other."""
    _, groups, sizes = np.unique([str(name) for name in subjects], return_inverse=True, return_counts=True)
    return np.asarray(len(groups) / (len(sizes) * sizes[groups]), dtype=float)


class UnitVariance(NamedTuple):
    """How much trainings that differ in the seed alone differ in their gain: a scaled inverse-χ² distribution."""

    relative: float
    """variance between units, without what the sampling of items adds, over the variance of units × items (× clusters
    of them, where these are drawn); it may be negative. So measured it is comparable between benchmarks, and between
    masks that change many or few answers"""
    freedom: float

    @classmethod
    def of_the_same(cls, measured: Sequence[UnitVariance]) -> UnitVariance:
        """Sum up what several treatments of the same units say: they share the units, so they count as one of them."""
        return cls(float(np.mean([one.relative for one in measured])), max(one.freedom for one in measured))

    @classmethod
    def pooled(cls, measured: Sequence[UnitVariance]) -> UnitVariance | None:
        """Pool what was measured on different units, weighted by the degrees of freedom; None of none."""
        freedom = sum(one.freedom for one in measured)
        if not freedom:
            return None
        relative = sum(one.relative * one.freedom for one in measured) / freedom
        return cls(relative, min(freedom, _MOST_PRIOR_FREEDOM))


ORDINARY = UnitVariance(relative=0.022, freedom=6.0)
"""what trainings may differ by where nothing is known of them: 3.7 points where units × items have a variance of 1/16,
somewhat more than `tiny`'s fine-tunings and masks; weighed so that, of the studies with an estimate of zero, 93 of 100
hold the truth with seed noise of up to 3 points and 3 to 10 units"""


@dataclass(frozen=True)
class Estimate:
    """A mean gain as a share, with what is known of it; arrays where the differences had leading axes."""

    gain: Any
    low: Any
    high: Any
    p_value: Any
    """two-sided, of no gain"""
    standard_error: Any
    freedom: Any
    """degrees of freedom (Satterthwaite 1946)"""
    centre: Any
    """of the interval: the gain, but for the two items that are added to right/wrong outcomes"""
    confidence: float = 0.95
    by_sign: float = 1.0
    """one-sided p-value where the standard error is 0: of all items on one side; 1 where several trainings or
    benchmarks are in it, of which that would say little"""

    @property
    def detectable(self) -> Any:
        """The smallest true gain that this design finds with a power of 80%."""
        alpha = 1 - self.confidence
        return (_quantile(1 - alpha / 2, self.freedom) + _quantile(0.8, self.freedom)) * self.standard_error

    def p_equivalence(self, margin: float) -> Any:
        """Return the p-value of two one-sided tests (Schuirmann 1987) that the gain is within ±`margin`."""
        within = margin - np.abs(self.centre)
        with np.errstate(divide="ignore", invalid="ignore"):
            by_t = 1 - scipy.special.stdtr(self.freedom, within / self.standard_error)
        by_sign = np.where(within > 0, self.by_sign, 1.0)
        return np.where(self.standard_error > 0, by_t, by_sign)[()]


@dataclass(frozen=True)
class _Moments:
    """What the analysis of variance needs, of the mean over benchmarks."""

    gain: Array
    centre: Array
    between: Array
    """`a`"""
    interaction: Array
    """`e`"""
    rest: Array
    """variance of units × items, the mean over benchmarks or subjects, by which what they share is measured"""
    items: Array
    """`v`"""
    items_freedom: Array
    units: int
    freedom: int
    """of `between`; 0: there is one unit"""
    clusters: int


def estimate(
    strata: Sequence[Stratum],
    over: Over = "checkpoint",
    confidence: float = 0.95,
    prior: UnitVariance | None = None,
    chosen_from: int = 1,
) -> Estimate:
    """Estimate the mean gain over benchmarks.

    Args:
        strata: one for each benchmark, all of the same replicates and seeds.
        over: what the claim is about.
        confidence: of the interval.
        prior: what earlier studies measured of the units' variance.
        chosen_from: the treatment was chosen among so many by these same units, on other items; what the units add is
            then that of the largest of so many (Šidák 1967), which bounds what choosing can do.

    Raises:
        TooFewReplicatesError: a claim about the recipe from fewer than three.
        ValueError: benchmarks with different numbers of replicates or seeds.
    """
    found = _moments(strata, over)
    items_only = np.maximum(found.items, 0.0)
    error, freedom = np.sqrt(items_only), found.items_freedom
    if found.freedom:
        between, known = found.between, np.asarray(found.freedom, dtype=float)
        # what is ordinary: no more than the study leaves possible, and less and less of it as its own estimate rises
        possible = np.maximum(between, found.interaction) * known / scipy.special.chdtri(known, 1 - _POSSIBLE)
        ordinary = np.minimum(found.interaction + ORDINARY.relative * found.rest, possible)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(between > 0, between / found.interaction, 0.0)
        doubt = np.clip((_BELIEVED - ratio) / (_BELIEVED - 1), 0.0, 1.0)
        ordinary = doubt * ordinary + (1 - doubt) * np.maximum(between, found.interaction)
        earlier = prior or UnitVariance(0.0, 0.0)
        weight = ORDINARY.freedom * doubt * max(0.0, 1 - earlier.freedom / ORDINARY.freedom)
        of_earlier = found.interaction + earlier.relative * found.rest
        total = weight + earlier.freedom + known
        between = (weight * ordinary + earlier.freedom * of_earlier + known * between) / total
        known = total
        alpha = 1 - confidence
        if chosen_from > 1:
            sidak = (1 - alpha) ** (1 / chosen_from)
            more = _quantile((1 + sidak) / 2, known) / _quantile(1 - alpha / 2, known)
            between = found.interaction + np.maximum(between - found.interaction, 0.0) * more**2
        parts = between / found.units, found.items, found.interaction / found.units
        variance = parts[0] + parts[1] - parts[2]
        uncertain = parts[0] ** 2 / known + parts[1] ** 2 / found.items_freedom
        uncertain = uncertain + parts[2] ** 2 / (found.freedom * max(1, found.clusters - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            of_all = np.where(uncertain > 0, np.maximum(variance, 0.0) ** 2 / uncertain, known)
        of_all = np.maximum(of_all, 1.0)
        of_units = np.sqrt(np.maximum(variance, 0.0))
        wider = _quantile(1 - alpha / 2, of_all) * of_units >= _quantile(1 - alpha / 2, freedom) * error
        error, freedom = np.where(wider, of_units, error), np.where(wider, of_all, freedom)
    largest = np.max([np.abs(stratum.differences).max(axis=(-1, -2, -3)) for stratum in strata], axis=0)
    error = np.where(error > _ROUNDING * largest, error, 0.0)
    half = _quantile((1 + confidence) / 2, freedom) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        by_t = 2 * scipy.special.stdtr(freedom, -np.abs(found.centre) / error)
    # numbers that do not vary have no t: that all of them are on one side is left, the sign test (Arbuthnott 1710)
    alone = len(strata) == 1 and found.units == 1 and strata[0].subjects is None
    by_sign = 0.5 ** strata[0].drawn if alone else 1.0
    p_value = np.where(error > 0, by_t, np.where(found.centre == 0, 1.0, min(1.0, 2 * by_sign)))
    if alone and strata[0].clusters is None and _is_binary(strata[0].differences):
        p_value = _mcnemar(strata[0].differences)
    low, high = found.centre - half, found.centre + half
    if all(_is_binary(stratum.differences) for stratum in strata):
        low, high = np.maximum(low, -1.0), np.minimum(high, 1.0)
    values = found.gain, low, high, p_value, error, freedom, found.centre
    gain, low, high, p_value, error, freedom, centre = (np.asarray(value)[()] for value in values)
    return Estimate(gain, low, high, p_value, error, freedom, centre, confidence, by_sign)


def unit_variance(strata: Sequence[Stratum], over: Over) -> UnitVariance | None:
    """Return what this study alone measures of the variance between units; None where it has one unit."""
    if over == "recipe" and strata[0].differences.shape[-3] < 2:
        return None
    found = _moments(strata, over, least=2)
    if not found.freedom:
        return None
    rest = float(found.rest)
    relative = (float(found.between) - float(found.interaction)) / rest if rest else 0.0
    return UnitVariance(relative, found.freedom)


def _moments(strata: Sequence[Stratum], over: Over, least: int = LEAST_REPLICATES) -> _Moments:
    shapes = {stratum.differences.shape[-3:-1] for stratum in strata}
    if len(shapes) != 1:
        raise ValueError(f"benchmarks with different replicates or seeds: {sorted(shapes)}")
    ((replicates, _),) = shapes
    if over == "recipe" and replicates < least:
        raise TooFewReplicatesError(f"{replicates} replicates; a claim about the recipe needs {least} or more")
    means, centres, items, interactions, rests, freedoms = [], [], [], [], [], []
    parts = [(part, 1 / len(of)) for of in (stratum.parts() for stratum in strata) for part in of]
    for stratum, weight in parts:
        values = stratum.differences
        if over == "recipe":
            values = values.mean(axis=-2, keepdims=True).swapaxes(-3, -2)
        count = values.shape[-1]
        units = values.mean(axis=-1)  # (…, groups, units)
        of_items = values.mean(axis=(-3, -2))
        gain = of_items.mean(axis=-1)
        clusters = stratum.drawn
        correction = clusters / max(1, clusters - 1)
        totals = _totals((of_items - gain[..., None]) / count, stratum.clusters)
        item = correction * (totals**2).sum(axis=-1)
        centre = gain
        if _is_binary(stratum.differences):
            # with an item won and one lost: n + 2 items, the squares grow by the two and by the shift of the mean; of
            # several trainings the two shrink as the other items do, whose answers do not all differ together
            share, single = count / (count + 2), (stratum.differences**2).mean(axis=(-3, -2)).sum(axis=-1)
            two = 2 * np.divide((of_items**2).sum(axis=-1), single, out=np.ones_like(single), where=single > 0)
            item = (item / correction * count**2 + two + gain**2 * 2 * share) / (count + 2) ** 2 * correction
            centre = gain * share
        freedom = units.shape[-2] * (units.shape[-1] - 1)
        if freedom:
            residual = values - values.mean(axis=-2, keepdims=True)
            residual = residual - residual.mean(axis=-1, keepdims=True)
            squares = (_totals(residual / count, stratum.clusters) ** 2).sum(axis=(-1, -2, -3))
            interaction = correction * squares / freedom
        else:
            interaction = np.zeros_like(gain)
        means.append(units * weight)
        centres.append(centre * weight)
        items.append(item * weight**2)
        interactions.append(interaction * weight**2)
        rests.append(interaction * clusters * weight)
        freedoms.append(max(1, clusters - 1))
    number = len(strata)
    units = sum(means) / number
    squared = sum(item**2 / freedom for item, freedom in zip(items, freedoms, strict=True)) / number**4
    total = sum(items) / number**2
    freedom = units.shape[-2] * (units.shape[-1] - 1)
    between = units.var(axis=-1, ddof=1).mean(axis=-1) if freedom else np.zeros_like(total)
    with np.errstate(divide="ignore", invalid="ignore"):
        items_freedom = np.where(squared > 0, total**2 / squared, float(sum(freedoms)))
    return _Moments(
        gain=units.mean(axis=(-1, -2)),
        centre=sum(centres) / number,
        between=between,
        interaction=sum(interactions) / number**2,
        rest=sum(rests) / number,
        items=total,
        items_freedom=np.maximum(items_freedom, 1.0),
        units=units.shape[-1] * units.shape[-2],
        freedom=freedom,
        clusters=sum(freedoms) + 1,
    )


def _totals(values: Array, clusters: NDArray[np.intp] | None) -> Array:
    """Return the sums over each cluster of items."""
    if clusters is None:
        return values
    order = np.argsort(clusters, kind="stable")
    starts = np.searchsorted(clusters[order], np.arange(int(clusters.max()) + 1))
    return np.add.reduceat(values[..., order], starts, axis=-1)


def _is_binary(differences: Array) -> bool:
    """Whether the outcomes are right or wrong."""
    return bool(np.isin(differences, (-1.0, 0.0, 1.0)).all())


def _mcnemar(differences: Array) -> Any:
    """Return the p-value of McNemar's exact test (1947)."""
    won, lost = ((sign * differences > 0).sum(axis=(-1, -2, -3)) for sign in (1, -1))
    return np.minimum(1.0, 2 * scipy.special.bdtr(np.minimum(won, lost), won + lost, 0.5))


def _quantile(share: Any, freedom: Any) -> Any:
    """Return Student's t quantile."""
    return scipy.special.stdtrit(freedom, share)

"""What was measured of one mask: as JSON, pooled over seeds, and as rows. Used by `mft_core.analysis.anatomy`.

Pooled counts are sums, so that share, ratio and range by chance are those of all seeds' weights together; a pooled cost
is the mean over seeds on the same sequences. Its interval speaks of the sequences, not of other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np

from mft_core.analysis.cuts import Group, Measures, Spread, Tally, add
from mft_core.analysis.removals import Effect, Order, Portion, costs
from mft_core.analysis.sequence_loss import Array
from mft_core.recipes import Anatomy

Row = dict[str, Any]


@dataclass(frozen=True)
class MaskFindings:
    """What was measured of one mask, or of all seeds of a variant together."""

    measures: Measures
    effects: list[Effect]
    """empty for masks of another base"""

    def content(self) -> dict[str, Any]:
        """Return what JSON can hold; `of` gives the same numbers back."""
        return {
            "measures": [[*group, *astuple(number)] for group, number in self.measures.items()],
            "effects": [[*one.portion, one.order, one.removed, one.nats.tolist()] for one in self.effects],
        }

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> MaskFindings:
        """Read what `content` gave."""
        measures: Measures = {}
        for values in content["measures"]:
            group, numbers = Group(*values[: len(Group._fields)]), values[len(Group._fields) :]
            measures[group] = Spread(*numbers) if group.part == "spread" else Tally(*numbers)
        measured = (
            Effect(Portion(by, value), order, removed, np.array(nats))
            for by, value, order, removed, nats in content["effects"]
        )
        return cls(measures, list(measured))


def pool(seeds: Sequence[MaskFindings]) -> MaskFindings:
    """Return the findings of all seeds together; a portion that a measured one lacks costs nothing there."""
    measures: Measures = {}
    for one in seeds:
        for group, number in one.measures.items():
            measures[group] = add(measures.get(group), number)  # type: ignore[type-var]  # a part has numbers of one kind
    effects: dict[tuple[Portion, Order], list[Effect]] = {}
    for one in seeds:
        for effect in one.effects:
            effects.setdefault((effect.portion, effect.order), []).append(effect)
    measured = sum(bool(one.effects) for one in seeds)
    return MaskFindings(measures, [_mean(own, measured) for own in effects.values()])


def _mean(effects: Sequence[Effect], seeds: int) -> Effect:
    first = effects[0]
    nats = np.sum([one.nats for one in effects], axis=0) / seeds
    return Effect(first.portion, first.order, sum(one.removed for one in effects), nats)


def rows(findings: MaskFindings, columns: Mapping[str, Any], recipe: Anatomy, base: Array, tokens: Array) -> list[Row]:
    """Return every number of one mask, or of one variant.

    Args:
        columns: that name it, and `pooled`; heads are left out where it is false.
        base: nats of every sequence in the base model.
        tokens: loss tokens of every sequence.
    """
    found: list[Row] = []
    for group, number in findings.measures.items():
        if group.part == "head" and not columns["pooled"]:
            continue  # a model has thousands of heads
        where = {key: value for key, value in group._asdict().items() if value is not None}
        counted = asdict(number) if isinstance(number, Tally) else {}
        found.append({**columns, **where, **counted, **number.figures(recipe.confidence)})
    if not findings.effects:
        return found
    nats = np.stack([one.nats for one in findings.effects])
    measured = costs(nats, tokens, recipe.bootstrap, recipe.confidence, recipe.seed)
    for effect, (cost, low, high) in zip(findings.effects, measured.tolist(), strict=True):
        by, value = effect.portion
        where = {"part": "loss", "by": by, **({} if value is None else {by: value}), "order": effect.order}
        numbers = {"removed": effect.removed, "cost": cost, "cost_low": low, "cost_high": high}
        if by == "mask":
            numbers |= {"base_loss": base.sum() / tokens.sum(), "sequences": len(tokens), "tokens": int(tokens.sum())}
        found.append({**columns, **where, **numbers})
    alone = [row["cost"] for row in found if row.get("by") == "layer" and row["order"] == "alone"]
    return found + (
        [{**columns, "part": "loss sum", "by": "layer", "order": "alone", "cost": sum(alone)}] if alone else []
    )

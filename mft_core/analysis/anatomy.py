"""The anatomy of masks: where each one cuts, how far they agree, and what the removed weights did, as flat rows.

All masks are looked at on one model, their base. What is measured of a mask is kept in `context.work`, so that a killed
analysis goes on at the next mask.

Masks that differ in nothing but the seed are pooled: counts are sums, so that share, ratio and range by chance are
those of all seeds' weights together; a cost is the mean over seeds on the same sequences, and its interval speaks of
the sequences, not of other seeds. A row is `pooled` if it stands for
all seeds of its variant, or for its only one. The parts of the rows:

    share, head, decile, sign   weights removed of a group: zeros, weights, share, ratio to chance with its range, z
    spread                      how unevenly rows, columns and heads are cut (`mft_core.analysis.cuts.Spread`)
    loss                        cost of a group's removal, nats/token, alone and last (`mft_core.analysis.removals`)
    loss sum                    of the layers' costs, each alone
    overlap, overlap summary    pairs of masks (`mft_core.analysis.overlaps`)
    heads left out              modules of attention whose layout is not known

Called by the stage `anatomy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mft_core import compute
from mft_core.analysis import overlaps
from mft_core.analysis.cuts import Group, Measures, Spread, Tally, dissect, summed
from mft_core.analysis.heads import find_heads
from mft_core.analysis.parts import Parts
from mft_core.analysis.removals import Effect, Order, Portion, effects, portions
from mft_core.analysis.sequence_loss import Array, SequenceLosses
from mft_core.checkpoints.files import load_frozen
from mft_core.data.order import seeded_order
from mft_core.errors import ConfigError, StageError
from mft_core.masks.mask_file import Mask, load_mask
from mft_core.masks.masked_sites import check_base
from mft_core.masks.sites import Site, find_sites
from mft_core.recipes import Anatomy
from mft_core.stage import Progress, StageContext
from mft_core.statistics.bootstrap import ratios_of_sums
from mft_core.statistics.tables import without_seed
from mft_core.training.loop import TrainingData

Row = dict[str, Any]


def examine(recipe: Anatomy, inputs: Mapping[str, Path], context: StageContext) -> list[Row]:
    """Measure all masks; return the rows.

    Args:
        inputs: `model`, `data`, and `mask-<i>` for the i-th of `recipe.masks`.

    Raises:
        ConfigError: a mask was not made for the model's weights, or rewinds; no validation data.
        StageError: two masks are described alike; a loss is not finite.
    """
    groups = _groups(recipe.masks)
    masks = [load_mask(inputs[f"mask-{index}"]) for index in range(len(recipe.masks))]
    if any(mask.config.rewinds for mask in masks):
        raise ConfigError("anatomy tells what removed weights did; leave out masks that rewind, which remove none.")
    subject = _Subject(recipe, inputs, context)
    found = subject.findings(masks)
    result: list[Row] = []

    def tell(measured: MaskFindings, columns: Mapping[str, Any], seeds: int, pooled: bool) -> None:
        named = {**columns, "seeds": seeds, "pooled": pooled}
        result.extend(rows(measured, named, recipe, subject.base, subject.losses.tokens))

    for members in groups:
        for index in members:
            tell(found[index], recipe.masks[index], seeds=1, pooled=len(members) == 1)
        if len(members) > 1:
            first = recipe.masks[members[0]]
            columns = {**first, "variant": without_seed(str(first["variant"])), "seed": "all"}
            tell(pool([found[index] for index in members]), columns, seeds=len(members), pooled=True)
    return [*result, *subject.heads_left_out(masks), *_overlaps(recipe, masks, context)]


def _groups(described: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the indices of the masks that differ in nothing but the seed."""
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for index, columns in enumerate(described):
        apart = {key: value for key, value in columns.items() if key != "seed"}
        apart["variant"] = without_seed(str(columns["variant"]))
        groups.setdefault(tuple(sorted(apart.items())), []).append(index)
    for members in groups.values():
        seeds = [described[index].get("seed") for index in members]
        if len(set(seeds)) < len(seeds):
            raise StageError(
                f"two masks are described alike: {described[members[0]]['variant']}, seeds {seeds}; "
                "masks need columns that tell them apart."
            )
    return list(groups.values())


def _overlaps(recipe: Anatomy, masks: Sequence[Mask], context: StageContext) -> list[Row]:
    count = len(masks) * (len(masks) - 1) // 2
    found = []
    for done, row in enumerate(overlaps.pairs(recipe.masks, masks), start=1):
        found += [row] if row else []
        context.report(Progress(done, count, "pair of masks"))
    return found + overlaps.summary(found)


class _Subject:
    """The model that masks are looked at on, and the sequences that its losses are measured on."""

    def __init__(self, recipe: Anatomy, inputs: Mapping[str, Path], context: StageContext) -> None:
        self._context = context
        self._model = load_frozen(inputs["model"], compute.settle(context.runtime))
        self._parameters = dict(self._model.named_parameters())
        self._sites = {site.name: site for site in find_sites(self._model)}
        self._heads = find_heads(self._model)
        validation = TrainingData.load(inputs["data"]).validation
        if not len(validation):
            raise ConfigError("anatomy: the data has no validation rows to measure losses on; set validation_rows.")
        chosen = np.sort(seeded_order(len(validation), recipe.seed)[: recipe.rows])
        self.losses = SequenceLosses(self._model, validation, chosen, context.runtime.micro_batch_tokens)
        self.base: Array = np.empty(0)
        """nats of every sequence, once `findings` has been asked for"""

    def findings(self, masks: Sequence[Mask]) -> list[MaskFindings]:
        """Measure every mask that `context.work` does not have yet."""
        self._check(masks)
        steps = [2 * len(portions(self._sites_of(mask))) for mask in masks]
        parts = Parts(replace(self._context, report=lambda _: None), len(masks))  # what is reported are measurements
        found = []
        with self.losses:
            self.base = self.losses.measure()
            _check_finite(self.base, "the base model")
            for index, mask in enumerate(masks):
                before, total = sum(steps[:index]), sum(steps)
                measured = parts.get(f"mask-{index}", self._measure, mask, index, before, total)
                found.append(MaskFindings.of(measured))
        return found

    def _check(self, masks: Sequence[Mask]) -> None:
        """Refuse masks that were made for another model; every matrix is hashed once, whatever is masked in it."""
        for index, mask in enumerate(masks):
            for masked in mask.config.sites:
                site = self._sites.get(masked.name)
                if site is None or tuple(site.of(self._parameters).shape) != masked.shape:
                    raise ConfigError(
                        f"mask-{index}: the model has no matrix {masked.name} of shape {masked.shape}; "
                        "the masks of one analysis belong to one architecture."
                    )
        each = (masked.model_copy(update={"zeros": 0}) for mask in masks for masked in mask.config.sites)
        for record in dict.fromkeys(each):
            check_base(record, self._sites[record.name].of(self._parameters))

    def heads_left_out(self, masks: Sequence[Mask]) -> list[Row]:
        """Name the masked modules of attention whose heads are not known."""
        masked = (site for mask in masks for site in self._sites_of(mask))
        unknown = dict.fromkeys(s.module for s in masked if s.kind == "attention" and s.name not in self._heads)
        return [{"part": "heads left out", "module": module} for module in unknown]

    def _sites_of(self, mask: Mask) -> list[Site]:
        return [self._sites[masked.name] for masked in mask.config.sites]

    def _measure(self, mask: Mask, index: int, before: int, total: int) -> dict[str, Any]:
        measures = dissect(mask, self._sites, self._heads, self._parameters)
        self._report(before + 1, total)
        measured: list[Effect] = []
        found = effects(self._model, mask, self._sites_of(mask), self.losses, self.base)
        for done, effect in enumerate(found, start=before + 2):
            if effect is not None:
                _check_finite(effect.nats, f"mask-{index}, whole or in part,")
                measured.append(effect)
            self._report(done, total)
        return MaskFindings(measures, measured).content()

    def _report(self, done: int, total: int) -> None:
        self._context.report(Progress(done, total, "measurement"))


def _check_finite(nats: Array, what: str) -> None:
    if not np.isfinite(nats).all():
        raise StageError(f"the validation loss of {what} is not finite; use a checkpoint in float32 or bfloat16.")


@dataclass(frozen=True)
class MaskFindings:
    """What was measured of one mask, or of all seeds of a variant together."""

    measures: Measures
    effects: list[Effect]

    def content(self) -> dict[str, Any]:
        """Return what JSON can hold; `of` gives the same numbers back."""
        return {
            "measures": [[*group, *number] for group, number in self.measures.items()],
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
    """Return the findings of all seeds together; a portion that one of them lacks costs nothing there."""
    effects: dict[tuple[Portion, Order], list[Effect]] = {}
    for one in seeds:
        for effect in one.effects:
            effects.setdefault((effect.portion, effect.order), []).append(effect)
    return MaskFindings(
        summed(item for one in seeds for item in one.measures.items()),
        [
            Effect(*key, sum(one.removed for one in own), np.sum([one.nats for one in own], axis=0) / len(seeds))
            for key, own in effects.items()
        ],
    )


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
        counted = number._asdict() if isinstance(number, Tally) else {}
        found.append({**columns, **where, **counted, **number.figures(recipe.confidence)})
    nats = np.stack([one.nats for one in findings.effects])
    measured = ratios_of_sums(nats, tokens, recipe.bootstrap, recipe.confidence, recipe.seed)
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

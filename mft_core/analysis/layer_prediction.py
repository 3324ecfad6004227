"""Could one have known which layers to mask without the sweep? Scores of layer groups beside their measured gains.

The parts of the rows:

    score          of a candidate for a group
    gain           measured, of a group on a benchmark (share, with its interval), or their mean over benchmarks
    correlation    rank correlation of a candidate's promise (score times its sign) with the gains, interval, p-value
                   (permutation; `p_holm` adjusted over the candidates of the same `family`), Kendall's tau; which group
                   the candidate would have picked, and what that costs against the best measured one

Called by the stage `predict-layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mft_core import compute
from mft_core.analysis.layer_scores import CANDIDATES, CandidateName, score_group, score_sites
from mft_core.analysis.rank_correlation import correlate
from mft_core.checkpoints.files import load_frozen, skeleton
from mft_core.data.batching import micro_batches
from mft_core.data.order import seeded_order
from mft_core.errors import ConfigError, StageError
from mft_core.layers import parse_layers
from mft_core.masks.sites import Site, choose_sites, find_sites, n_layers
from mft_core.recipes import PredictLayers
from mft_core.stage import Progress, StageContext
from mft_core.statistics.tables import pooled
from mft_core.statistics.verdicts import holm
from mft_core.statistics.winner import MEAN
from mft_core.training.loop import TrainingData

Row = dict[str, Any]
ALIKE, REVERSED, UNCLEAR = (
    "ranks them alike",
    "ranks them the other way round",
    "not distinguishable from no correlation",
)


@dataclass(frozen=True)
class LayerPrediction:
    """Scores and gains of a sweep's groups."""

    recipe: PredictLayers
    sequences: int
    tokens: int
    """that the backward pass saw"""
    scores: Mapping[str, Mapping[CandidateName, float]]
    """by group"""
    gains: Mapping[str, Mapping[str, Row]]
    """by benchmark, with their mean where there are several, and by group: `gain`, `gain_low`, `gain_high`, shares"""
    matches: list[Row]
    """how each candidate does on each benchmark: the rows of the part `correlation`"""

    def rows(self) -> list[Row]:
        """Return every number."""
        scores = [
            {"part": "score", "layers": group, "candidate": name, "score": score}
            for group, own in self.scores.items()
            for name, score in own.items()
        ]
        gains = [
            {"part": "gain", "layers": group, "benchmark": benchmark, **gain}
            for benchmark, own in self.gains.items()
            for group, gain in own.items()
        ]
        return [*scores, *gains, *self.matches]


def examine(
    recipe: PredictLayers, rows: Sequence[Mapping[str, Any]], inputs: Mapping[str, Path], context: StageContext
) -> LayerPrediction:
    """Score the groups on `model` with training sequences of `data`, and set them beside the gains in `rows`.

    Args:
        rows: of the stage `compare`.

    Raises:
        ConfigError: a group is none of this model's.
        StageError: the rows lack a group's gain, or have two.
    """
    model = skeleton(inputs["model"])
    every, count = find_sites(model), n_layers(model)
    layers = {group: parse_layers(group, count) for group in recipe.groups}
    if len(set(layers.values())) < len(layers):
        raise ConfigError(f"groups = {', '.join(recipe.groups)}: two of them are the same layers.")
    groups = {group: choose_sites(every, own, recipe.modules) for group, own in layers.items()}
    gains = measured_gains(rows, recipe, layers, count)

    tokens = TrainingData.load(inputs["data"]).train
    drawn = np.sort(seeded_order(len(tokens), recipe.seed)[: recipe.calibration_rows])
    one_each = micro_batches(tokens, drawn, micro_batch_tokens=1, packing=False)
    loaded = load_frozen(inputs["model"], compute.settle(context.runtime))
    sites: dict[str, Site] = {site.name: site for own in groups.values() for site in own}

    def report(done: int) -> None:
        context.report(Progress(done, len(drawn), unit="sequence"))

    scored = score_sites(loaded, list(sites.values()), one_each, recipe.sparsity, report)
    scores = {group: score_group(own, scored) for group, own in groups.items()}
    return LayerPrediction(recipe, len(drawn), one_each.tokens, scores, gains, _matches(recipe, scores, gains))


def measured_gains(
    rows: Sequence[Mapping[str, Any]], recipe: PredictLayers, groups: Mapping[str, tuple[int, ...]], layers: int
) -> dict[str, dict[str, Row]]:
    """Return the gains of the learned masks with their intervals, all seeds pooled, by benchmark and group.

    Args:
        groups: the layers of each.
        layers: of the model.

    Raises:
        StageError: a group has no gain on a benchmark, or two.
    """
    wanted = {"method": "mft", "modules": recipe.modules, "sparsity": recipe.sparsity}
    wanted |= {} if recipe.domain is None else {"domain": recipe.domain}
    sweep = [row for row in pooled(rows) if row["gain"] is not None and wanted.items() <= row.items()]
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in sweep))
    if not benchmarks:
        raise StageError(
            f"the comparison has no gain of a learned mask with modules '{recipe.modules}' and sparsity "
            f"{recipe.sparsity:g}{f' in domain {recipe.domain}' if recipe.domain else ''}."
        )
    gains: dict[str, dict[str, Row]] = {}
    for benchmark in benchmarks:
        gains[benchmark] = {}
        for group, own in groups.items():
            found = [
                row for row in sweep if row["benchmark"] == benchmark and parse_layers(row["layers"], layers) == own
            ]
            if len(found) != 1:
                raise StageError(
                    f"layers '{group}' on '{benchmark}': the comparison has {len(found)} gains of a learned mask with "
                    f"modules '{recipe.modules}' and sparsity {recipe.sparsity:g}, where one is expected; set 'groups' "
                    "to those of the sweep, and 'domain' where it has several."
                )
            gains[benchmark][group] = {key: found[0][key] for key in ("gain", "gain_low", "gain_high")}
    return gains


def _matches(
    recipe: PredictLayers,
    scores: Mapping[str, Mapping[CandidateName, float]],
    gains: Mapping[str, Mapping[str, Row]],
) -> list[Row]:
    """Compare every candidate with every column of gains; where all groups are equal there is nothing to compare."""
    found: list[Row] = []
    for benchmark, own in gains.items():
        measured = {group: gain["gain"] for group, gain in own.items()}
        best = max(measured, key=lambda group: measured[group])
        for name, candidate in CANDIDATES.items():
            promise = {group: candidate.sign * scores[group][name] for group in own}
            if len(set(measured.values())) > 1 and len(set(promise.values())) > 1:
                pick = max(promise, key=lambda group: promise[group])
                where = {"part": "correlation", "candidate": name, "benchmark": benchmark}
                match: Row = {**correlate([*promise.values()], [*measured.values()], recipe.confidence)}
                choice = {"pick": pick, "best": best, "regret": measured[best] - measured[pick]}
                family = MEAN if benchmark == MEAN else "benchmark"
                found.append({**where, **match, "p_holm": 1.0, "family": family, "verdict": UNCLEAR, **choice})
    for family in {match["family"] for match in found}:  # the tests on the mean, and apart from them the others
        together = [match for match in found if match["family"] == family]
        adjusted = holm([match["p_value"] for match in together])
        for match, p_value in zip(together, adjusted.tolist(), strict=True):
            match["p_holm"] = p_value
            if p_value <= 0.05:
                match["verdict"] = ALIKE if match["spearman"] > 0 else REVERSED
    return found

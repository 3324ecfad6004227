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
from typing import Any, Literal

import numpy as np
import torch
from statsmodels.stats.multitest import multipletests

from mft_core import compute
from mft_core.analysis.layer_scores import CANDIDATES, CandidateName, score_group, score_sites
from mft_core.analysis.rank_correlation import RankCorrelation, correlate
from mft_core.checkpoints.files import load_model, read_config, skeleton
from mft_core.data.batching import micro_batches
from mft_core.data.order import seeded_order
from mft_core.errors import ConfigError, StageError
from mft_core.layers import parse_layers
from mft_core.masks.sites import Site, choose_sites, find_sites, n_layers
from mft_core.recipes import PredictLayers
from mft_core.stage import Progress, StageContext
from mft_core.statistics.tables import pooled
from mft_core.training.loop import TrainingData

Row = dict[str, Any]
AVERAGE = "average"
Verdict = Literal["ranks them alike", "ranks them the other way round", "not distinguishable from no correlation"]


@dataclass(frozen=True)
class Gain:
    """A measured gain over FFT, as a share; the average over benchmarks has no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Match:
    """How a candidate does against the gains on one benchmark, or on their average."""

    candidate: CandidateName
    benchmark: str
    correlation: RankCorrelation
    p_holm: float
    pick: str
    """the group that it promises most of"""
    best: str
    regret: float
    """gain of the best group minus that of the pick, as a share"""

    @property
    def verdict(self) -> Verdict:
        """Say in words what the correlation shows."""
        if self.p_holm > 0.05:
            return "not distinguishable from no correlation"
        return "ranks them alike" if self.correlation.spearman > 0 else "ranks them the other way round"


@dataclass(frozen=True)
class LayerPrediction:
    """Scores and gains of a sweep's groups."""

    recipe: PredictLayers
    sequences: int
    tokens: int
    """that the backward pass saw"""
    scores: Mapping[str, Mapping[CandidateName, float]]
    """by group"""
    gains: Mapping[str, Mapping[str, Gain]]
    """by benchmark, the average last where there are several, and by group"""
    matches: Sequence[Match]


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
    gains = _with_average(measured_gains(rows, recipe, layers, count))

    tokens = TrainingData.load(inputs["data"]).train
    drawn = np.sort(seeded_order(len(tokens), recipe.seed)[: recipe.calibration_rows])
    one_each = micro_batches(tokens, drawn, micro_batch_tokens=1, packing=False)
    device = compute.settle(context.runtime)
    loaded = load_model(inputs["model"], read_config(inputs["model"]).dtype or torch.float32, device)
    sites: dict[str, Site] = {site.name: site for own in groups.values() for site in own}

    def report(done: int) -> None:
        context.report(Progress(done, len(drawn), unit="sequence"))

    scored = score_sites(loaded.eval().requires_grad_(False), list(sites.values()), one_each, recipe.sparsity, report)
    scores = {group: score_group(own, scored) for group, own in groups.items()}
    return LayerPrediction(recipe, len(drawn), one_each.tokens, scores, gains, _matches(recipe, scores, gains))


def measured_gains(
    rows: Sequence[Mapping[str, Any]], recipe: PredictLayers, groups: Mapping[str, tuple[int, ...]], layers: int
) -> dict[str, dict[str, Gain]]:
    """Return the gains of the learned masks, all seeds pooled, by benchmark and group.

    Args:
        groups: the layers of each.
        layers: of the model.

    Raises:
        StageError: a group has no gain on a benchmark, or two.
    """
    sweep = [row for row in pooled(rows) if row["method"] == "mft" and _belongs(row, recipe)]
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in sweep))
    if not benchmarks:
        raise StageError(
            f"the comparison has no gain of a learned mask with modules '{recipe.modules}' and sparsity "
            f"{recipe.sparsity:g}{f' in domain {recipe.domain}' if recipe.domain else ''}."
        )
    gains: dict[str, dict[str, Gain]] = {}
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
            gains[benchmark][group] = Gain(*(found[0][key] for key in ("gain", "gain_low", "gain_high")))
    return gains


def _belongs(row: Mapping[str, Any], recipe: PredictLayers) -> bool:
    of_domain = recipe.domain is None or row["domain"] == recipe.domain
    same = row["modules"] == recipe.modules and row["sparsity"] == recipe.sparsity
    return of_domain and same and row["gain"] is not None


def _with_average(gains: dict[str, dict[str, Gain]]) -> dict[str, dict[str, Gain]]:
    if len(gains) == 1:
        return gains
    groups = next(iter(gains.values()))
    mean = {group: Gain(float(np.mean([own[group].value for own in gains.values()]))) for group in groups}
    return {**gains, AVERAGE: mean}


def _matches(
    recipe: PredictLayers,
    scores: Mapping[str, Mapping[CandidateName, float]],
    gains: Mapping[str, Mapping[str, Gain]],
) -> list[Match]:
    """Compare every candidate with every column of gains; where all groups are equal there is nothing to compare."""
    drafts: list[tuple[CandidateName, str, RankCorrelation]] = []
    for benchmark, own in gains.items():
        measured = [gain.value for gain in own.values()]
        for name, candidate in CANDIDATES.items():
            promise = [candidate.sign * scores[group][name] for group in own]
            if len(set(measured)) > 1 and len(set(promise)) > 1:
                drafts.append((name, benchmark, correlate(promise, measured, recipe.confidence)))
    adjusted = _holm([(family(benchmark), one.p_value) for _, benchmark, one in drafts])
    return [
        Match(name, benchmark, one, p_holm, *_choice(name, scores, gains[benchmark]))
        for (name, benchmark, one), p_holm in zip(drafts, adjusted, strict=True)
    ]


def _holm(tests: Sequence[tuple[str, float]]) -> list[float]:
    """Adjust p-values within their families, keeping their order."""
    adjusted = [1.0] * len(tests)
    for name in {name for name, _ in tests}:
        members = [at for at, (own, _) in enumerate(tests) if own == name]
        corrected = multipletests([tests[at][1] for at in members], method="holm")[1]
        for at, p_value in zip(members, corrected.tolist(), strict=True):
            adjusted[at] = p_value
    return adjusted


def family(benchmark: str) -> Literal["average", "benchmark"]:
    """Return which tests are adjusted together: those on the average, and apart from them those on each benchmark."""
    return "average" if benchmark == AVERAGE else "benchmark"


def _choice(
    candidate: CandidateName, scores: Mapping[str, Mapping[CandidateName, float]], gains: Mapping[str, Gain]
) -> tuple[str, str, float]:
    sign = CANDIDATES[candidate].sign
    pick = max(gains, key=lambda group: sign * scores[group][candidate])
    best = max(gains, key=lambda group: gains[group].value)
    return pick, best, gains[best].value - gains[pick].value


def rows(found: LayerPrediction) -> list[Row]:
    """Return every number."""
    result: list[Row] = []
    for group, scores in found.scores.items():
        result += [{"part": "score", "layers": group, "candidate": name, "score": one} for name, one in scores.items()]
    for benchmark, gains in found.gains.items():
        for group, gain in gains.items():
            ends = {"gain_low": gain.low, "gain_high": gain.high}
            result.append({"part": "gain", "layers": group, "benchmark": benchmark, "gain": gain.value, **ends})
    for match in found.matches:
        one = match.correlation
        numbers = {"n": one.n, "spearman": one.spearman, "spearman_low": one.low, "spearman_high": one.high}
        numbers |= {"kendall": one.kendall, "p_value": one.p_value, "p_holm": match.p_holm}
        said = {"family": family(match.benchmark), "verdict": match.verdict}
        picked = {"pick": match.pick, "best": match.best, "regret": match.regret}
        where = {"part": "correlation", "candidate": match.candidate, "benchmark": match.benchmark}
        result.append({**where, **numbers, **said, **picked})
    return result

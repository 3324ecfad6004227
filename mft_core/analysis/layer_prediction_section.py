"""The section that the stage `predict-layers` writes."""

from __future__ import annotations

from mft_core.analysis.layer_prediction import AVERAGE, Gain, LayerPrediction, Match
from mft_core.analysis.layer_scores import CANDIDATES
from mft_core.analysis.rank_correlation import least_p_value
from mft_core.statistics.markdown import signed, table, with_interval
from mft_core.statistics.tables import percent


def section(found: LayerPrediction) -> str:
    """Return the Markdown body."""
    parts = [
        "## Which layers to mask, guessed without the sweep",
        _subject(found),
        _answer(found),
        "![Rank correlation of each candidate's promise with the measured gains](correlations.png)",
        _correlations(found),
        "![Scores of the layer groups against their measured gains](scores.png)",
        _groups(found),
        _candidates(found),
    ]
    return "\n\n".join(parts) + "\n"


def _subject(found: LayerPrediction) -> str:
    return (
        f"Each candidate scores the {len(found.scores)} layer groups of the sweep by one backward pass at the "
        f"fine-tuned model over {found.sequences} training sequences ({found.tokens:,} tokens), with no mask learned "
        f"and nothing evaluated. It is compared with the measured gains of the learned masks (modules "
        f"{found.recipe.modules}, sparsity {percent(found.recipe.sparsity)}, seeds pooled)."
    )


def _main(found: LayerPrediction) -> list[Match]:
    """Return the matches that answer the question: on the average, or on the only benchmark."""
    wanted = AVERAGE if AVERAGE in found.gains else next(iter(found.gains))
    return [match for match in found.matches if match.benchmark == wanted]


def _answer(found: LayerPrediction) -> str:
    main = _main(found)
    if not main:
        return "**All groups gain the same: there is no ranking to predict.**"
    where = "on average over the benchmarks" if main[0].benchmark == AVERAGE else f"on {main[0].benchmark}"
    alike = [CANDIDATES[match.candidate].label for match in main if match.verdict == "ranks them alike"]
    if alike:
        verb = "rank" if len(alike) > 1 else "ranks"
        return f"**{' and '.join(alike)}: {verb} the groups as the sweep does {where}.**"
    limit = least_p_value(len(found.scores)) * len(main)
    hopeless = (
        f" With {len(found.scores)} groups even a perfect ranking would not be (adjusted p = {min(limit, 1):.2f})."
        if limit > 0.05
        else ""
    )
    return f"**No candidate's ranking is distinguishable from no correlation with the gains {where}.**{hopeless}"


def _correlations(found: LayerPrediction) -> str:
    others = [match for match in found.matches if match not in _main(found)]
    lines = [[match.benchmark, CANDIDATES[match.candidate].label, *_match(match)] for match in [*_main(found), *others]]
    header = ["gain on", "candidate", "Spearman", "Kendall", "p", "p (Holm)", "says", "would pick", "costs"]
    families = " on the average, and over all others apart from them" if AVERAGE in found.gains else ""
    notes = (
        f"n = {len(found.scores)} groups. The interval ({percent(found.recipe.confidence)}) inverts a test for pairs "
        "drawn from a bivariate normal distribution, p is from the exact permutation test; Holm's adjustment is over "
        f"the candidates{families}. The groups are what is sampled: they are few, neighbours share layers where groups "
        "overlap, and the noise of the gains themselves pulls every correlation towards zero. 'Costs' is the gain of "
        "the best group minus that of the group the candidate would have picked, in percentage points."
    )
    return table(header, lines) + "\n\n" + notes


def _match(match: Match) -> list[str]:
    one = match.correlation
    return [
        with_interval(one.spearman, one.low, one.high, 2),
        signed(one.kendall, 2),
        f"{one.p_value:.3f}",
        f"{match.p_holm:.3f}",
        match.verdict,
        match.pick,
        f"{100 * match.regret:.1f}" + (" (the best)" if match.pick == match.best else f" (best: {match.best})"),
    ]


def _groups(found: LayerPrediction) -> str:
    labels = [candidate.label for candidate in CANDIDATES.values()]
    lines = []
    for group, scores in found.scores.items():
        gains = [_gain(own[group]) for own in found.gains.values()]
        lines.append([group, *gains, *(f"{scores[name]:.3g}".replace("-", "−") for name in CANDIDATES)])
    return table(["layers", *(f"gain, {name}" for name in found.gains), *labels], lines)


def _gain(gain: Gain) -> str:
    if gain.low is None or gain.high is None:
        return signed(100 * gain.value, 1)
    return with_interval(100 * gain.value, 100 * gain.low, 100 * gain.high, 1)


def _candidates(found: LayerPrediction) -> str:
    share = percent(found.recipe.sparsity)
    return (
        "Gradient norm: ‖dL/dW‖. SNIP saliency: Σ|w·dL/dw| (Lee et al. 2019); less is promising. Cost of the magnitude "
        f"mask: predicted rise of the loss when the {share} least magnitudes go, to second order with the empirical "
        "Fisher (LeCun et al. 1990; Singh & Alistarh 2020); less is promising. First-order gain: predicted fall of the "
        f"loss when the {share} with the largest w·dL/dw go (the scores of movement pruning, Sanh et al. 2020). Depth "
        "knows nothing of the weights: a candidate is worth something only if it does better."
    )

"""What the stage `predict-layers` writes of its findings: the section, and its figures, scores against gains and the
rank correlations with their intervals."""

from __future__ import annotations

from matplotlib.figure import Figure

from mft_core.analysis.layer_prediction import ALIKE, LayerPrediction, Row
from mft_core.analysis.layer_scores import CANDIDATES
from mft_core.analysis.rank_correlation import least_p_value
from mft_core.figures.drawing import panels, style
from mft_core.statistics.markdown import signed, table, with_interval
from mft_core.statistics.tables import percent
from mft_core.statistics.winner import MEAN


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


def _main(found: LayerPrediction) -> list[Row]:
    """Return the matches that answer the question: on the mean, or on the only benchmark."""
    wanted = MEAN if MEAN in found.gains else next(iter(found.gains))
    return [match for match in found.matches if match["benchmark"] == wanted]


def _answer(found: LayerPrediction) -> str:
    main = _main(found)
    if not main:
        return "**All groups gain the same: there is no ranking to predict.**"
    where = "on average over the benchmarks" if main[0]["benchmark"] == MEAN else f"on {main[0]['benchmark']}"
    alike = [CANDIDATES[match["candidate"]].label for match in main if match["verdict"] == ALIKE]
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
    lines = [
        [match["benchmark"], CANDIDATES[match["candidate"]].label, *_match(match)] for match in [*_main(found), *others]
    ]
    header = ["gain on", "candidate", "Spearman", "Kendall", "p", "p (Holm)", "says", "would pick", "costs"]
    families = " on the mean, and over all others apart from them" if MEAN in found.gains else ""
    notes = (
        f"n = {len(found.scores)} groups. The interval ({percent(found.recipe.confidence)}) inverts a test for pairs "
        "drawn from a bivariate normal distribution, p is from the exact permutation test; Holm's adjustment is over "
        f"the candidates{families}. The groups are what is sampled: they are few, neighbours share layers where groups "
        "overlap, and the noise of the gains themselves pulls every correlation towards zero. 'Costs' is the gain of "
        "the best group minus that of the group the candidate would have picked, in percentage points."
    )
    return table(header, lines) + "\n\n" + notes


def _match(match: Row) -> list[str]:
    best = "the best" if match["pick"] == match["best"] else f"best: {match['best']}"
    return [
        with_interval(match["spearman"], match["spearman_low"], match["spearman_high"], 2),
        signed(match["kendall"], 2),
        f"{match['p_value']:.3f}",
        f"{match['p_holm']:.3f}",
        match["verdict"],
        match["pick"],
        f"{100 * match['regret']:.1f} ({best})",
    ]


def _groups(found: LayerPrediction) -> str:
    labels = [candidate.label for candidate in CANDIDATES.values()]
    lines = []
    for group, own in found.scores.items():
        gains = [_gain(of_groups[group]) for of_groups in found.gains.values()]
        lines.append([group, *gains, *(f"{own[name]:.3g}".replace("-", "−") for name in CANDIDATES)])
    return table(["layers", *(f"gain, {name}" for name in found.gains), *labels], lines)


def _gain(gain: Row) -> str:
    return with_interval(100 * gain["gain"], 100 * gain["gain_low"], 100 * gain["gain_high"], 1)


def _candidates(found: LayerPrediction) -> str:
    share = percent(found.recipe.sparsity)
    return (
        "Gradient norm: ‖dL/dW‖. SNIP saliency: Σ|w·dL/dw| (Lee et al. 2019); less is promising. Cost of the magnitude "
        f"mask: predicted rise of the loss when the {share} least magnitudes go, to second order with the empirical "
        "Fisher (LeCun et al. 1990; Singh & Alistarh 2020); less is promising. First-order gain: predicted fall of the "
        f"loss when the {share} with the largest w·dL/dw go (the scores of movement pruning, Sanh et al. 2020). Depth "
        "knows nothing of the weights: a candidate is worth something only if it does better."
    )


def _looks(found: LayerPrediction) -> dict[str, tuple[str, str]]:
    """Return colour and marker by benchmark; the mean is black."""
    looks = {name: style(index) for index, name in enumerate(name for name in found.gains if name != MEAN)}
    return looks | ({MEAN: ("#000000", "P")} if MEAN in found.gains else {})


def scores(found: LayerPrediction) -> Figure:
    """Draw a panel per candidate: the groups in the order of their promise, and their gains with intervals."""
    figure, axes = panels(len(CANDIDATES), 3, (2.9, 2.4))
    looks = _looks(found)
    for panel, (name, candidate) in enumerate(CANDIDATES.items()):
        one = axes[panel]
        one.axhline(0, color="0.25", linewidth=0.9, zorder=1)
        groups = sorted(found.scores, key=lambda group: candidate.sign * found.scores[group][name])
        for index, (benchmark, gains) in enumerate(found.gains.items()):
            color, marker = looks[benchmark]
            shift = (index - (len(found.gains) - 1) / 2) * 0.16
            for place, group in enumerate(groups):
                gain = gains[group]
                interval = [100 * gain["gain_low"], 100 * gain["gain_high"]]
                one.plot([place + shift] * 2, interval, color=color, linewidth=1.3, zorder=2)
                label = benchmark if panel == place == 0 else None
                one.plot(place + shift, 100 * gain["gain"], marker, color=color, markersize=5, zorder=3, label=label)
        one.set_title(candidate.label, fontsize=9.5, fontweight="bold")
        one.set_xticks(range(len(groups)), groups)
        one.set_xlim(-0.6, len(groups) - 0.4)
    for one in axes[::3]:
        one.set_ylabel("Gain over FFT\n(percentage points)")
    figure.supxlabel("Layer groups, from the least to the most promising", fontsize=9)
    figure.legend(loc="outside upper center", ncols=len(looks), frameon=False)
    return figure


def correlations(found: LayerPrediction) -> Figure:
    """Draw Spearman's correlation of every candidate, on every benchmark, with its interval."""
    looks = _looks(found)
    figure, (axes,) = panels(1, 1, (5.6, 0.62 * len(CANDIDATES) + 0.9))
    names = list(CANDIDATES)
    axes.axvline(0, color="0.25", linewidth=0.9)
    step = 0.75 / len(looks)
    for match in found.matches:
        color, marker = looks[match["benchmark"]]
        at = names.index(match["candidate"]) + (list(looks).index(match["benchmark"]) - (len(looks) - 1) / 2) * step
        face = color if match["p_holm"] <= 0.05 else "white"
        axes.plot(
            [match["spearman_low"], match["spearman_high"]], [at, at], color=color, linewidth=1.5, solid_capstyle="butt"
        )
        axes.plot(match["spearman"], at, marker, color=color, markerfacecolor=face, markersize=5.5, markeredgewidth=1.2)
    axes.set_xlim(-1.05, 1.05)
    axes.set_yticks(range(len(names)), [CANDIDATES[name].label for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color="0.92", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    interval = percent(found.recipe.confidence)
    axes.set_xlabel(f"Spearman correlation of promise and gain, with its {interval} interval\n"
                    f"({len(found.scores)} layer groups; hollow: not distinguishable from none)")  # fmt: skip
    for benchmark, (color, marker) in looks.items():
        axes.plot([], [], color=color, marker=marker, markersize=5.5, linewidth=1.5, label=benchmark)
    figure.legend(loc="outside upper center", ncols=len(looks), frameon=False, fontsize=8.5)
    return figure

"""The section that the stage `landscape` writes: what was measured, how to read it, and what it shows, in words."""

from __future__ import annotations

from mft_core.analysis.landscape import LINE
from mft_core.analysis.landscape_figures import PRIOR_LABELS
from mft_core.analysis.landscape_findings import LandscapeFindings, Line, mean_eigenvalue
from mft_core.analysis.pac_bayes import DELTA, PRIORS, Bound, best
from mft_core.analysis.sharpness import TOLERANCE
from mft_core.analysis.weight_pair import MODELS, ModelName
from mft_core.statistics.markdown import signed, table, with_interval
from mft_core.statistics.tables import percent


def section(found: LandscapeFindings) -> str:
    """Return the Markdown body."""
    parts = [
        f"## Loss surface: {found.recipe.variant} and the fine-tuned model it was made from",
        _subject(found),
        *_line(found),
        *_planes(found),
        *_sharpness(found),
        *_bound(found),
    ]
    return "\n\n".join(parts) + "\n"


def _subject(found: LandscapeFindings) -> str:
    return (
        f"The models differ in {found.sites} matrices of layers {found.layers} ({found.weights:,} weights). Only these "
        "are moved here, since all other weights are the same in both. Losses are nats per loss token; intervals are "
        f"{percent(found.recipe.confidence)}."
    )


def _line(found: LandscapeFindings) -> list[str]:
    lines = []
    for split, line in found.lines.items():
        lowest = int(line.losses.argmin())
        for place in dict.fromkeys((LINE.index(0), LINE.index(0.5), LINE.index(1), lowest)):
            name = {0: "fine-tuned", 0.5: "half-way", 1: found.recipe.variant}.get(LINE[place], f"{LINE[place]:g}")
            name += " (lowest of the line)" if place == lowest else ""
            difference = "" if LINE[place] == 0 else _interval(line, place)
            lines.append([split, name, f"{line.losses[place]:.4f}", difference])
    return [
        "### On the line from the fine-tuned to the masked model",
        "![Loss on the line through both models, relative to the fine-tuned one](line.png)",
        table(["sequences", "point", "loss", "difference from fine-tuned"], lines),
        " ".join(_arrival(split, line) for split, line in found.lines.items()),
        f"Paired over {found.sequences} validation and {len(found.lines['training'].tokens)} training sequences. The "
        "interval speaks of the sequences, not of other seeds of the mask.",
    ]


def _interval(line: Line, place: int) -> str:
    value, low, high = line.differences[place].tolist()
    return with_interval(value, low, high, 4)


def _arrival(split: str, line: Line) -> str:
    value, low, high = line.differences[LINE.index(1)]
    if low <= 0 <= high:
        return f"On {split} sequences the masked model's loss is not distinguishable from the fine-tuned one's."
    return f"On {split} sequences the masked model's loss is {'higher' if value > 0 else 'lower'}."


def _planes(found: LandscapeFindings) -> list[str]:
    planes = found.planes
    lines = []
    for model in MODELS:
        summary = planes.summary(model)
        numbers = [f"{summary['centre']:.4f}", f"{summary['lowest']:.4f}", signed(summary["rise"], 3)]
        lines.append([_label(found, model), *numbers])
    return [
        "### On a plane around either model",
        "![Validation loss on a plane around either model](plane.png)",
        table(["model", "loss at the centre", "lowest on the plane", "mean rise over the plane"], lines),
        "Both planes have the same two random directions and the same scale: 1 is as long as the fine-tuned model's "
        f"own weights, filter by filter (Li et al. 2018). {found.plane_sequences} validation sequences. This is one "
        "pair of directions, so a picture and not a test.",
    ]


def _sharpness(found: LandscapeFindings) -> list[str]:
    ratio, eigenvalues = found.sharper, found.eigenvalues
    count, rows = found.recipe.hessian_batches, found.recipe.hessian_rows
    lines = []
    for model in MODELS:
        values = [one.value for one in eigenvalues[model]]
        spread = f"{min(values):.3g} to {max(values):.3g}"
        lines.append([_label(found, model), f"{mean_eigenvalue(eigenvalues[model]):.3g}", spread])
    residual = max(one.residual for every in eigenvalues.values() for one in every)
    if ratio.low <= 1 <= ratio.high:
        verdict = "it is not distinguishable from 1: neither model is shown to be flatter"
    else:
        verdict = f"the masked model is {'sharper' if ratio.value > 1 else 'flatter'}"
    return [
        "### Sharpness",
        "![Largest eigenvalue of the Hessian, per batch](sharpness.png)",
        table(["model", "largest eigenvalue (geometric mean)", "range over batches"], lines),
        f"The ratio masked / fine-tuned is {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]; {verdict}. Hessian "
        f"of the training loss with respect to the changed matrices, on {count} batches of {rows} sequences, paired by "
        "batch (t interval of the logarithms). The smaller the batch, the larger the eigenvalue: compare the models, "
        f"not the numbers. LOBPCG to a relative residual of {TOLERANCE:g}; the largest was {residual:.1g}.",
    ]


def _bound(found: LandscapeFindings) -> list[str]:
    lines, shown = [], []
    for prior in PRIORS:
        for model in MODELS:
            if (prior, model) == ("own", "fine-tuned"):
                continue  # the same as the fine-tuned model as prior
            one = best(found.bounds[prior, model])
            shown.append(one)
            lines.append([PRIOR_LABELS[prior], _label(found, model), *_terms(one)])
    vacuous = sum(one.vacuous for one in shown)
    header = ["prior centred at", "model", "noise", "empirical term", "KL (nats)", "complexity term", "bound"]
    return [
        "### A PAC-Bayes bound on the share of wrong tokens",
        "![The two terms of the bound against the noise](bound.png)",
        table(header, lines),
        f"A bound of 1 or more says nothing, which holds for {vacuous} of these {len(lines)}. {_complexity(found)} "
        f"{_error(found)}",
        f"With probability at least {percent(1 - DELTA)} each: error(Q) ≤ error on the n sequences(Q) + √((KL(Q‖P) + "
        "ln(2√n·k/δ)) / 2n), McAllester's form of Maurer (2004, theorem 5), n = "
        f"{found.sequences} validation sequences, k = {len(found.recipe.noise)} noise levels tried, δ = {DELTA:g}. "
        "Q is Gaussian noise around a model's changed matrices, P the same noise around the prior's; the table shows "
        "the noise with the lowest bound. Neither model was trained on these sequences, so each prior was fixed before "
        "they were seen (checkpoints compared on them would add the logarithm of their number to KL). With the model "
        "itself as prior, this is an ordinary held-out bound. "
        f"± is the standard error over {found.recipe.draws} draws of the noise, which is no part of the guarantee.",
    ]


def _terms(one: Bound) -> list[str]:
    empirical = f"{one.empirical:.3f} ± {one.empirical_se:.3f}"
    bound = f"{one.bound:.3g} (says nothing)" if one.vacuous else f"{one.bound:.3f}"
    return [f"{one.share:g}", empirical, f"{one.kl:,.0f}", f"{one.complexity:.3g}", bound]


def _complexity(found: LandscapeFindings) -> str:
    """Say what the mask does to the complexity term, at equal noise."""
    before, after = (found.bounds["zero", model][0].kl for model in MODELS)
    moved = found.bounds["fine-tuned", "masked"][-1]
    return (
        f"With the prior at zero weights, the mask lowers KL by {percent_of(1 - after / before)}, the share of the "
        "squared weights that it removes; with the prior at the fine-tuned model it costs "
        f"{moved.kl:,.0f} nats at noise {moved.share:g}, where {found.sequences} sequences pay for less than "
        f"{2 * found.sequences}."
    )


def _error(found: LandscapeFindings) -> str:
    before, after = (found.errors[model] for model in MODELS)
    return f"Without noise {percent_of(before)} of the tokens are wrong before and {percent_of(after)} after masking."


def percent_of(share: float) -> str:
    """Return a measured share as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def _label(found: LandscapeFindings, model: ModelName) -> str:
    return "fine-tuned" if model == "fine-tuned" else found.recipe.variant

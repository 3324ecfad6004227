"""The section that the stage `landscape` writes: what was measured, how to read it, and what it shows, in words."""

from __future__ import annotations

from mft_core.analysis.landscape_figures import PRIOR_LABELS
from mft_core.analysis.landscape_findings import LandscapeFindings, Row
from mft_core.analysis.pac_bayes import DELTA
from mft_core.analysis.sharpness import TOLERANCE
from mft_core.analysis.weight_pair import MODELS
from mft_core.statistics.markdown import signed, table, with_interval
from mft_core.statistics.tables import percent

_SPLITS = ("validation", "training")


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
    lines, arrivals, sequences = [], [], []
    for split in _SPLITS:
        points = {row["t"]: row for row in found.of("line", split=split)}
        lowest = min(points.values(), key=lambda row: row["loss"])
        for t in dict.fromkeys((0, 0.5, 1, lowest["t"])):
            name = {0: "fine-tuned", 0.5: "half-way", 1: found.recipe.variant}.get(t, f"{t:g}")
            name += " (lowest of the line)" if points[t] is lowest else ""
            row = points[t]
            difference = with_interval(row["difference"], row["difference_low"], row["difference_high"], 4)
            lines.append([split, name, f"{row['loss']:.4f}", difference if t else ""])
        arrivals.append(_arrival(split, points[1]))
        sequences.append(points[1]["sequences"])
    return [
        "### On the line from the fine-tuned to the masked model",
        "![Loss on the line through both models, relative to the fine-tuned one](line.png)",
        table(["sequences", "point", "loss", "difference from fine-tuned"], lines),
        " ".join(arrivals),
        f"Paired over {sequences[0]} validation and {sequences[1]} training sequences. The interval speaks of the "
        "sequences, not of other seeds of the mask.",
    ]


def _arrival(split: str, masked: Row) -> str:
    if masked["difference_low"] <= 0 <= masked["difference_high"]:
        return f"On {split} sequences the masked model's loss is not distinguishable from the fine-tuned one's."
    return f"On {split} sequences the masked model's loss is {'higher' if masked['difference'] > 0 else 'lower'}."


def _planes(found: LandscapeFindings) -> list[str]:
    lines = [
        [_label(found, row), f"{row['centre']:.4f}", f"{row['lowest']:.4f}", signed(row["rise"], 3)]
        for row in found.of("plane summary")
    ]
    return [
        "### On a plane around either model",
        "![Validation loss on a plane around either model](plane.png)",
        table(["model", "loss at the centre", "lowest on the plane", "mean rise over the plane"], lines),
        "Both planes have the same two random directions and the same scale: 1 is as long as the fine-tuned model's "
        f"own weights, filter by filter (Li et al. 2018). {found.of('plane')[0]['sequences']} validation sequences. "
        "This is one pair of directions, so a picture and not a test.",
    ]


def _sharpness(found: LandscapeFindings) -> list[str]:
    count, rows = found.recipe.hessian_batches, found.recipe.hessian_rows
    batches = [row for row in found.of("sharpness") if "batch" in row]
    means = [row for row in found.of("sharpness") if "batch" not in row]
    lines = []
    for mean in means:
        values = [row["eigenvalue"] for row in batches if row["model"] == mean["model"]]
        lines.append([_label(found, mean), f"{mean['eigenvalue']:.3g}", f"{min(values):.3g} to {max(values):.3g}"])
    ratio, low, high = (means[-1][key] for key in ("ratio", "ratio_low", "ratio_high"))
    if low <= 1 <= high:
        verdict = "it is not distinguishable from 1: neither model is shown to be flatter"
    else:
        verdict = f"the masked model is {'sharper' if ratio > 1 else 'flatter'}"
    return [
        "### Sharpness",
        "![Largest eigenvalue of the Hessian, per batch](sharpness.png)",
        table(["model", "largest eigenvalue (geometric mean)", "range over batches"], lines),
        f"The ratio masked / fine-tuned is {ratio:.2f} [{low:.2f}, {high:.2f}]; {verdict}. Hessian of the training "
        f"loss with respect to the changed matrices, on {count} batches of {rows} sequences, paired by batch (t "
        "interval of the logarithms). The smaller the batch, the larger the eigenvalue: compare the models, not the "
        f"numbers. LOBPCG to a relative residual of {TOLERANCE:g}; the largest was "
        f"{max(row['residual'] for row in batches):.1g}.",
    ]


def _bound(found: LandscapeFindings) -> list[str]:
    shown = [
        found.of("bound", prior=prior, model=model, chosen=True)[0]
        for prior in PRIOR_LABELS
        for model in MODELS
        if (prior, model) != ("own", "fine-tuned")  # the same as the fine-tuned model as prior
    ]
    lines = [[PRIOR_LABELS[row["prior"]], _label(found, row), *_terms(row)] for row in shown]
    vacuous = sum(row["vacuous"] for row in shown)
    before, after = (row["error"] for row in found.of("noise", noise=0.0))
    header = ["prior centred at", "model", "noise", "empirical term", "KL (nats)", "complexity term", "bound"]
    return [
        "### A PAC-Bayes bound on the share of wrong tokens",
        "![The two terms of the bound against the noise](bound.png)",
        table(header, lines),
        f"A bound of 1 or more says nothing, which holds for {vacuous} of these {len(lines)}. {_complexity(found)} "
        f"Without noise {percent_of(before)} of the tokens are wrong before and {percent_of(after)} after masking.",
        f"With probability at least {percent(1 - DELTA)} each: error(Q) ≤ error on the n sequences(Q) + √((KL(Q‖P) + "
        f"ln(2√n·k/δ)) / 2n), McAllester's form of Maurer (2004, theorem 5), n = {shown[0]['sequences']} "
        f"validation sequences, k = {len(found.recipe.noise)} noise levels tried, δ = {DELTA:g}. "
        "Q is Gaussian noise around a model's changed matrices, P the same noise around the prior's; the table shows "
        "the noise with the lowest bound. Neither model was trained on these sequences, so each prior was fixed before "
        "they were seen (checkpoints compared on them would add the logarithm of their number to KL). With the model "
        "itself as prior, this is an ordinary held-out bound. "
        f"± is the standard error over {found.recipe.draws} draws of the noise, which is no part of the guarantee.",
    ]


def _terms(row: Row) -> list[str]:
    empirical = f"{row['empirical']:.3f} ± {row['empirical_se']:.3f}"
    bound = f"{row['bound']:.3g} (says nothing)" if row["vacuous"] else f"{row['bound']:.3f}"
    return [f"{row['noise']:g}", empirical, f"{row['kl']:,.0f}", f"{row['complexity']:.3g}", bound]


def _complexity(found: LandscapeFindings) -> str:
    """Say what the mask does to the complexity term, at equal noise."""
    before, after = (found.of("bound", prior="zero", model=model)[0]["kl"] for model in MODELS)
    moved = found.of("bound", prior="fine-tuned", model="masked")[-1]
    return (
        f"With the prior at zero weights, the mask lowers KL by {percent_of(1 - after / before)}, the share of the "
        "squared weights that it removes; with the prior at the fine-tuned model it costs "
        f"{moved['kl']:,.0f} nats at noise {moved['noise']:g}, where {moved['sequences']} sequences pay for less than "
        f"{2 * moved['sequences']}."
    )


def percent_of(share: float) -> str:
    """Return a measured share as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def _label(found: LandscapeFindings, row: Row) -> str:
    return "fine-tuned" if row["model"] == "fine-tuned" else found.recipe.variant

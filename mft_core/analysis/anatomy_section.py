"""The report's section of the stage `anatomy`: figures, tables, and in words what they show, from the stage's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mft_core.analysis import anatomy_figures
from mft_core.analysis.anatomy_figures import Labels
from mft_core.figures.drawing import save, unique
from mft_core.statistics.markdown import signed, table, with_interval
from mft_core.statistics.tables import method_label, percent

Row = Mapping[str, Any]
_LINES = ("outputs", "inputs", "heads")


def section(rows: Sequence[Row], labels: Labels, confidence: float, out: Path) -> str:
    """Return the Markdown body; those of its figures for which there is something to show are written into `out`."""
    parts = ["## Where the masks cut", *_where(rows, labels, confidence, out)]
    if any(row["part"] == "overlap" for row in rows):
        parts += ["### Do the masks agree?", *_agreement(rows, labels, confidence, out)]
    parts += ["### What the removed weights did", *_costs(rows, labels, confidence, out)]
    return "\n\n".join(parts) + "\n"


def _where(rows: Sequence[Row], labels: Labels, confidence: float, out: Path) -> list[str]:
    header = ["mask", "removed", "smallest 10%", "largest 10%", "positive", *(f"uneven {line}" for line in _LINES)]
    variants = _variants(rows, labels, "share")
    parts = [
        "How often weights are removed, relative to masks that remove as many of every matrix at random (×1): the "
        "smallest and the largest tenth of each matrix's weights by magnitude, and the positive ones; in brackets the "
        f"range of {percent(confidence)} of random masks, outside of which one number in {round(1 / (1 - confidence))} "
        "lies by chance. *Uneven*: the standard deviation of the shares of outputs (rows), inputs (columns) or heads "
        "beyond chance, relative to their mean. Seeds are counted together.",
        table(header, [_where_line(variants[name], name) for name in variants]),
        *_small_weights(variants),
        *_left_out(rows),
    ]
    captions = {
        anatomy_figures.deciles: "Share removed of each decile of the base weights' magnitude, relative to chance.",
        anatomy_figures.evenness: "How unevenly the lines of each matrix are cut. Numbers in %; *even*: more evenly "
        "than random masks do, as when every row has the same share.",
        anatomy_figures.heads: "Share removed of each query head, relative to chance.",
        anatomy_figures.shares: "Share removed of each matrix, relative to the whole mask's.",
    }
    for draw, caption in captions.items():
        parts += _figure(draw.__name__, caption, partial(draw, rows, labels, confidence), out)
    return parts


def _where_line(rows: Sequence[Row], name: str) -> list[str]:
    share = _one(rows, part="share", layer=None, module=None)
    assert share is not None
    ratios = ({"part": "decile", "decile": 1}, {"part": "decile", "decile": 10}, {"part": "sign", "sign": "+"})
    spreads = [_one(rows, part="spread", module=None, lines=line) for line in _LINES]
    return [
        name,
        f"{100 * share['share']:.3g}%",
        *(_ratio(_one(rows, **wanted, module=None)) for wanted in ratios),
        *(_unevenness(row) for row in spreads),
    ]


def _ratio(row: Row | None) -> str:
    if row is None or row["ratio"] is None:
        return "-"
    return f"×{row['ratio']:.3g} [{row['chance_low']:.3g}, {row['chance_high']:.3g}]"


def _unevenness(row: Row | None) -> str:
    if row is None or row["ratio"] is None:
        return "-"
    if row["ratio"] > row["chance_high"]:
        return f"{100 * row['excess']:.2g}%"
    return "as chance" if row["ratio"] >= row["chance_low"] else "more even"


def _small_weights(variants: Mapping[str, Sequence[Row]]) -> list[str]:
    """Say for each method whether it prefers the smallest weights."""
    tested: dict[str, list[Row]] = {}
    for rows in variants.values():
        row = _one(rows, part="decile", decile=1, module=None)
        if row and row["ratio"] is not None:
            tested.setdefault(row["method"], []).append(row)
    lines = []
    for method, rows in tested.items():
        more = sum(row["ratio"] > row["chance_high"] for row in rows)
        less = sum(row["ratio"] < row["chance_low"] for row in rows)
        low, high = min(row["ratio"] for row in rows), max(row["ratio"] for row in rows)
        name = method_label(method)
        if len(rows) == 1:
            word = "more often than" if more else "less often than" if less else "as often as"
            lines.append(f"- {name}: removes the smallest tenth {word} chance does (×{low:.3g}).")
        else:
            lines.append(
                f"- {name}: of {len(rows)} variants {more} remove the smallest tenth more often than chance does, "
                f"{less} less often, {len(rows) - more - less} as often (×{low:.3g} to ×{high:.3g})."
            )
    return ["\n".join(lines)] if lines else []


def _left_out(rows: Sequence[Row]) -> list[str]:
    """Name what could not be looked at, and why."""
    unknown = unique(row["module"] for row in rows if row["part"] == "heads left out")
    return [f"Heads of {', '.join(unknown)} are left out: their layout in this family is not known."] if unknown else []


def _agreement(rows: Sequence[Row], labels: Labels, confidence: float, out: Path) -> list[str]:
    pairs = [row for row in rows if row["part"] == "overlap"]
    header = ["pairs of masks", "pairs", "Jaccard index", "by chance", "overlap beyond chance", "more than chance"]
    lines = []
    for row in (row for row in rows if row["part"] == "overlap summary"):
        own = [pair["z"] for pair in pairs if pair["kind"] == row["kind"] and pair["z"] is not None]
        spans = [_span(row, name) for name in ("jaccard", "chance", "beyond_chance")]
        lines.append([row["kind"], str(row["pairs"]), *spans, f"{sum(z > 1.96 for z in own)} of {len(own)}"])
    parts = [
        "Jaccard index of the removed weights (removed by both, of those removed by either), beside its value for "
        "independent masks of the same counts. *Overlap beyond chance* is 0 for independent masks and 1 where one mask "
        "contains the other (Loevinger's H); means over pairs, least and most in brackets. *More than chance*: pairs "
        "with z > 1.96 of the hypergeometric number of weights that both remove.",
        table(header, lines),
    ]
    apart = len(labels.described) * (len(labels.described) - 1) // 2 - len(pairs)
    if apart:
        parts.append(f"{apart} pairs of masks have no matrix in common and are left out.")
    return parts + _figure(
        "overlap", "Every pair of masks.", partial(anatomy_figures.overlap, rows, labels, confidence), out
    )


def _span(row: Row, name: str) -> str:
    if row[name] is None:
        return "-"
    numbers = (
        round(row[key], 3) + 0.0 for key in (name, f"{name}_low", f"{name}_high")
    )  # + 0.0: no minus before a zero
    mean, low, high = (f"{number:.3f}".replace("-", "−") for number in numbers)
    return mean if row["pairs"] == 1 else f"{mean} [{low}, {high}]"


def _costs(rows: Sequence[Row], labels: Labels, confidence: float, out: Path) -> list[str]:
    variants = _variants(rows, labels, "loss")
    whole = {name: _one(own, part="loss", by="mask") for name, own in variants.items()}
    first = next(row for row in whole.values() if row)
    kinds = ("layer", "module", "decile")
    header = ["mask", "whole mask", *(f"costliest {kind}" for kind in kinds), "layers, summed"]
    lines = [[name, _cost(whole[name]), *_cost_cells(own, kinds)] for name, own in variants.items()]
    parts = [
        "Change of the validation loss, in nats per token, when the removed weights are set to zero in the base model "
        f"(loss {first['base_loss']:.4f}), and when only those of one layer, module or magnitude decile are; positive: "
        f"the weights were of use. {percent(confidence)} intervals from the paired bootstrap over {first['sequences']} "
        f"sequences ({first['tokens']:,} loss tokens); costs are means over seeds. The costliest group is the largest "
        "of several noisy numbers, and so looks worse than it is. Where the layers' costs, each alone, do not sum to "
        "the whole mask's, layers stand in for each other or depend on each other; where a group lowers the loss as "
        "the last to go, the rest of the mask has come to rely on its absence.",
        table(header, lines),
        "How many raise or lower the loss by more than the interval leaves open (weights that do nothing: about "
        f"{percent((1 - confidence) / 2)} each):",
        _verdicts(variants),
    ]
    for method in unique(row["method"] for row in rows if row["part"] == "loss"):
        caption = f"{method_label(method)}: cost of each group, when it is the first to go and when it is the last."
        draw = partial(anatomy_figures.loss, rows, method, labels, confidence)
        parts += _figure(f"loss-{method}", caption, draw, out)
    return parts


def _cost(row: Row | None) -> str:
    return with_interval(row["cost"], row["cost_low"], row["cost_high"], 4) if row else "-"


def _cost_cells(rows: Sequence[Row], kinds: Sequence[str]) -> list[str]:
    cells = []
    alone = [row for row in rows if row["part"] == "loss" and row["order"] == "alone"]
    for kind in kinds:
        most = max((row for row in alone if row["by"] == kind), key=lambda row: row["cost"], default=None)
        cells.append(f"{most[kind]}: {_cost(most)}" if most else "-")
    together = _one(rows, part="loss sum")
    return [*cells, signed(together["cost"], 4) if together else "-"]


def _verdicts(variants: Mapping[str, Sequence[Row]]) -> str:
    """Count for each method the costs whose interval excludes zero."""
    pooled = [row for rows in variants.values() for row in rows if row["part"] == "loss"]
    lines = []
    for method in unique(row["method"] for row in pooled):
        own = [row for row in pooled if row["method"] == method]
        groups = ((True, "alone"), (False, "alone"), (False, "last"))
        cells = [
            _counts([row for row in own if (row["by"] == "mask") == whole and row["order"] == order])
            for whole, order in groups
        ]
        lines.append([method_label(method), *cells])
    return table(["masks", "whole masks", "groups, each alone", "groups, each the last to go"], lines)


def _counts(rows: Sequence[Row]) -> str:
    worse, better = sum(row["cost_low"] > 0 for row in rows), sum(row["cost_high"] < 0 for row in rows)
    return f"{worse} raise, {better} lower, of {len(rows)}"


def _variants(rows: Sequence[Row], labels: Labels, part: str) -> dict[str, list[Row]]:
    """Return the pooled rows of every variant that has rows of a part."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("pooled"):
            found.setdefault(labels.variant(row), []).append(row)
    return {name: own for name, own in found.items() if any(row["part"] == part for row in own)}


def _one(rows: Sequence[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def _figure(name: str, caption: str, draw: Callable[[], Figure | None], out: Path) -> list[str]:
    return [f"![{caption}]({name}.png)", caption] if save(draw, out / f"{name}.png") else []

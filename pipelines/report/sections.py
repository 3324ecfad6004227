"""The sections of a study's report, in Markdown: answer, figure, tables, analyses, cost, settings, provenance."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mft_core.statistics.markdown import Markup, code, plain_text, text
from mft_core.statistics.tables import cell, gain_cell, method_label, pooled
from mft_core.statistics.winner import MEAN
from pipelines.cost.measured import SHARED
from pipelines.report import published, verdict
from pipelines.report.asked import Asked
from pipelines.report.attempt import attempt
from pipelines.report.chosen import for_profile
from pipelines.report.render import Section, grid
from pipelines.report.report import Report, slug
from pipelines.report.search_section import search_section

_FEW = 6
"""values of one setting that are listed one by one"""


def of_study(report: Report, asked: Asked) -> list[Section]:
    """Return every section of a study's report, in the order of the page."""
    said = [note] if (note := published.note(report.plan.profile.name)) else []
    parts = [
        part("answer", "Answer", lambda: verdict.answer(report)),
        Section("figure", "Figure", "\n\n".join(["![Gains over FFT with their intervals](figure.png)", *said])),
        Section("table", "Table", _without_heading(report.table)),
    ]
    if rows := report.tables.get("chosen"):
        parts.append(part("chosen", "Chosen on validation", lambda: _chosen(rows)))
    if report.plan.study.checkpoints:
        parts.append(part("points", "What choosing the best point is worth", lambda: _points(report)))
    if search := report.plan.search:
        parts.append(part("search", "The search", lambda: search_section(search, report.tables)))
    for name, directory in report.analyses.items():
        parts.append(
            attempt(f"part '{name}'", functools.partial(_analysis, name, directory), _failed(slug(name), name))
        )
    if data := report.tables.get("data"):
        parts.append(part("data", "Training data", lambda: _data(data)))
    return [
        *parts,
        part("cost", "Cost", lambda: cost(report.tables)),
        part("settings", "Settings", lambda: settings(report, asked)),
        part("provenance", "Where this comes from", lambda: provenance(report.manifests.values(), asked)),
    ]


def part(name: str, title: str, body: Callable[[], str]) -> Section:
    """Return a section; one that cannot be made says so on the page, and on the console."""
    return attempt(f"part '{title}'", lambda: Section(name, title, body()), _failed(name, title))


def _failed(name: str, title: str) -> Section:
    return Section(name, title, "This part could not be made; the log says why. The numbers are in `rows.csv`.")


def _without_heading(table: str) -> str:
    return re.sub(r"\A## .*\n", "", table)


def _bound(row: Mapping[str, Any]) -> str:
    """Say that a choice lies where the study allows no more."""
    return f"at its bound: {row['bound']}" if row["bound"] else "-"


def _chosen(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what validation chooses."""
    measure = next(name for name in ("validation_loss", "validation_accuracy") if name in rows[0])
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        shown = f"{row[measure]:.4f}" if measure == "validation_loss" else f"{100 * row[measure]:.1f}"
        head = [row["variant"], row["domain"], str(row["variants"]), shown, row["edge"] or _bound(row)]
        line = lines.setdefault((row["domain"], row["variant"]), head + ["-"] * len(benchmarks))
        line[len(head) + benchmarks.index(row["benchmark"])] = cell(row)
    header = ["variant", "domain", "of", measure.replace("_", " "), "on an edge of its grid", *benchmarks]
    by = "least loss on validation rows (nats per token"
    if measure == "validation_accuracy":
        by = "greatest accuracy on validation items (%, mean over benchmarks"
    note = (
        f"Of each method's variants the one of {by}, mean over seeds), and its gain on the benchmarks, which had no "
        "part in the choice; tests and verdicts are those of the table above."
    )
    return f"{note}\n\n{grid(header, list(lines.values()), 'domain')}\n\n```yaml\n{for_profile(rows)}```"


def _points(report: Report) -> str:
    """Return for each training what the best of its states would have claimed, chosen on the test items."""
    winners = report.tables.get("winners", [])
    several = len({row["benchmark"] for row in report.rows}) > 1
    kept = [row for row in pooled(report.rows) if row.get("checkpoint") is None and row["gain"] is not None]
    lines = []
    for row in winners:
        if (row["benchmark"] == MEAN) != several:
            continue
        own = [other["gain"] for other in kept if (other["method"], other["domain"]) == (row["method"], row["domain"])]
        lines.append([method_label(row["method"]), row["domain"], f"{100 * row['naive_gain']:+.1f}", gain_cell(row),
                      f"{100 * fmean(own):+.1f}" if own else "0 (FFT itself)"])  # fmt: skip
    note = (
        "Gains over the FFT checkpoint that validation chose, in points, mean over the benchmarks. *claimed*: "
        "the best state of the training on the test items, which is how the paper chooses. *worth*: the best on one "
        "half of the items, measured on the other half. *validation*: the state that validation rows choose."
    )
    return f"{note}\n\n{grid(['training', 'domain', 'claimed', 'worth', 'validation'], lines)}"


def _analysis(name: str, directory: Path) -> Section:
    """Return an analysis' section; its figures lie in a folder of its name."""
    text = (directory / "section.md").read_text(encoding="utf-8")
    heading = re.match(r"## (.*)\n", text)
    body = text[heading.end() :] if heading else text
    for figure in sorted(directory.glob("*.png")):
        body = body.replace(f"]({figure.name})", f"]({slug(name)}/{figure.name})")
    _, _, of = name.partition(" ")
    title = heading[1] if heading else name
    return Section(slug(name), f"{title}: {of}" if of and of not in title else title, body)


def _data(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what became of the mixtures' rows: what was dropped, and what is left to train on."""
    note = (
        "Rows of each mixture, and how many of them were dropped: those there twice, benchmark questions, those too "
        "long to keep an answer within `data.max_length`. Rows that lost their last turns there are among those used."
    )
    lines = [[value if name == "data" else _count(value) for name, value in row.items()] for row in rows]
    return f"{note}\n\n{grid([name.replace('_', ' ') for name in rows[0]], lines)}"


def cost(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return what the stages took, and what a percentage point of gain cost."""
    stages = tables.get("cost", [])
    header = ["stage", "method", "domain", "runs", "seconds", "tokens", "tokens/s", "peak memory", "energy"]
    lines = [
        [row["stage"], row["method"] if row["method"] == SHARED else method_label(row["method"]), row["domain"],
         row["runs"], _seconds(row["seconds"]), _count(row["tokens"]), _count(row["tokens_per_second"]),
         _memory(row["peak_memory_bytes"]), _energy(row["energy_joules"])]
        for row in stages
    ]  # fmt: skip
    total = sum(row["total_seconds"] for row in stages)
    parts = [
        f"Means over the runs of each stage; seconds are those of the whole stage, loading and validation included. "
        f"Everything together: {_seconds(total)} s of computing, whether or not it was served from the cache here.",
        grid(header, lines, "domain"),
    ]
    lacking = [name for name, key in (("peak memory", "peak_memory_bytes"), ("energy", "energy_joules"))
               if all(row[key] is None for row in stages)]  # fmt: skip
    if lacking:
        what = " and ".join(lacking)
        parts.append(
            f"{what.capitalize()}: not recorded in these artifacts. It is where the machine lets it be read and a "
            "stage ran alone: memory in its process, energy on its device (`--set runtime.heavy_slots=1`)."
        )
    return "\n\n".join([*parts, *_per_point(tables.get("cost-per-point", []))])


def _per_point(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    header = ["variant", "domain", "benchmark", "gain over", "gain", "seconds", "seconds per point"]
    lines = [
        [row["variant"], row["domain"], row["benchmark"], row["over"],
         "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * row[key] + 0.0 for key in ("gain", "gain_low", "gain_high"))),
         _seconds(row["seconds"]), _price(row)]
        for row in sorted(rows, key=lambda row: row["method"] != "fft")
    ]  # fmt: skip
    note = (
        "Seconds of the treatment's own training or selection (and merging) for each percentage point gained; in "
        "brackets the prices at the ends of the gain's interval. A gain that is not above zero has none."
    )
    return ["### Cost of a gained point", note, grid(header, lines, "domain")]


def _price(row: Mapping[str, Any]) -> str | None:
    if row["seconds_per_point"] is None:
        return None
    most = "no limit" if row["seconds_per_point_high"] is None else _seconds(row["seconds_per_point_high"])
    return f"{_seconds(row['seconds_per_point'])} [{_seconds(row['seconds_per_point_low'])}, {most}]"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _memory(value: float | None) -> str | None:
    return None if value is None else f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def _energy(value: float | None) -> str | None:
    return None if value is None else f"{value / 1000:.3g} kJ"


def settings(report: Report, asked: Asked) -> str:
    """Return profile, overrides and seeds, then what each method was trained with."""
    plan = report.plan
    seeds = sorted({item.setup.seed for item in plan.variants if item.columns["seed"] is not None})
    lines = [
        f"- profile: {text(plan.profile.name)}",
        f"- overrides: {', '.join(map(code, asked.overrides)) or 'none'}",
        f"- seeds: {', '.join(map(str, seeds)) or 'none'}",
        f"- domains: {', '.join(dict.fromkeys(text(item.setup.domain) for item in plan.variants))}",
        f"- benchmarks: {', '.join(_benchmarks(report))}",
        f"- engine: {', '.join(dict.fromkeys(text(item.setup.answered_by) for item in plan.variants))}",
    ]
    by_method: dict[str, list[dict[str, Any]]] = {}
    for item in plan.variants:
        if item.trained:
            by_method.setdefault(item.setup.method, []).append(_flat(item.trained.recipe.model_dump(exclude_none=True)))
    names = list(dict.fromkeys(name for recipes in by_method.values() for recipe in recipes for name in recipe))
    table = [
        [Markup(code(name)), *(_values([recipe.get(name) for recipe in recipes]) for recipes in by_method.values())]
        for name in names
    ]
    return "\n".join(lines) + "\n\n" + grid(["setting", *map(method_label, by_method)], table)


def _benchmarks(report: Report) -> list[str]:
    sizes = {row["benchmark"]: (row["n"], row["metric"]) for row in report.rows}
    return [text(f"{name} ({n:,} items, {metric})") for name, (n, metric) in sizes.items()]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _values(values: Sequence[Any]) -> str | None:
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in distinct]
    if len(texts) > _FEW:
        return f"{texts[0]} ... {texts[-1]} ({len(texts)} values)"
    return ", ".join(texts) or None


def provenance(manifests: Any, asked: Asked) -> str:
    """Return the command, and commits, versions and machines of the artifacts behind the answer."""
    known = [manifest["provenance"] for manifest in manifests]
    commits = Counter(_commit(one) for one in known)
    machines = Counter(_machine(one) for one in known)
    versions = Counter(", ".join(f"{name} {version}" for name, version in one["packages"].items() if version)
                       for one in known)  # fmt: skip
    return "\n".join(
        [
            f"```console\n$ {plain_text(asked.command)}\n```",
            "",
            *(f"- commit {name} ({count} artifacts)" for name, count in commits.most_common()),
            *(f"- {name} ({count} artifacts)" for name, count in machines.most_common()),
            *(f"- {version} ({count} artifacts)" for version, count in versions.most_common()),
        ]
    )


def _commit(provenance: Mapping[str, Any]) -> str:
    if provenance["git_commit"] is None:
        return f"unknown (no checkout), sources {provenance['source_digest'][:12]}"
    return provenance["git_commit"] + (" with uncommitted changes" if provenance["git_dirty"] else "")


def _machine(provenance: Mapping[str, Any]) -> str:
    device = provenance.get("device") or f"device {provenance['runtime']['device']}"
    return f"{provenance['machine']}, {device}, Python {provenance['python']}"

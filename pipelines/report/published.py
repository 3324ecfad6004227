"""What the paper reports, from `published.yaml`, set beside what we find."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mft_core.statistics.tables import cell, pooled
from pipelines.report.render import grid
from pipelines.report.report import Report

_BACKBONE = "llama2-7b"
"""whose numbers are shown on a profile of which none are published"""
Values = Mapping[str, Mapping[str, Mapping[str, float]]]
"""accuracy in % by domain, benchmark and method"""


@functools.cache
def _content() -> Any:
    return yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))


def gains(profile: str) -> dict[tuple[str, str], float]:
    """Return the published gains of masks over FFT (shares) on a profile by (domain, benchmark); {} if none are.

    The README's where it has some, else those of the paper's first figure.
    """
    values: Values = next(iter(_sources(profile).values()), {})
    return {
        (domain, benchmark): round((accuracy["mft"] - accuracy["fft"]) / 100, 6)
        for domain, benchmarks in values.items()
        for benchmark, accuracy in benchmarks.items()
    }


def curves(profile: str) -> dict[tuple[str, str], dict[str, float]]:
    """Return the values of the paper's first figure (accuracy in %) on a profile by (domain, benchmark) and method."""
    values: Values = _content()["curves"].get(profile, {})
    return {
        (domain, benchmark): dict(accuracy)
        for domain, benchmarks in values.items()
        for benchmark, accuracy in benchmarks.items()
    }


def _sources(profile: str) -> dict[str, Values]:
    """Return what is published of a profile's backbone, by where it stands."""
    content = _content()
    return {name: content[key][profile] for name, key in (("README", "values"), ("figure", "curves"))
            if profile in content[key]}  # fmt: skip


def note(profile: str) -> str | None:
    """Return what has to be said of the published numbers on a profile, or None."""
    return _content()["notes"].get(profile)


def finding(study: str) -> str | None:
    """Return what the paper says about a study's question, or None."""
    return _content()["findings"].get(study)


def side_by_side(reports: Sequence[Report], profile: str) -> str:
    """Return Markdown: each row of the paper's main table, and ours in the same columns beside it."""
    ours = _ours(reports)
    backbone = profile if _sources(profile) else _BACKBONE
    lines = []
    for source, values in _sources(backbone).items():
        for domain, benchmarks in values.items():
            for benchmark, published in benchmarks.items():
                own = ours.pop((domain, benchmark), {}) if backbone == profile else {}
                lines.append([domain, benchmark, source, *_published(published), *_own(own)])
    lines += [[domain, benchmark, *[None] * 5, *_own(own)] for (domain, benchmark), own in ours.items()]
    header = ["domain", "benchmark", "published in", "paper: base", "paper: FFT", "paper: MFT", "paper: gain",
              "ours: base", "ours: FFT", "ours: MFT (gain, interval, verdict)"]  # fmt: skip
    said = f"Paper: {backbone}, {_content()['source']}. Accuracy in %, gains in percentage points. {note(backbone)}"
    if backbone != profile:
        said += f" The paper has no numbers for {profile}; its benchmarks and ours are different ones."
    return f"{said}\n\n{grid(header, lines)}"


def _ours(reports: Sequence[Report]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return our rows of base, FFT and MFT by (domain, benchmark), of the first study that has all three settled.

    Only studies in which a method has one variant: in a sweep there is no *the* mask.
    """
    for report in reports:
        found: dict[tuple[str, str], dict[str, Any]] = {}
        rows = [row for row in pooled(report.rows) if row["method"] in ("base", "fft", "mft")]
        keys = [(row["domain"], row["benchmark"], row["method"]) for row in rows]
        if len(set(keys)) == len(keys) and {"fft", "mft"} <= {row["method"] for row in rows}:
            for row in rows:
                found.setdefault((row["domain"], row["benchmark"]), {})[row["method"]] = row
            return found
    return {}


def _published(values: Mapping[str, float]) -> list[str]:
    gain = values["mft"] - values["fft"]
    return [*(f"{values[method]:.1f}" for method in ("base", "fft", "mft")), f"{gain:+.1f}"]


def _own(rows: Mapping[str, Any]) -> list[str | None]:
    base, fft, mft = (rows.get(method) for method in ("base", "fft", "mft"))
    return [f"{100 * row['accuracy']:.1f}" if row else None for row in (base, fft)] + [cell(mft) if mft else None]

"""The report of a study that is made of studies: an index of their pages, an answer each, the paper beside us."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from mft_core.statistics.markdown import Markup, text
from pipelines.config.study import Study
from pipelines.report import published
from pipelines.report.asked import Asked
from pipelines.report.attempt import attempt
from pipelines.report.files import write_tables
from pipelines.report.page import PAGE, replacing, write_pages
from pipelines.report.render import Section, grid
from pipelines.report.report import Report
from pipelines.report.sections import part, provenance
from pipelines.report.verdict import sentence


def composite_report(study: Study, parts: Sequence[tuple[Report, Path]], out: Path, asked: Asked) -> Path:
    """Write the index of several studies' reports; links are relative, so that the folders can be moved together.

    Args:
        study: the one that is made of studies.
        parts: each study's report, and the folder in which its pages lie.
        out: the folder of the index.
        asked: for the command.

    Returns:
        the HTML page.
    """
    reports = [report for report, _ in parts]
    profile = reports[0].plan.profile.name
    everything = {key: manifest for report in reports for key, manifest in report.manifests.items()}
    seconds = sum(manifest["provenance"]["seconds"] for manifest in everything.values())
    cost = f"{len(everything)} stages, {seconds / 3600:.2f} hours of computing; what studies share is counted once."
    sections = [
        Section("answer", "Answers", _answers(parts, out)),
        part("paper", "The paper's results beside ours", lambda: published.side_by_side(reports, profile)),
        Section("cost", "Cost", cost),
        Section("provenance", "Where this comes from", provenance(everything.values(), asked)),
    ]
    with replacing(out) as folder:
        write_tables({"rows": [row for report in reports for row in report.rows]}, folder)
        write_pages(folder, study.question, f"Study {study.name} on profile {profile}", sections)
    return out / PAGE


def _answers(parts: Sequence[tuple[Report, Path]], out: Path) -> str:
    """Return a line per study: its question, what the paper says to it, and what we find."""
    lines = []
    for report, directory in parts:
        study = report.plan.study
        said = attempt(f"the answer of {study.name}", functools.partial(sentence, report), "not to be had")
        link = Path(os.path.relpath(directory.absolute(), out.absolute())).as_posix()
        lines.append(
            [Markup(f"[{text(study.name)}](<{link}/{PAGE}>)"), study.question, published.finding(study.name), said]
        )
    note = "Holm's correction is made over each study's declared contrasts, not over all studies."
    return f"{grid(['study', 'question', 'the paper', 'here'], lines)}\n\n{note}"

"""Where a report's pages are written, after a run and by `mft report`; the latter reads a study that has been run.

*Whole* is the study that the user named; a *part* is one of the studies that it is made of, or itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mft_core.store.artifacts import ArtifactStore
from pipelines.commands.gc import keep
from pipelines.config import yaml_to_setups
from pipelines.config.study import Study, load_study
from pipelines.report.asked import Asked
from pipelines.report.chosen import for_profile, refuse_edges
from pipelines.report.composite import composite_report
from pipelines.report.looks import declared, undecided
from pipelines.report.page import PAGE, is_current, write_report
from pipelines.report.report import NotRun, Report, find_report


def write(asked: Asked, out: Path | None, sync: bool) -> tuple[list[Report], Path]:
    """Read a study that has been run, and write its pages.

    Args:
        out: the folder; None takes `reports/<study>-<profile>` under `MFT_HOME`. The parts of a study that is made of
            studies lie in folders of their own, within `out` or beside each other.
        sync: write all numbers to MLflow again.

    Returns:
        the reports of the parts, and the HTML page of the study asked for.

    Raises:
        StageError: a study has not been run with these settings, MLflow cannot be reached, or a tuning's choice lies on
            an edge of its grid.
    """
    store = ArtifactStore.from_environment()
    whole, reports = load_study(asked.study), _reports(asked, store)
    pages = [write_part(report, whole, asked, store, out) for report in reports]
    if sync:
        from pipelines.report.record import sync_to_mlflow

        for report, page in zip(reports, pages, strict=True):
            sync_to_mlflow(report.plan, store, report, page.parent)
    page = write_index(reports, whole, asked, store, out) if whole.studies else pages[0]
    check_choices(reports)
    return reports, page


def _reports(asked: Asked, store: ArtifactStore) -> list[Report]:
    """Read a study that has been run, or the parts that it is made of."""
    return [find_report(plan, store, asked.command) for plan in asked.plans(store)]


def undecided_contrasts(asked: Asked) -> list[str]:
    """Return the declared contrasts of a study that its last look has not decided."""
    reports = _reports(asked, ArtifactStore.from_environment())
    return [name for report in reports for name in undecided(report.contrasts)]


def write_last_look(asked: Asked, out: Path | None, sync: bool) -> tuple[list[Report], Path]:
    """As `write`, at the last of the declared looks that has been run."""
    first, *later = declared(asked)
    found = write(first, out, sync)
    for look in later:
        try:
            found = write(look, out, sync)
        except NotRun:
            break
    return found


def check_choices(reports: Sequence[Report]) -> None:
    """Say what tunings have chosen, and refuse those that end on an edge of their grids; their pages are written.

    Raises:
        StageError: a choice lies on an edge.
    """
    for report in reports:
        if report.plan.study.choose:
            choices = report.tables.get("chosen", [])
            print(f"\nchosen, for the profile's defaults:\n\n{for_profile(choices)}", file=sys.stderr)
            refuse_edges(report.plan.study.name, choices)


def write_part(
    report: Report, whole: Study, asked: Asked, store: ArtifactStore, out: Path | None = None, *, anew: bool = True
) -> Path:
    """Write the pages of one part; returns the HTML page.

    Args:
        anew: also where they are there as this code would write them.
    """
    own, folder = _asked_of(report, whole, asked), _folder(report, whole, asked, store, out)
    page = folder / PAGE
    if anew or not is_current(report, folder, own):
        write_report(report, folder, own)
        keep(page, own.command, report.result, report.artifacts)
    return page


def write_index(
    reports: Sequence[Report], whole: Study, asked: Asked, store: ArtifactStore, out: Path | None = None
) -> Path:
    """Write the index of a study that is made of studies, whose pages are written; returns the HTML page."""
    parts = [(report, _folder(report, whole, asked, store, out)) for report in reports]
    page = composite_report(whole, parts, out or asked.directory(store), asked)
    keep(page, asked.command, None, [])  # its parts say it
    return page


def _folder(report: Report, whole: Study, asked: Asked, store: ArtifactStore, out: Path | None) -> Path:
    if out is None:
        return _asked_of(report, whole, asked).directory(store)
    return out / report.plan.study.name if whole.studies else out


def _asked_of(report: Report, whole: Study, asked: Asked) -> Asked:
    """Return what was asked of a part: by its own name, with the overrides that concern it."""
    if not whole.studies:
        return asked
    study = report.plan.study
    own = [text for text in asked.overrides if yaml_to_setups.concerns(study, text.partition("=")[0].strip())]
    return replace(asked, study=study.name, overrides=own)

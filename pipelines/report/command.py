"""Where a report's pages are written, after a run and by `mft report`; the latter reads a study that has been run.

*Whole* is the study that the user named; a *part* is one of the studies that it is made of, or itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mft_core.store.artifacts import ArtifactStore
from pipelines.config import compose
from pipelines.config.catalogue import Study, load_profile, load_studies, load_study
from pipelines.plan.analyses import analysis_nodes
from pipelines.plan.plan import make_plans
from pipelines.report.asked import Asked
from pipelines.report.composite import composite_report
from pipelines.report.page import write_report
from pipelines.report.report import Report, find_report


def write(asked: Asked, out: Path | None, sync: bool) -> tuple[list[Report], Path]:
    """Read a study that has been run, and write its pages.

    Args:
        out: the folder; None takes `reports/<study>-<profile>` under `MFT_HOME`. The parts of a study that is made of
            studies lie in folders of their own, within `out` or beside each other.
        sync: write all numbers to MLflow again.

    Returns:
        the reports of the parts, and the HTML page of the study asked for.

    Raises:
        StageError: a study has not been run with these settings, or MLflow cannot be reached.
    """
    store = ArtifactStore.from_environment()
    whole, profile = load_study(asked.study), load_profile(asked.profile)
    plans = make_plans(load_studies(asked.study), profile, store, asked.overrides, asked.seeds)
    reports = [find_report(plan, store, analysis_nodes(plan)) for plan in plans]
    pages = [write_part(report, whole, asked, store, out) for report in reports]
    if sync:
        from pipelines.report.record import sync_to_mlflow

        for report, page in zip(reports, pages, strict=True):
            sync_to_mlflow(report.plan, store, report, page.parent)
    return reports, write_index(reports, whole, asked, store, out) if whole.studies else pages[0]


def write_part(report: Report, whole: Study, asked: Asked, store: ArtifactStore, out: Path | None = None) -> Path:
    """Write the pages of one part; returns the HTML page."""
    return write_report(report, _folder(report, whole, asked, store, out), _asked_of(report, whole, asked))


def write_index(
    reports: Sequence[Report], whole: Study, asked: Asked, store: ArtifactStore, out: Path | None = None
) -> Path:
    """Write the index of a study that is made of studies, whose pages are written; returns the HTML page."""
    parts = [(report, _folder(report, whole, asked, store, out)) for report in reports]
    return composite_report(whole, parts, out or asked.directory(store), asked)


def _folder(report: Report, whole: Study, asked: Asked, store: ArtifactStore, out: Path | None) -> Path:
    if out is None:
        return _asked_of(report, whole, asked).directory(store)
    return out / report.plan.study.name if whole.studies else out


def _asked_of(report: Report, whole: Study, asked: Asked) -> Asked:
    """Return what was asked of a part: by its own name, with the overrides that concern it."""
    if not whole.studies:
        return asked
    study = report.plan.study
    own = [text for text in asked.overrides if compose.concerns(study, text.partition("=")[0].strip())]
    return Asked(study.name, asked.profile, own, asked.seeds)

"""Writes a study's report: `report.md`, `report.html`, and every table as CSV and Parquet, into one folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from mft_core.cache_key import digest, digest_file, digest_files
from mft_core.errors import ConfigError
from mft_core.store.outputs import check_apart
from pipelines.report import published, render, sections
from pipelines.report.asked import Asked
from pipelines.report.attempt import attempt, failed
from pipelines.report.files import write_tables
from pipelines.report.report import Report, slug
from pipelines.report.search_section import FIGURE as SEARCH_FIGURE
from pipelines.search.tables import TRIALS

PAGE, TEXT, FIGURE = "report.html", "report.md", "figure.png"
CURRENT = ".current.json"
"""beside a page: of what it was made, and the digests of its files"""
_CODE = Path(__file__).resolve().parents[2]


def write_report(report: Report, out: Path, asked: Asked) -> Path:
    """Write a study's report over what is there; files of other names stay.

    Args:
        out: the folder.
        asked: for the command and the overrides.

    Returns:
        the HTML page.
    """
    study, profile = report.plan.study, report.plan.profile
    known = published.gains(profile.name)
    with replacing(out) as folder:
        figure = folder / FIGURE
        if study.figure == "trajectory":
            from mft_core.figures import trajectory  # imports matplotlib, as the other figures do

            curves = published.curves(profile.name)
            attempt("the figure", lambda: trajectory.write(report.rows, study.question, figure, curves), None)
        elif known or study.figure:
            from mft_core import figures

            draw = functools.partial(figures.gains, report.rows, study.question, figure, kind=study.figure)
            attempt("the figure", lambda: draw(published=known), None)
        else:  # the comparison's own is the same
            attempt("the figure", lambda: shutil.copyfile(report.directory / figure.name, figure), figure)
        for name, directory in report.analyses.items():
            own = folder / slug(name)
            own.mkdir()
            for drawn in directory.glob("*.png"):
                shutil.copyfile(drawn, own / drawn.name)
        tables = report.tables
        if TRIALS in tables:
            from mft_core.figures import search

            attempt("the search's figure", lambda: search.trials(tables[TRIALS], folder / SEARCH_FIGURE), None)
        write_tables({"rows": report.rows, **tables}, folder)
        subtitle = f"Study {study.name} on profile {profile.name}"
        write_pages(folder, study.question, subtitle, sections.of_study(report, asked))
        if not failed:  # the next run tries again
            paths = [path for path in folder.rglob("*") if path.is_file()]
            files = {str(path.relative_to(folder)): digest_file(path) for path in paths}
            (folder / CURRENT).write_text(json.dumps({"made_of": _made_of(report, asked), "files": files}))
    return out / PAGE


def is_current(report: Report, out: Path, asked: Asked) -> bool:
    """Say whether a report's files lie there, each as this code has written it of the same study and results."""
    try:
        kept = json.loads((out / CURRENT).read_bytes())
        files = all(digest_file(out / name) == said for name, said in kept["files"].items())
        return bool(kept["made_of"] == _made_of(report, asked) and files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _made_of(report: Report, asked: Asked) -> str:
    seals = [manifest["manifest_sha256"] for manifest in report.everything.values()]
    return digest([asked.command, report.plan.study, report.result, *report.looks, *report.analyses, *seals, _code()])


@functools.cache
def _code() -> str:
    files = [path for top in ("mft_core", "pipelines") for path in (_CODE / top).rglob("*.*")]
    names = [str(path.relative_to(_CODE)) for path in files if path.suffix in (".py", ".yaml", ".jinja")]
    return digest_files(_CODE, sorted(names))


def write_pages(folder: Path, title: str, subtitle: str, parts: Sequence[render.Section]) -> None:
    """Write sections as Markdown and as HTML; their images lie in the folder already."""
    text = render.markdown(title, parts).replace(f"/{PAGE}>)", f"/{TEXT}>)")  # from Markdown to Markdown
    (folder / TEXT).write_text(text, encoding="utf-8")
    (folder / PAGE).write_text(render.html(title, subtitle, parts, folder), encoding="utf-8")


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give a folder to write into, whose files then take their places in `out`, each whole.

    Two reports of one study may be written at once, and people may have a page open.

    Raises:
        ConfigError: `out` is a file or lies within an artifact, or something that is no report's would be replaced.
    """
    place = check_apart(out)
    if not place.is_dir() and os.path.lexists(place):
        raise ConfigError(f"--out {out}: a file lies there; give a folder.")
    folder = out / f".unfinished-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        others = [path.name for path in folder.iterdir() if path.is_file() and (out / path.name).exists()]
        if others and not (out / PAGE).exists():
            raise ConfigError(f"--out {out}: {min(others)} of it is no report's; give a folder of its own.")
        # the page first: what is left of a killed report is known by it; last, that all of it is there
        for path in sorted(folder.rglob("*"), key=lambda path: (path.name != PAGE, path.name == CURRENT, path)):
            target = out / path.relative_to(folder)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                path.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

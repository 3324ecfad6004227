"""Pages that are left as they are: those that would be written just so."""

from dataclasses import replace

import pytest
import yaml

from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
from pipelines.report import attempt, page, sections
from pipelines.report.asked import Asked
from pipelines.report.command import write_part
from pipelines.report.report import find_report
from tests.support.finished import finish
from tests.support.mini import write_profile


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Write a finished study's pages, unless they are current, as a run does; returns when its files were written."""
    profile = write_profile(tmp_path)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"question": "Which?", "variants": [{"method": "fft"}, {"method": "magnitude"}]}))
    store = ArtifactStore(tmp_path / "home")
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(attempt, "failed", failed := [])  # what other tests of this process could not make
    monkeypatch.setattr(page, "failed", failed)

    def plan():
        return make_plan(load_study(str(path)), load_profile(str(profile)), store)

    finish(plan(), store, {"fft": 0.5, "magnitude": 0.6})

    analysis = tmp_path / "analysis"
    analysis.mkdir()
    (analysis / "section.md").write_text("# Looked at\n\nNothing.\n")
    (analysis / "drawn.png").touch()

    def write(*overrides):
        asked = Asked(str(path), str(profile), list(overrides))
        report = replace(find_report(plan(), store), analyses={"look sparsity=0.05": analysis})  # as landscape's
        written = write_part(report, load_study(str(path)), asked, store, anew=False)
        return {file: file.stat().st_mtime_ns for file in written.parent.iterdir()}

    return write


def test_pages_that_are_current_are_left_and_those_that_lack_a_file_or_have_another_are_written(pages):
    first = pages()
    assert pages() == first
    (table,) = (file for file in first if file.name == "rows.csv")
    whole = table.read_bytes()
    table.unlink()
    second = pages()
    assert (second.keys(), table.read_bytes()) == (first.keys(), whole)
    table.write_bytes(whole + b"1")
    pages()
    assert table.read_bytes() == whole


def test_pages_are_written_where_the_code_the_study_or_who_asks_is_another(pages, tmp_path, monkeypatch):
    first = pages()
    other = pages("mask.sparsity=0.1")
    assert other != first, "its command stands on the page"
    again = pages()
    assert again != other
    study = yaml.safe_load((tmp_path / "two.yaml").read_text())
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**study, "figure": "methods"}))
    drawn = pages()
    assert drawn != again
    assert pages() == drawn
    monkeypatch.setattr(page, "_code", lambda: "later")
    assert pages() != drawn


def test_a_page_of_which_a_part_could_not_be_made_is_written_anew(pages, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(sections, "cost", lambda *given: 1 / 0)
        first = pages()
    assert attempt.failed
    attempt.failed.clear()
    assert pages() != first


def test_files_that_are_not_the_reports_are_none_of_its_own(pages):
    first = pages()
    (next(iter(first)).parent / "notes.txt").write_text("mine")
    assert {file: time for file, time in pages().items() if file in first} == first

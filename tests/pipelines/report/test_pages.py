"""Pages that are left as they are: those that would be written just so."""

import pytest
import yaml

from mft_core.store.artifacts import ArtifactStore
from pipelines.commands import roots
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
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
    study, store = load_study(str(path)), ArtifactStore(tmp_path / "home")
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))

    def plan():
        return make_plan(study, load_profile(str(profile)), store)

    finish(plan(), store, {"fft": 0.5, "magnitude": 0.6})

    def write(*overrides):
        asked = Asked(str(path), str(profile), list(overrides))
        page = write_part(find_report(plan(), store), study, asked, store, anew=False)
        return {file: file.stat().st_mtime_ns for file in page.parent.iterdir()}

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


def test_pages_are_written_where_the_code_or_who_asks_is_another(pages, monkeypatch):
    first = pages()
    assert pages("mask.sparsity=0.1") != first, "its command stands on the page"
    assert pages() != first
    current = pages()
    monkeypatch.setattr(roots, "_code", lambda: "later")
    assert pages() != current

"""Whatever people name, and whatever part of a page fails: the answer is told, and a name is text everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from mft_core.errors import ConfigError
from mft_core.statistics.markdown import Markup, table, text
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
from pipelines.report import render, verdict
from pipelines.report.asked import Asked
from pipelines.report.page import write_report
from pipelines.report.report import Report, find_report
from tests.support.finished import finish
from tests.support.mini import write_profile, write_study

ACCURACY = {"fft": 0.5, "mft": 0.65}
HOSTILE = "![x](/etc/passwd) `$a_$ <img src=x onerror=alert(1)> | [l](javascript:alert(1))"


def finished(folder: Path, variants: list[dict[str, Any]], benchmark: str = "sums") -> Report:
    """Return the report of a study that has been run, whose benchmark is called so."""
    benchmarks = [{"name": benchmark, "task": "mini_sums", "path": "benchmarks"}]
    profile, study = write_profile(folder, benchmarks=benchmarks), write_study(folder, variants)
    store = ArtifactStore(folder / "home")
    plan = make_plan(load_study(str(study)), load_profile(str(profile)), store)
    finish(plan, store, ACCURACY)
    return find_report(make_plan(load_study(str(study)), load_profile(str(profile)), store), store)


def test_a_benchmark_of_any_name_is_text_on_every_page_and_embeds_no_file(tmp_path: Path) -> None:
    report = finished(tmp_path, [{"method": "fft"}, {"method": "mft"}], HOSTILE)
    page = write_report(report, tmp_path / "pages", Asked("s", "p", ["mask.layers=`![x](y)`"]))
    html, markdown = page.read_text(), (page.parent / "report.md").read_text()
    assert "root:" not in html
    assert html.count("<img") == html.count('src="data:image/png;base64,') == 1
    assert 'javascript:alert(1)"' not in html
    parsed = MarkdownIt("commonmark").enable("table").parse(markdown)
    inner = [child for token in parsed for child in token.children or ()]
    assert [child.attrs["src"] for child in inner if child.type == "image"] == ["figure.png"]
    assert not [child for child in inner if child.type in ("link_open", "html_inline")]
    assert HOSTILE in {row["benchmark"] for row in report.rows}


def test_a_page_embeds_no_file_but_its_own_figures(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"secret")
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "link.png").symlink_to(outside)
    for name in ("/etc/passwd", "../outside.png", str(outside), "nope.png", "link.png"):
        html = render.html("t", "s", [render.Section("a", "A", f"![figure]({name})")], folder)
        assert "figure: no such figure" in html
        assert "<img" not in html


def test_a_study_of_several_fine_tunings_has_its_report(tmp_path: Path) -> None:
    report = finished(tmp_path, [{"method": "fft", "grid": {"fine_tune.seed": [42, 43]}}, {"method": "mft"}])
    page = write_report(report, tmp_path / "pages", Asked("s", "p"))
    markdown = (page.parent / "report.md").read_text()
    assert "could not be made" not in markdown
    assert "fft fine_tune.seed=42 | 2 | 0.5000 | - | 50.0 |" in markdown


def test_a_part_that_fails_is_a_line_on_the_page_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = finished(tmp_path, [{"method": "fft"}, {"method": "mft"}])
    (report.directory / "winners.json").write_text("[")
    (report.directory / "figure.png").unlink()
    monkeypatch.setattr(verdict, "_rests_on", lambda _: 1 / 0)
    page = write_report(report, tmp_path / "pages", Asked("s", "p"))
    told = capsys.readouterr().err
    assert "warning: report: part 'Answer' could not be made (ZeroDivisionError: division by zero)" in told
    assert "table winners could not be made" in told
    assert "the figure could not be made" in told
    html = page.read_text()
    assert html.count("This part could not be made") == 1
    assert "no such figure" in html
    assert "MFT" in html
    assert len((page.parent / "rows.csv").read_text().splitlines()) == 1 + len(report.rows)


def test_cells_are_text_unless_they_are_markup() -> None:
    shown = table(["a|b"], [["x | y\n# z"], [Markup("[a](b)")], ["\x1b[31mred"], ["+1.1 [-1.0, +3.0] noise"]])
    assert shown.splitlines() == [
        "| a\\|b |", "| --- |", "| x \\| y # z |", "| [a](b) |", "| \ufffd[31mred |", "| +1.1 [-1.0, +3.0] noise |",
    ]  # fmt: skip


@pytest.mark.parametrize("plain", ["mft sparsity=0.02 layers=2-5 seed=0", "+0.2 [-0.5, +0.8] noise", "q_proj,k_proj"])
def test_ordinary_words_stand_as_they_are(plain: str) -> None:
    assert text(plain) == plain


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[31m", "x" * 201])
def test_what_is_no_name_is_refused_with_what_is_valid(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="printable characters"):
        finished(tmp_path, [{"method": "fft"}], name)

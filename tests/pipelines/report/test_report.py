"""The report of a study: which files, that the page stands alone, that it says what the rows say and what they cost."""

import dataclasses
import json
import re
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml

from mft_core.errors import ConfigError, StageError
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import Study, load_study
from pipelines.plan.plan import make_plan
from pipelines.report import published, render
from pipelines.report.asked import Asked
from pipelines.report.composite import composite_report
from pipelines.report.page import replacing, write_report
from pipelines.report.report import find_report
from pipelines.report.verdict import answer, sentence
from tests.support.finished import finish
from tests.support.mini import write_profile, write_study

VARIANTS = [
    {"method": "base"},
    {"method": "fft"},
    {"method": "continued-fft"},
    {"method": "mft", "grid": {"mask.sparsity": [0.1, 0.3]}},
    {"method": "random"},
]
ACCURACY = {"base": 0.2, "fft": 0.5, "continued-fft": 0.5, "mft": 0.65, "random": 0.3}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360000002000001e221bc330000"
    "000049454e44ae426082"
)


def plan_of(folder, variants=VARIANTS, seeds=(0, 1), **further):
    """Return the plan of a study of these variants on the mini profile, and its store."""
    profile = write_profile(folder)
    study = write_study(folder, variants, seeds, **further)
    store = ArtifactStore(folder / "home")
    return make_plan(load_study(str(study)), load_profile(str(profile)), store), store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def report(folder):
    plan, store = plan_of(folder)
    finish(plan, store, ACCURACY)
    plan, store = plan_of(folder)
    return find_report(plan, store)


@pytest.fixture(scope="module")
def pages(folder, report):
    asked = Asked("mini-study.yaml", "mini.yaml", ["mask.layers=1-2"], [0, 1])
    return write_report(report, folder / "pages", asked).parent


def test_the_page_stands_alone_and_begins_with_question_and_answer(pages):
    page = (pages / "report.html").read_text()
    assert not re.search(r"<script|<link|src=\"(?!data:)|url\(|@import", page)
    assert page.count('src="data:image/png;base64,') == 1
    assert (
        page.index("Does it run?</h1>") < page.index("MFT better than FFT in 2 of 3 comparisons") < page.index("<img")
    )
    assert "mft run mini-study.yaml --profile mini.yaml --set mask.layers=1-2 --seeds 0,1" in page
    assert '<td class="better">' in page
    assert "0123456789abcdef (" in page


def test_the_markdown_says_the_same_and_its_figure_lies_beside_it(pages):
    text = (pages / "report.md").read_text()
    titles = re.findall(r"^## (.*)", text, re.MULTILINE)
    chosen = "Chosen on validation"
    assert titles == ["Answer", "Figure", "Table", chosen, "Training data", "Cost", "Settings", "Where this comes from"]
    assert "MFT better than FFT in 2 of 3 comparisons" in text
    assert (pages / re.search(r"!\[.*\]\((.*)\)", text)[1]).read_bytes().startswith(b"\x89PNG")


def test_csv_and_parquet_hold_every_number_of_the_rows(pages, report):
    table = pyarrow.parquet.read_table(pages / "rows.parquet")
    assert table.num_rows == len(report.rows)
    for row, kept in zip(report.rows, table.to_pylist(), strict=True):
        assert kept["seed"] == (None if row["seed"] is None else str(row["seed"]))
        assert {name: kept[name] for name in row if name != "seed"} == {n: v for n, v in row.items() if n != "seed"}
    assert len((pages / "rows.csv").read_text().splitlines()) == len(report.rows) + 1


def test_what_became_of_the_rows_of_the_data_is_a_section_and_a_table(pages, report):
    text = (pages / "report.md").read_text()
    section = text[text.index("## Training data") : text.index("## Cost")]
    assert "| sums | 1,293 | 3 | 2 | 1,234 | 5 | 0 | 8 | 46 |" in section
    assert report.tables["data"] == [
        {"data": "sums", "rows": 1_293, "duplicates": 3, "benchmark_questions": 2, "too_long": 1_234, "cut": 5,
         "left_out_by_fraction": 0, "validation": 8, "training": 46},
    ]  # fmt: skip
    assert "too long" in (pages / "report.html").read_text()


def test_rows_have_the_validation_loss_of_the_checkpoint_that_was_kept(report):
    losses = {row["method"]: row["validation_loss"] for row in report.rows if row["seed"] != "all"}
    assert losses == {"base": None, "fft": 0.5, "continued-fft": 0.5, "mft": 0.5, "random": None}


def test_the_cost_of_a_point_stands_beside_that_of_full_fine_tuning(report, pages):
    prices = {row["variant"]: row for row in report.tables["cost-per-point"]}
    assert prices["fft"]["over"] == "base"
    assert prices["fft"]["seconds_per_point"] == pytest.approx(40 / 30, abs=1e-3)
    mask = prices["mft sparsity=0.1 layers=1-2"]
    assert mask["seconds"] == 10.0  # learn-mask and merge-mask
    assert mask["seconds_per_point"] == pytest.approx(10 / 15, abs=1e-3)
    assert mask["seconds_per_point_low"] < mask["seconds_per_point"] < mask["seconds_per_point_high"]
    assert prices["random sparsity=0.1 layers=1-2"]["seconds_per_point"] is None
    stages = {(row["stage"], row["method"]): row for row in report.tables["cost"]}
    assert stages["learn-mask", "mft"]["runs"] == 4
    assert stages["learn-mask", "mft"]["tokens_per_second"] == 500.0
    assert stages["prepare-data", "shared"]["total_seconds"] == 1.0
    assert "Peak memory and energy: not recorded" in (pages / "report.md").read_text()


def test_memory_and_energy_are_shown_where_they_were_recorded(tmp_path):
    plan, store = plan_of(tmp_path, [{"method": "fft"}, {"method": "mft"}], (0,))
    measured = {"peak_memory_bytes": 3_000_000_000, "energy_joules": 1500.0, "device": "a GPU", "alone": True}
    finish(plan, store, ACCURACY, measured)
    plan, store = plan_of(tmp_path, [{"method": "fft"}, {"method": "mft"}], (0,))
    write_report(find_report(plan, store), tmp_path / "pages", Asked("s", "p"))
    text = (tmp_path / "pages" / "report.md").read_text()
    assert "| 3.00 GB | 1.5 kJ |" in text
    assert "not recorded" not in text
    assert "a GPU" in text


def test_an_analysis_is_a_section_with_its_figures_and_numbers(tmp_path, report):
    made = tmp_path / "anatomy"
    made.mkdir()
    (made / "section.md").write_text("## Where it cuts\n\nEverywhere <b>alike</b>.\n\n![a map](map.png)\n")
    (made / "map.png").write_bytes(PNG)
    (made / "rows.json").write_text(json.dumps([{"layer": 1, "share": 0.25}, {"layer": 2, "share": None}]))
    whole = dataclasses.replace(report, analyses={"anatomy": made})
    write_report(whole, tmp_path / "pages", Asked("s", "p"))
    text = (tmp_path / "pages" / "report.md").read_text()
    assert "## Where it cuts" in text
    assert "![a map](anatomy/map.png)" in text
    assert (tmp_path / "pages" / "anatomy" / "map.png").read_bytes() == PNG
    page = (tmp_path / "pages" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert "&lt;b&gt;alike" in page
    assert pyarrow.parquet.read_table(tmp_path / "pages" / "anatomy.parquet").column("share").to_pylist() == [
        0.25,
        None,
    ]


@pytest.mark.parametrize(
    ("verdicts", "says"),
    [
        (
            ["better", "worse", "worse"],
            "Exploratory: continued FFT better than FFT in 1 of 3 comparisons of trained treatments; 2 worse.",
        ),
        (
            ["undecided", "worse", "equivalent"],
            "Exploratory: nothing better than FFT in 3 comparisons of trained treatments; 1 worse, 1 equivalent, "
            "1 undecided.",
        ),
    ],
)
def test_the_answer_in_a_sentence_is_about_treatments_and_says_that_it_explores(report, verdicts, says):
    given = iter(verdicts)
    rows = [
        {**row, "verdict": "better" if row["method"] == "random" else next(given)}
        if row["family"] == "exploratory"
        else row
        for row in report.rows
    ]
    changed = dataclasses.replace(report, rows=rows)
    assert sentence(changed) == says
    assert "random mask: of 1 gains 1 better, 0 worse" in answer(changed)


def test_the_answer_in_a_sentence_is_that_of_the_declared_contrasts(tmp_path):
    variants = [{"method": "fft"}, {"method": "mft"}, {"method": "random"}]
    declared = {"primary": ["mft - fft", "mft - random"], "margin": 2.0}
    plan, store = plan_of(tmp_path, variants, contrasts=declared)
    finish(plan, store, ACCURACY)
    plan, store = plan_of(tmp_path, variants, contrasts=declared)
    report = find_report(plan, store)
    primaries = [row for row in report.contrasts if row["family"] == "primary"]
    assert [(row["contrast"], row["study"]) for row in primaries] == [("mft - fft", "mini-study"),
                                                                      ("mft - random", "mini-study")]  # fmt: skip
    assert sentence(report).startswith(
        f"mft - fft: {primaries[0]['verdict']}, {primaries[0]['sentence']}; mft - random"
    )
    assert "The 2 declared contrasts are adjusted by Holm among themselves" in answer(report)


def test_a_study_that_has_not_been_run_says_what_to_run(tmp_path):
    plan, store = plan_of(tmp_path)
    with pytest.raises(
        StageError, match=r"stages are missing, first: evaluate sums of base.*mft run mini-study --profile mini"
    ):
        find_report(plan, store)
    page = store.home / "reports" / "mini-study-mini" / "report.html"
    page.parent.mkdir(parents=True)
    page.touch()
    with pytest.raises(StageError, match=f"Its last run had others: {page}"):
        find_report(plan, store)


def test_pages_replace_those_of_a_report_and_nobody_elses_files(tmp_path):
    for name in ("figure.png", "rows.parquet"):
        (tmp_path / name).write_text("mine")

    def write():
        with replacing(tmp_path) as folder:
            for name in ("report.html", "figure.png", "rows.parquet"):
                (folder / name).write_text("ours")

    with pytest.raises(ConfigError, match=r"figure\.png of it is no report's"):
        write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("figure.png", "rows.parquet"), "mine")  # fmt: skip
    (tmp_path / "report.html").touch()
    write()
    assert (tmp_path / "figure.png").read_text() == "ours"
    with pytest.raises(ConfigError, match="a file lies there"), replacing(tmp_path / "figure.png"):
        pytest.fail("it is not begun")


def test_a_report_that_fails_leaves_the_earlier_one_as_it_is(tmp_path):
    (tmp_path / "report.md").write_text("before")

    def fail():
        with replacing(tmp_path) as folder:
            (folder / "report.md").write_text("half")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert (tmp_path / "report.md").read_text() == "before"
    assert list(tmp_path.iterdir()) == [tmp_path / "report.md"]


def test_a_study_of_studies_has_an_index_with_links_that_lead_to_their_pages(tmp_path, report, pages):
    study = Study(name="all", question="What remains?", studies=("mini-study", "mini-study"))
    page = composite_report(study, [(report, pages)], tmp_path / "all", Asked("all", "mini.yaml")).read_text()
    link = re.search(r'href="([^"#]*report.html)"', page)[1]
    assert (tmp_path / "all" / link).resolve() == (pages / "report.html").resolve()
    assert sentence(report) in page
    assert "paper: MFT" in page
    assert "What remains?" in page
    assert (tmp_path / "all" / "rows.parquet").is_file()


def test_the_papers_numbers_stand_in_the_row_of_ours(tmp_path):
    path = write_profile(tmp_path)
    profile = yaml.safe_load(path.read_text())
    profile["default_domain"], profile["domains"] = "math", {"math": {}}
    profile["defaults"]["benchmarks"][0]["name"] = "gsm8k"
    (tmp_path / "llama2-7b.yaml").write_text(yaml.safe_dump(profile))
    study = load_study(str(write_study(tmp_path, [{"method": m} for m in ("base", "fft", "mft")])))
    store = ArtifactStore(tmp_path / "home")
    loaded = load_profile(str(tmp_path / "llama2-7b.yaml"))
    finish(make_plan(study, loaded, store), store, ACCURACY)
    table = published.side_by_side([find_report(make_plan(study, loaded, store), store)], "llama2-7b")
    line, figure = [line for line in table.splitlines() if "| gsm8k |" in line]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:9] == ["math", "gsm8k", "README", "15.2", "46.8", "47.4", "+0.6", "20.0", "50.0"]
    assert re.match(r"65\.0 \(\+15\.0 \[.*\] better\)", cells[9])
    assert figure == "| math | gsm8k | figure | 15.2 | 46.9 | 47.3 | +0.4 | - | - | - |"
    assert next(line for line in table.splitlines() if "| ifeval |" in line).endswith("| +5.2 | - | - | - |")


def test_published_gains_belong_to_their_backbone():
    assert published.gains("llama2-7b")["instruction", "ifeval"] == 0.052
    assert published.gains("llama3.1-8b") == {
        ("math", "gsm8k"): 0.003,
        ("coding", "humaneval"): 0.025,
        ("instruction", "ifeval"): 0.06,
    }
    assert published.gains("tiny") == {}


def test_a_page_of_the_8b_profile_says_that_its_data_and_steps_are_not_published(tmp_path):
    path = write_profile(tmp_path).rename(tmp_path / "llama3.1-8b.yaml")
    study = load_study(str(write_study(tmp_path, [{"method": m} for m in ("base", "fft", "mft")])))
    store, loaded = ArtifactStore(tmp_path / "home"), load_profile(str(path))
    finish(make_plan(study, loaded, store), store, ACCURACY)
    report = find_report(make_plan(study, loaded, store), store)
    page = write_report(report, tmp_path / "page", Asked("s", str(path))).with_suffix(".md").read_text()
    assert "are not published: their best checkpoints lie at about 4,620, 685 and 1,250 steps" in " ".join(page.split())
    assert "read by eye, ±0.3" in page
    table = published.side_by_side([report], "llama3.1-8b")
    assert "| instruction | ifeval | figure | 17.6 | 59.8 | 65.8 | +6.0 | - | - | - |" in table
    assert "no numbers for" not in table


def test_tables_scroll_by_themselves_and_pipes_in_cells_do_not_break_them(tmp_path):
    body = render.grid(["a", "b"], [["x|y", None]])
    page = render.html("T", "S", [render.Section("s", "S", body)], Path(tmp_path))
    assert '<div class="table"><table>' in page
    assert re.search(r"<td>x\|y</td>\s*<td>-</td>", page)

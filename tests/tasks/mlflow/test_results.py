"""What is read back from MLflow is what was recorded: the same rows, tables and curves, of the newest execution."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mft_core.errors import ConfigError
from mft_core.statistics.tables import apart, pooled
from pipelines.report.files import write_tables
from tasks.mlflow import results
from tasks.mlflow.fields import variant_key
from tasks.mlflow.tracking import Tracker, Writer
from tests.mft_core.stages.test_compare import Study, changed, mask

Row = dict[str, Any]
WINNERS: list[Row] = [
    {
        "benchmark": "gcd",
        "layers": "5",
        "seed": 0,
        "p_holm": 3.25e-17,
        "n": 100,
        "varied": "sparsity",
        "better": None,
    },
    {"benchmark": "sums", "layers": "2-5", "seed": "all", "p_holm": 1 / 3, "n": None, "varied": "", "better": 0.5},
]
CURVE = [{"step": step, "loss": 1 / step, "learning_rate": 1e-4} for step in range(1, 121)]
CURVE[59]["validation_loss"] = 0.123456789012345


def compared(folder: Path) -> list[Row]:
    """Return the rows of a study of two shares of the data and two seeds, in two domains, as the pipeline has them."""
    study = Study(folder)
    fft = np.repeat([1, 0], [120, 80])
    for domain in ("maths", "coding"):
        for benchmark in ("gcd", "sums"):
            baseline = study.add(fft, "fft", benchmark, domain=domain)
            magnitude = mask(0.1, method="magnitude")
            study.add(changed(fft, 3, 60), "magnitude", benchmark, **magnitude, domain=domain, baseline=baseline)
            for fraction in (0.25, 1.0):
                for seed in (0, 1):
                    described = mask(0.1, seed) | {"domain": domain, "mask.fraction": fraction, "baseline": baseline}
                    described["variant"] += f" fraction={fraction}"
                    study.add(changed(fft, 9 + 3 * seed, int(20 * fraction), seed), "mft", benchmark, **described)
    rows = study.compare(folder / "out")
    for index, row in enumerate(rows):
        row |= {"study": "data-ratio", "profile": "tiny", "cached": True, "seconds": 0.25 * index}
        row["validation_loss"] = 0.3 if row["method"] == "mft" and row["seed"] != "all" else None
    return rows


def record(home: Path, rows: list[Row], profile: str = "tiny", study: str = "data-ratio", result: str = "") -> None:
    """Record a result as the pipeline does it; without rows an execution that failed."""
    params = {"study": study, "profile": profile, "question": "How much of the data?"}
    pages = home / "pages"
    pages.mkdir(parents=True, exist_ok=True)
    write_tables({"rows": rows, "winners": WINNERS}, pages)
    with Writer(home, study) as writer:
        tracker = Tracker(writer, study, "", f"{study} on {profile}", plan=result, result=result, params=params)
        for row in rows:
            if row["seed"] != "all":
                recipe = {"training.learning_rate": row["sparsity"], "training.epochs": 1.0, "fraction": 0.5}
                tracker.variant(variant_key(row), row["variant"], {**results_columns(row), **recipe})
        tracker.log_rows(rows)
        if rows:
            tracker.attach(pages, "report")
            tracker.write("", tags={"mft.tables": "winners"})
            tracker.log_curve(variant_key(rows[1]), lambda: CURVE)
        tracker.finish("FINISHED" if rows else "FAILED", result)
    assert writer.problem is None


def results_columns(row: Row) -> Row:
    """Return what identifies the row's variant, as the pipeline logs it when a run begins."""
    return {name: row.get(name) for name in (*results.VARIANT, "mask.fraction")}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A home with two results, the first executed again last, one on another profile, a failed one; and its rows."""
    folder = tmp_path_factory.mktemp("results")
    rows = compared(folder / "study")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        record(folder / ".mft", rows, result="newest")
        record(folder / ".mft", [{**row, "accuracy": 0.0} for row in rows[:3]], result="older")
        record(folder / ".mft", rows[:2], profile="mini", result="elsewhere")
        record(folder / ".mft", [])
        record(folder / ".mft", rows[:2], result="newest")  # a cached run
    return folder, rows


@pytest.fixture(autouse=True)
def home(recorded: tuple[Path, list[Row]], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MFT_HOME", str(recorded[0] / ".mft"))
    return recorded[0]


def by_name(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    return {(row["domain"], row["variant"], row["benchmark"]): row for row in rows}


def test_rows_are_those_of_the_report_with_every_number_word_and_gap(recorded: tuple[Path, list[Row]]) -> None:
    frame = results.rows("data-ratio")
    found, expected = by_name(results.records(frame)), by_name(recorded[1])
    assert len(frame) == len(found) == len(expected) == 2 * 3 * (1 + 1 + 4 + 2)
    assert set(frame.columns) == {name for row in recorded[1] for name in row} - {"cached"}
    for key, row in found.items():
        assert row == {name: expected[key].get(name) for name in row}, key
        assert all(isinstance(row[name], int) for name in ("n", "seeds"))
        assert row["seed"] in (None, "all") or isinstance(row["seed"], int)


def test_rows_can_be_drawn_and_pooled_as_those_of_the_report(recorded: tuple[Path, list[Row]]) -> None:
    found = results.records(results.rows("data-ratio"))
    assert len(pooled(found)) == len(pooled(recorded[1])) == 2 * (2 + 1) * 4
    assert len(apart(found)) == len(apart(recorded[1])) == 2 * 3 * 4
    assert [row["variant"] for row in found] == [row["variant"] for row in recorded[1]], "in the report's order"


def test_tables_are_given_back_to_the_last_digit_and_by_name(recorded: tuple[Path, list[Row]]) -> None:
    assert results.tables("data-ratio") == ["winners"]
    frame = results.table("data-ratio", "winners")
    assert results.records(frame) == WINNERS
    assert frame["layers"].tolist() == ["5", "2-5"]
    assert pd.api.types.is_integer_dtype(frame["n"])
    with pytest.raises(ConfigError, match=r"no table 'winner'\. Did you mean 'winners'\? It has: winners\."):
        results.table("data-ratio", "winner")


def test_curves_hold_steps_losses_and_all_validations(recorded: tuple[Path, list[Row]]) -> None:
    frame = results.curves("data-ratio")
    assert set(frame["variant"]) == {recorded[1][1]["variant"]}
    steps = frame["step"].tolist()
    assert steps == sorted(set(steps))
    assert {1, 60, 120} <= set(steps)
    validated = frame.dropna(subset=["validation_loss"])
    assert validated[["step", "validation_loss"]].values.tolist() == [[60, 0.123456789012345]]
    assert frame.set_index("step")["loss"][120] == 1 / 120


def test_the_result_that_was_executed_last_is_read(recorded: tuple[Path, list[Row]]) -> None:
    assert results.rows("data-ratio")["accuracy"].gt(0).all(), "neither the older nor the failed one"
    assert len(results.rows("data-ratio", "mini")) == 2
    (found,) = results.studies()
    assert (found.study, found.profile, found.question) == ("data-ratio", "tiny", "How much of the data?")
    assert results.studies("llama2-7b") == []


def test_a_study_that_was_not_executed_is_told_with_those_that_were_and_the_command() -> None:
    with pytest.raises(ConfigError, match=r"'data-ratios' has no finished execution on profile 'tiny'.*Did you mean "):
        results.rows("data-ratios")
    with pytest.raises(ConfigError, match=r"Finished there: none\. Run it: mft run data-ratio --profile llama2-7b"):
        results.curves("data-ratio", "llama2-7b")


def test_the_store_is_found_from_a_directory_below_and_settings_win(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = f"sqlite:///{home / '.mft' / 'mlflow.db'}"
    (home / "notebooks").mkdir()
    monkeypatch.chdir(home / "notebooks")
    monkeypatch.delenv("MFT_HOME")
    assert results.tracking_uri() == database
    monkeypatch.setenv("MFT_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/mlflow.db does not exist\. Run a study first"):
        results.rows("data-ratio")
    assert list(tmp_path.iterdir()) == [], "reading makes no database"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert len(results.studies()) == 1


def test_a_server_that_is_down_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be read: .*Start its server"):
        results.rows("data-ratio")


def test_missing_values_and_numbers_are_plain_python_in_records() -> None:
    frame = pd.DataFrame({"n": [1, None], "gain": [0.5, None], "seed": [0, "all"]}).convert_dtypes()
    assert json.dumps(results.records(frame)) == (
        '[{"n": 1, "gain": 0.5, "seed": 0}, {"n": null, "gain": null, "seed": "all"}]'
    )

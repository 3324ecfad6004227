"""`mft verdict` as a user runs it: one command, within its budget, nothing fine-tuned first, a sentence that agrees."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.flows.test_study import start
from tests.support.mini import write_profile

BUDGET = 150


def verdict(folder, *more):
    began = time.monotonic()
    given = ["--data", folder / "data" / "sums.jsonl", "--benchmark", folder / "benchmarks", "--json"]
    command = ["verdict", folder / "model", *given, "--budget", f"{BUDGET}s", "--out", folder / "own.yaml", *more]
    process = start(folder, *command)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return json.loads(out), err, time.monotonic() - began


@pytest.mark.slow
def test_a_verdict_keeps_its_budget_fine_tunes_nothing_first_and_goes_on_where_it_was(tmp_path):
    write_profile(tmp_path)
    answer, err, seconds = verdict(tmp_path)
    assert seconds < 1.1 * BUDGET
    assert not [line for line in err.splitlines() if "computed fine-tune " in line.replace("  ", " ")]
    assert not list((tmp_path / "home" / "artifacts").glob("fine-tune/*")) or "continue-fft" in err
    assert answer["verdict"] in ("better", "not better", "undecided")
    assert answer["sentence"].lower().startswith(answer["verdict"])
    assert f"{100 * answer['gain']:+.1f} points" in answer["sentence"]
    page = Path(answer["report"]).with_name("report.md").read_text()
    assert answer["sentence"] in page.replace("\\", "")
    assert (Path(answer["checkpoint"]) / "config.json").is_file()
    profile = yaml.safe_load((tmp_path / "own.yaml").read_text())
    assert "fine_tune" not in profile["defaults"]
    again, err, _ = verdict(tmp_path)
    assert "rows and items as in it" in err
    assert "computed learn-mask" not in err
    assert again["sentence"] == answer["sentence"]

"""A whole study as a user runs it: real processes, a tiny random model, real Prefect, MLflow and lm-eval."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mft_core.methods import METHODS
from mft_core.store import manifests
from tasks.mlflow import results as recorded
from tasks.mlflow.fields import is_number
from tests.support.mini import PLAIN_METHODS, write_profile, write_study

ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
IGNORED = {"cached", "seconds"}


def start(folder, *arguments, home="home", **variables):
    """Start the command line in a session of its own, so that a test can kill all of it."""
    environment = {**os.environ, **ENVIRONMENT, "MFT_HOME": str(folder / home), **variables}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def run(folder, *arguments, home="home"):
    """Run `mft run` on the mini study; returns (rows, stderr)."""
    study = [folder / "mini-study.yaml", "--profile", folder / "mini.yaml"]
    process = start(folder, "run", *study, "--json", *arguments, home=home)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return json.loads(out), err


def computed(stderr):
    """Return the labels of the stages that were computed, from what the display printed."""
    return [line.split("computed", 1)[1].strip() for line in stderr.splitlines() if "] computed" in line]


def results(rows):
    """Return the rows without what may differ between runs."""
    return [{key: value for key, value in row.items() if key not in IGNORED} for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    write_profile(path)
    write_study(path)
    return path


@pytest.fixture(scope="module")
def first(folder):
    return run(folder)


def test_a_study_answers_with_one_row_per_variant_and_benchmark(first):
    rows, _ = first
    methods = [name for name in PLAIN_METHODS for _ in range(2 if name == "mft" else 1)]
    assert [row["method"] for row in rows] == methods
    expected = {
        "study", "profile", "variant", "method", "domain", "layers", "modules", "sparsity", "seed", "benchmark",
        "metric", "n", "accuracy", "baseline", "gain", "gain_low", "gain_high", "p_value", "p_holm", "cached",
        "seconds",
    }  # fmt: skip
    assert all(expected <= set(row) for row in rows)
    assert all(row["gain_low"] <= row["gain"] <= row["gain_high"] for row in rows if row["gain"] is not None)


def test_python_has_nothing_to_complain_of_at_the_end_of_a_run(first):
    assert "resource_tracker" not in first[1]


def test_the_merged_checkpoint_has_the_exact_zeros_and_loads_without_this_project(folder, first):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('mft_core', 'tasks', 'pipelines')))\n"
        "import json, torch; from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); f = AutoModelForCausalLM.from_pretrained(sys.argv[2])\n"
        "b = dict(f.named_parameters())\n"
        "print(json.dumps({n: [int(((p == 0) & (b[n] != 0)).sum()), int((p != b[n]).sum()), p.numel()]"
        " for n, p in m.named_parameters()}))"
    )
    artifacts = folder / "home" / "artifacts"
    manifests = [json.loads(path.read_text()) for path in (artifacts / "learn-mask").glob("*/manifest.json")]
    mask = next(m for m in manifests if m["recipe"]["selector"] == "learned" and m["recipe"]["sparsity"] == 0.3)
    merged = next(
        path.parent
        for path in (artifacts / "merge-mask").glob("*/manifest.json")
        if json.loads(path.read_text())["inputs"]["mask"] == mask["digest"]
    )
    base = next(
        path.parent
        for path in (artifacts / "fine-tune").glob("*/manifest.json")
        if json.loads(path.read_text())["digest"] == mask["inputs"]["model"]
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(merged / "model"), str(base / "model")],
        capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    for name, (zeros, changed, size) in json.loads(done.stdout).items():
        masked = ".layers.1." in name or ".layers.2." in name
        expected = int(0.3 * size) if masked and name.endswith("_proj.weight") else 0
        assert (zeros, changed) == (expected, expected), name


def mlflow_runs(folder):
    """Return all runs of the mini study in MLflow, parents and nested ones."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'home' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mini-study")
    return client.search_runs([experiment.experiment_id], max_results=200)


def written(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "home" / "reports").rglob("*.*")}


def test_a_second_run_executes_no_stage_makes_no_cluster_no_page_and_no_run_in_mlflow_and_gives_the_same_answer(
    folder, first, monkeypatch
):
    before, pages = [item.info.run_id for item in mlflow_runs(folder)], written(folder)
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    rows, err = run(folder)
    assert [item.info.run_id for item in mlflow_runs(folder)] == before
    assert written(folder) == pages
    assert computed(err) == []
    imported = {line.split("|")[-1].strip() for line in err.splitlines() if line.startswith("import time:")}
    assert "pipelines.flows" in imported
    assert not {"dask", "distributed", "torch", "transformers", "matplotlib", "scipy.special"} & imported
    assert results(rows) == results(first[0])
    assert all(row["cached"] for row in rows)


@pytest.mark.parametrize("setting", ["runtime.devices=9", "runtime.device=cuda:9"])
def test_a_device_that_is_not_here_is_missed_only_where_something_is_computed(folder, first, setting):
    rows, err = run(folder, "--set", setting)
    assert computed(err) == []
    assert results(rows) == results(first[0])
    study = ["run", folder / "mini-study.yaml", "--profile", folder / "mini.yaml"]
    process = start(folder, *study, "--set", setting, "--rerun", "evaluate")
    _, err = process.communicate(timeout=100)
    assert (process.returncode, len(err.strip().splitlines())) == (2, 1), err
    assert "torch sees " in err


def test_of_an_earlier_versions_evaluations_those_that_were_right_are_found(folder, first):
    for path in (folder / "home/artifacts/evaluate").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["recipe"]["allow_code"], manifest["manifest_sha256"]
        path.write_text(json.dumps(manifests.seal(manifest)))
    rows, err = run(folder)
    assert computed(err) == []
    assert results(rows) == results(first[0])


def test_what_was_damaged_or_deleted_is_computed_again_and_nothing_else(folder, first):
    artifacts = folder / "home" / "artifacts"
    mask = sorted((artifacts / "learn-mask").iterdir())[0]
    (mask / "mask" / "mask.safetensors").write_bytes(b"short")
    evaluation = sorted((artifacts / "evaluate").iterdir())[0]
    items = evaluation / "items.jsonl"
    items.write_bytes(bytes([items.read_bytes()[0] ^ 1]) + items.read_bytes()[1:])
    rows, err = run(folder)
    again = computed(err)
    assert len(again) == 2
    assert [label.split()[0] for label in sorted(again)] == ["evaluate", "learn-mask"]
    assert results(rows) == results(first[0])


def test_references_that_other_code_kept_or_that_name_another_result_are_found_anew_and_nothing_is_computed(
    folder, first
):
    records = sorted((folder / "home" / "prefect" / "results").iterdir())
    others = [json.loads(json.loads(path.read_text())["result"])["artifact"] for path in records]
    for index, path in enumerate(records):
        kept = json.loads(path.read_text())
        elsewhere = {"__class__": "mft_core.elsewhere.ArtifactRef", "data": others[index]}
        of_another = {"artifact": others[index - 1], "computed": True}
        kept["result"] = json.dumps(elsewhere if index % 2 else of_another)
        path.write_text(json.dumps(kept))
    rows, err = run(folder)
    assert computed(err) == []
    assert results(rows) == results(first[0])
    assert all(row["cached"] for row in rows)


def test_mlflow_has_a_run_per_variant_with_numbers_and_curves(folder, first):
    from mlflow.tracking import MlflowClient

    client, runs = MlflowClient(f"sqlite:///{folder / 'home' / 'mlflow.db'}"), mlflow_runs(folder)
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    oldest = min(parents, key=lambda r: r.info.start_time)
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == oldest.info.run_id}
    assert {row["variant"] for row in first[0]} <= set(children)
    assert all(r.info.status == "FINISHED" for r in runs)
    for row in first[0]:
        metrics = children[row["variant"]].data.metrics
        assert metrics["accuracy/sums"] == row["accuracy"]
        assert metrics.get("gain/sums") == row["gain"]
    curve = client.get_metric_history(children["mft sparsity=0.3 layers=1-2 seed=0"].info.run_id, "train/loss")
    steps = [point.step for point in curve]
    assert steps == sorted(set(steps))
    assert steps[-1] == 14  # (60 - 8) rows, 8 a step, 2 epochs


def numbers(text):
    """Return the numbers in a text as (value, decimals)."""
    found = re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", text)
    return [(float(word.replace(",", "")), len(word.partition(".")[2].partition("e")[0])) for word in found]


def test_every_number_in_the_tables_of_a_report_is_in_mlflow_and_no_metric_is_named_by_a_counter(
    folder, first, monkeypatch
):
    monkeypatch.setenv("MFT_HOME", str(folder / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs, kept = mlflow_runs(folder), set()
    metrics = {name for item in runs for name in item.data.metrics}
    assert not [name for name in metrics if re.search(r"(^|[/_.])\d+($|[/_.])", name)]
    for item in runs:
        kept |= set(item.data.metrics.values())
        kept |= {value for text in (*item.data.params.values(), item.data.tags["mlflow.runName"])
                 for value, _ in numbers(text)}  # fmt: skip
    for name in recorded.tables("mini-study", "mini"):
        for line in recorded.records(recorded.table("mini-study", name, "mini")):
            kept |= {abs(value) for value in line.values() if is_number(value)}
    kept |= {abs(value) for value in kept}
    # the attached page: where something was computed again since, the one in `reports` has other seconds
    (page,) = (folder / "home" / "mlartifacts").rglob("report/report.md")
    cells = [cell for line in page.read_text().splitlines() if line.startswith("|") for cell in line.split("|")]
    shown = {pair for cell in cells for pair in numbers(cell)}
    assert len(shown) > 60
    units = (1, 100, 1e-3, 1e-6, 1e-9)  # as it is, %, and thousands, millions, billions of bytes
    unknown = [
        (value, decimals)
        for value, decimals in shown
        if not any(abs(unit * one - value) < 0.51 * 10**-decimals for unit in units for one in kept)
    ]
    assert unknown == []


def test_report_and_plan_read_what_the_run_made(folder, first):
    study = [folder / "mini-study.yaml", "--profile", folder / "mini.yaml", "--json"]
    report = start(folder, "report", *study)
    out, err = report.communicate(timeout=60)
    assert report.returncode == 0, err
    assert results(json.loads(out)) == results(first[0])
    plan = start(folder, "plan", *study)
    out, err = plan.communicate(timeout=60)
    assert plan.returncode == 0, err
    assert all(stage["state"].startswith("cached") for stage in json.loads(out)["stages"])


def test_two_runs_at_once_compute_each_key_once(folder, first):
    study = ["run", folder / "mini-study.yaml", "--profile", folder / "mini.yaml", "--json"]
    both = [start(folder, *study, home="shared") for _ in range(2)]
    outputs = [process.communicate(timeout=280) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    made = list((folder / "shared/artifacts").rglob("manifest.json"))
    logs = "".join(path.read_text() for path in (folder / "shared/logs").glob("*mini-study*.log"))
    started = [line.split("computing ")[1] for line in logs.splitlines() if "computing " in line]
    assert len(started) == len(set(started)) == len(made)
    assert [results(json.loads(out)) for out, _ in outputs] == [results(first[0])] * 2


def test_a_stage_that_fails_is_named_with_why_and_where_the_log_is(folder, first, tmp_path):
    study = write_study(tmp_path, [{"method": "continued-fft"}])
    process = start(
        folder, "run", study, "--profile", folder / "mini.yaml",
        "--set", "continued.learning_rate=1e30", "--set", "continued.schedule=constant",
    )  # fmt: skip
    _, err = process.communicate(timeout=280)
    assert process.returncode == 1, err
    told = err[err.index("failed: ") :]
    assert "continue-fft sums seed=0: " in told
    assert "not finite" in told
    assert "Traceback" not in err
    log = Path(told.strip().splitlines()[-1].removeprefix("log: "))
    assert "continue-fft sums seed=0 failed" in log.read_text()


def test_a_run_without_mlflow_answers_and_says_so(folder, first):
    study = ["run", folder / "mini-study.yaml", "--profile", folder / "mini.yaml", "--json"]
    process = start(folder, *study, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert results(json.loads(out)) == results(first[0])
    assert "warning: MLflow at http://127.0.0.1:9 cannot be used" in err
    assert "--sync" in err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_killed_at_random_moments_ends_with_the_same_table_and_repeats_no_finished_stage(folder, first):
    dice = random.Random(20261123)
    study = ["run", folder / "mini-study.yaml", "--profile", folder / "mini.yaml", "--json"]
    kills = 0
    while kills < 10:
        process = start(folder, *study, home="killed")
        time.sleep(dice.uniform(4, 16))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    rows, _ = run(folder, home="killed")
    assert kills > 0
    assert results(rows) == results(first[0])
    logs = "".join(path.read_text() for path in (folder / "killed/logs").glob("*mini-study*.log"))
    finished = [line.split("finished ")[1] for line in logs.splitlines() if "finished " in line]
    assert len(finished) == len(set(finished))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stage_that_is_asked_for_again_is_computed_once_in_all_looks_of_a_run(tmp_path):
    write_profile(tmp_path)
    write_study(tmp_path, [{"method": "fft"}, {"method": "magnitude"}], contrasts={"primary": ["magnitude - fft"]})
    run(tmp_path, "--replicates", "4")  # so that what a later look adds is cached too
    _, err = run(tmp_path, "--until", "decided", "--replicates", "4", "--rerun", "fine-tune")
    assert "undecided with 3 fine-tunings" in err, "else there is one look"
    again = [label for label in computed(err) if label.startswith("fine-tune")]
    assert sorted(again) == ["fine-tune sums", *(f"fine-tune sums replicate={index}" for index in (1, 2, 3))]


def test_the_flow_of_one_chain_offers_every_method_and_refuses_another():
    from prefect.exceptions import ParameterTypeError

    from pipelines.flows import mft_pipeline

    assert mft_pipeline.parameters.properties["method"]["enum"] == list(METHODS)
    with pytest.raises(ParameterTypeError, match="Input should be 'base', 'fft'"):
        mft_pipeline.validate_parameters({"method": "rewnd"})

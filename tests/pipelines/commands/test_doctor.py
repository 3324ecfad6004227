"""`mft doctor`: what is there is found, what is missing is named with what to do, and nothing ends in a traceback."""

import os
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import httpx

from mft_core.store.artifacts import ArtifactStore
from pipelines.cli import main
from pipelines.commands import doctor, doctor_hub
from pipelines.config import resolve
from pipelines.config.profile import load_profile
from pipelines.config.setup import BenchmarkSpec, ModelSpec
from pipelines.config.yaml_to_setups import setups
from tests.support.mini import write_profile


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with a home of its own, an empty hub cache, no token and no way to the hub."""
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "mft"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    resolve._commit.cache_clear()


def study_of(name):
    """The study that the doctor plans of a profile, and the profile."""
    profile = load_profile(name)
    return doctor.study_of(profile), profile


def by_name(findings):
    return {finding.what: finding for finding in findings}


def answering(error):
    """Make the stand-in for the hub's check of access rights: it raises the error, or lets everyone in."""

    def auth_check(self, name, *, repo_type):
        if error is not None:
            raise error("no", response=httpx.Response(403, request=httpx.Request("GET", "https://hub.example")))

    return auth_check


def test_a_complete_machine_gets_a_clean_bill_and_exit_code_0(tmp_path, monkeypatch, capsys):
    profile = write_profile(tmp_path / "profile")
    monkeypatch.setattr(sys, "argv", ["mft", "doctor", "--profile", str(profile)])
    with pytest.raises(SystemExit) as exit_:
        main()
    out = capsys.readouterr().out
    assert exit_.value.code == 0, out
    assert "MISSING" not in out
    for what in (
        "packages",
        "MFT_HOME",
        "model",
        "sums.jsonl",
        "disk",
        "memory of",
        "benchmark mini_sums",
        "port",
    ):
        assert what in out


def test_the_shipped_profile_tiny_lacks_nothing():
    assert [finding for finding in doctor.examine("tiny") if not finding.ok] == []


def test_a_missing_local_model_and_data_file_are_named(tmp_path):
    profile = write_profile(tmp_path / "profile")
    shutil.rmtree(tmp_path / "profile" / "model")
    (tmp_path / "profile" / "data" / "sums.jsonl").unlink()
    findings = by_name(doctor.examine(str(profile)))
    assert not findings["data sums.jsonl"].ok
    assert any(not finding.ok for what, finding in findings.items() if what.startswith("model"))
    assert any("memory" in what and not finding.ok for what, finding in findings.items())


def test_an_unwritable_home_is_said(monkeypatch, tmp_path):
    profile = write_profile(tmp_path / "profile")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "file" / "mft"))
    finding = by_name(doctor.examine(str(profile)))["MFT_HOME"]
    assert not finding.ok
    assert str(tmp_path / "file" / "mft") in finding.detail


def test_what_a_run_would_refuse_is_found_with_all_else(tmp_path):
    profile = write_profile(tmp_path / "profile")
    rows = tmp_path / "profile" / "data" / "sums.jsonl"
    rows.write_text(rows.read_text() + "no JSON\n")
    items = tmp_path / "profile" / "benchmarks" / "sums.jsonl"
    items.write_text('{"question": "1 + 1 ="}\n')
    findings = by_name(doctor.examine(str(profile)))
    assert "line 61: not JSON" in findings["training rows"].detail
    assert "answer" in findings["benchmark mini_sums"].detail
    assert not findings["training rows"].ok
    assert not findings["benchmark mini_sums"].ok
    assert findings["weights"].ok


def test_a_package_of_a_forbidden_version_is_named_with_what_is_needed(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.99" if name == "fastapi" else real(name))
    finding = doctor._packages()
    assert not finding.ok
    assert "fastapi 0.99" in finding.detail
    assert "<0.151" in finding.detail


def test_another_version_than_the_tested_one_is_said_but_no_obstacle(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == "safetensors" else real(name))
    finding = doctor._packages()
    assert finding.ok
    assert "safetensors 99.0 (tested: " in finding.detail


def test_too_little_disk_is_said_with_the_number_needed(monkeypatch, tmp_path):
    profile = write_profile(tmp_path / "profile")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    finding = by_name(doctor.examine(str(profile)))["disk"]
    assert not finding.ok
    assert "the plan needs about 0.01 GB, 0.00 GB are free" in finding.detail


def memory_of_llama(monkeypatch, device, size):
    """What is found of memory for the profile of LLaMA2-7B, whose geometry ships with it, on a device of some bytes."""
    monkeypatch.setattr(doctor, "_device", lambda: (device, size))
    study, profile = study_of("llama2-7b")
    return by_name(doctor._planned(study, profile, ArtifactStore.from_environment()))


def test_a_7b_model_does_not_fit_a_small_cpu_machine(monkeypatch):
    findings = memory_of_llama(monkeypatch, "cpu", 25 * 10**9)
    assert not findings["memory of cpu"].ok
    assert "(by fine-tune), 25 GB there" in findings["memory of cpu"].detail
    assert not findings["GPU"].ok
    assert "6,738 million weights" in findings["model size"].detail


def test_a_7b_model_fits_a_gpu_of_300_gb(monkeypatch):
    findings = memory_of_llama(monkeypatch, "NVIDIA B300", 300 * 10**9)
    assert findings["memory of NVIDIA B300"].ok
    assert "GPU" not in findings


def test_without_the_hub_everything_of_the_paper_profile_that_is_not_cached_is_missing():
    study, profile = study_of("llama2-7b")
    domains = [setup for setup, _ in setups(study, profile, {})]
    findings = by_name(doctor_hub.model_and_data(domains))
    assert len(findings) == 1 + 1 + 15  # the hub, the model, the data sets
    assert not any(finding.ok for finding in findings.values())
    assert "No token" in findings["model meta-llama/Llama-2-7b-hf"].detail


@pytest.mark.parametrize(
    ("error", "ok", "words"),
    [
        (None, True, "to be had from the hub"),
        (GatedRepoError, False, "gated: ask for access at https://huggingface.co/meta-llama/Llama-2-7b-hf. No token"),
        (RepositoryNotFoundError, False, "no such model, or it is private"),
    ],
)
def test_access_to_a_gated_model_is_asked_of_the_hub(monkeypatch, error, ok, words):
    monkeypatch.setattr(HfApi, "auth_check", answering(error))
    finding = doctor_hub._model(ModelSpec(path="meta-llama/Llama-2-7b-hf"), online=True)
    assert finding.ok is ok
    assert words in finding.detail


def test_a_model_in_the_local_cache_counts_only_with_its_weights(tmp_path):
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    assert not doctor_hub._model(ModelSpec(path="a/b"), online=False).ok
    (snapshot / "model.safetensors").touch()
    assert doctor_hub._model(ModelSpec(path="a/b"), online=False).ok


def test_a_hub_that_does_not_answer_is_a_finding(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    finding = doctor_hub.hub_finding()
    assert not finding.ok
    assert "http://127.0.0.1:9 does not answer" in finding.detail


def leaf(tmp_path, code="", **changes):
    (tmp_path / "task").mkdir(exist_ok=True)
    (tmp_path / "task" / "utils.py").write_text(code)
    cfg = {"metric_list": [{"metric": "acc"}], "filter_list": [{"name": "strict"}], **changes}
    return SimpleNamespace(name="t", cfg=cfg, yaml_path=tmp_path / "task" / "t.yaml")


@pytest.mark.parametrize(
    ("bench", "words"),
    [
        ({"metric": "accuracy"}, "unknown metric of task 't' 'accuracy'"),
        ({"metric": "acc", "filter": "lax"}, "unknown filter of task 't' 'lax'"),
    ],
)
def test_a_metric_or_filter_that_the_task_has_not_is_named_with_the_valid_ones(tmp_path, bench, words):
    finding = doctor_hub.task_finding(BenchmarkSpec(name="b", task="t", **bench), [leaf(tmp_path)], {})
    assert not finding.ok
    assert words in finding.detail


def test_a_package_that_the_tasks_code_imports_and_is_not_installed_is_named(tmp_path):
    missing = leaf(tmp_path, "import json\nfrom no_such_package.part import thing\n")
    finding = doctor_hub.task_finding(BenchmarkSpec(name="b", task="t", metric="acc"), [missing], {})
    assert not finding.ok
    assert "needs no_such_package;" in finding.detail
    assert "[paper]" in finding.detail


def test_rules_that_build_on_lm_evals_need_its_packages(tmp_path):
    builds = leaf(tmp_path, "from lm_eval.tasks.minerva_math import utils\n")
    assert {"lm_eval", "antlr4", "math_verify", "sympy"} <= doctor_hub._imports([builds])


def test_a_task_that_lm_eval_has_not_is_named_with_the_nearest():
    finding = doctor_hub.task_finding(BenchmarkSpec(name="b", task="gsm8k_cott"), [], {"gsm8k_cot": None})
    assert not finding.ok
    assert "Did you mean 'gsm8k_cot'?" in finding.detail


def test_a_port_in_use_is_said_and_no_obstacle():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        taken = doctor._port(port, "the Prefect server", ArtifactStore.from_environment())
    assert taken.ok
    assert "taken" in taken.detail
    assert "free" in doctor._port(port, "the Prefect server", ArtifactStore.from_environment()).detail


@pytest.mark.slow
def test_the_command_says_what_an_offline_machine_lacks_for_llama2_7b_without_a_traceback(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "MFT_HOME": str(tmp_path / "mft")}
    command = [str(Path(sys.executable).parent / "mft"), "doctor", "--profile", "llama2-7b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stdout.splitlines()
    for words in (
        "MISSING  hub",
        "MISSING  model meta-llama/Llama-2-7b-hf",
        "MISSING  data KKHYA/metamath_converted",
        "MISSING  items of math: EleutherAI/hendrycks_math",
    ):
        assert any(line.startswith(words) for line in lines), words
    for name in ("gsm8k", "math", "humaneval", "humaneval-plus", "ifeval"):
        assert any(f"benchmark {name}: lm-eval task" in line for line in lines), name

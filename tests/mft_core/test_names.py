"""Names of files that files of others give: within their folder, or refused before anything is read or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mft_core.checkpoints.files import WeightFiles, read_config
from mft_core.errors import ConfigError
from mft_core.evaluation.benchmarks import definitions
from mft_core.masks.mask_file import save_mask
from mft_core.masks.masked_sites import MaskedSite
from mft_core.masks.merge import merge
from mft_core.names import inside, printable, without_secrets, without_user
from mft_core.store import manifests
from tests.mft_core.masks.test_mask_file import make_small_mask
from tests.support.tiny import make_model, save_checkpoint

ELSEWHERE = ["/etc/passwd", "../x", "a/../../x", "", "a\\b", "a\nb", None, 3, ["x"]]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_that_leads_elsewhere_is_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the index: .* is no name of a file within"):
        inside(tmp_path, name, "the index")


def test_a_name_within_the_folder_is_its_path(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b..c.json", "x") == tmp_path / "a" / "b..c.json"


def test_a_merge_writes_no_file_that_an_index_names_elsewhere(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    save_mask(make_small_mask(make_model(), 0.2), tmp_path / "mask")
    outside = tmp_path / "outside.safetensors"
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, outside, metadata={"format": "pt"})
    (base / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, str(outside))}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    before = outside.read_bytes()
    with pytest.raises(ConfigError, match=r"weight_map of model\.safetensors\.index\.json"):
        merge(base, tmp_path / "mask", tmp_path / "out")
    assert outside.read_bytes() == before
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="weight_map"):
        read_config(base)  # so that transformers reads nothing there either


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "{"])
def test_what_is_no_index_is_refused(content: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    (base / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match="is no index of weights"):
        WeightFiles(base)


def test_a_manifest_that_lists_files_elsewhere_is_no_manifest(tmp_path: Path) -> None:
    manifest = manifests.seal(
        {"stage": "s", "version": 1, "key": "k", "recipe": {}, "inputs": {}, "summary": {}, "provenance": {},
         "files": {"../other": {"size": 1, "sha256": "0"}}}
    )  # fmt: skip
    (tmp_path / manifests.MANIFEST).write_text(json.dumps(manifest))
    assert manifests.read(tmp_path) is None


def test_a_benchmark_names_data_in_its_own_folder_only(tmp_path: Path) -> None:
    definition = {"task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "/etc/passwd"}}}
    (tmp_path / "t.yaml").write_text(json.dumps(definition))
    with pytest.raises(ConfigError, match="data_files: '/etc/passwd' is no name of a file within"):
        print(definitions(tmp_path, "t")[0].data_files)


def test_a_mask_whose_matrix_steers_the_terminal_is_refused() -> None:
    with pytest.raises(ValueError, match="is not that of a matrix"):
        MaskedSite(name="layers.0.\x1b[31mq", shape=(2, 2), zeros=1, base_dtype="float32", base_sha256="0" * 64)


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\n\tb \x1b[31m é \u202e") == "a\n\tb \ufffd[31m é \ufffd"


def test_no_text_names_a_password_of_an_address_or_a_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:p%40ssw0rd@host/db")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    told = without_secrets("sk-canary; p@ssw0rd; p%40ssw0rd; parallelism; http://you:other@host:1/x?y=1")
    assert told == "***; ***; ***; parallelism; http://you:***@host:1/x?y=1"
    assert without_user("http://you:other@host:1/x@y") == "http://host:1/x@y"
    assert without_user("sqlite:////home/me@work/m.db") == "sqlite:////home/me@work/m.db"

"""What a run would find out only after some compute is told before: the plan is looked at as the stages will see it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from mft_core.errors import ConfigError
from mft_core.store.sources import pinned
from pipelines.config import resolve
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.preflight import checked_plans
from tests.support.mini import row, write_profile, write_rows, write_study
from tests.support.tiny import make_model, make_tokenizer

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def profile(tmp_path):
    write_profile(tmp_path)
    write_study(tmp_path, [{"method": "base"}, {"method": "mft"}])
    return tmp_path / "mini.yaml"


def check(profile, *overrides):
    return checked_plans([load_study(str(profile.parent / "mini-study.yaml"))], load_profile(str(profile)), overrides)


def refused(profile, *overrides):
    with pytest.raises(ConfigError) as caught:
        check(profile, *overrides)
    assert not (profile.parent / "home" / "artifacts").exists()
    return str(caught.value)


def rows_of(profile, rows):
    return write_rows(profile.parent / "data" / "sums.jsonl", rows)


def long_row(number):
    return row(f"{number} " + "please " * 60, "7")


def test_a_sound_profile_passes(profile):
    plans, _ = check(profile)
    assert plans[0].to_compute


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_line_ids_and_sizes(profile):
    folder = profile.parent / "model"
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(folder)
    size = len(tokenizer) - 1
    message = refused(profile)
    assert f"line 1: token id {size} (<|end|>), and the model's embedding has {size} rows" in message


def test_a_token_beyond_the_embedding_that_no_row_has_is_no_fault(profile):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|unused|>"])
    tokenizer.save_pretrained(profile.parent / "model")
    check(profile)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_longer_than_the_models_positions_are_refused(profile, family):
    shutil.rmtree(profile.parent / "model")
    make_model(family, max_position_embeddings=24).save_pretrained(profile.parent / "model")
    make_tokenizer().save_pretrained(profile.parent / "model")
    rows_of(profile, [row(f"{n} + 0 =", str(n) * (20 if n == 30 else 1)) for n in range(60)])
    assert "line 31: " in refused(profile)
    assert "the model takes 24 positions" in refused(profile)
    check(profile, "data.max_length=24")


@pytest.mark.parametrize("device", ["mps", "cuda:99", "meta", "tpu"])
def test_a_device_that_is_not_there_is_refused(profile, device):
    assert f"device = {device}" in refused(profile, f"runtime.device={device}")


def test_a_cluster_and_devices_that_are_not_there_are_refused(profile):
    assert "runtime.cluster = nowhere.yaml: no such file" in refused(profile, "runtime.cluster=nowhere.yaml")
    assert "runtime.devices = 77: torch sees" in refused(profile, "runtime.devices=77")
    check(profile, "runtime.cluster=tcp://head:8786", "runtime.device=cuda:77")  # which its workers may have


def break_weights(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def break_settings(folder):
    (folder / "tokenizer_config.json").write_text("{")


def ask_for_code(folder):
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config | own))


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (break_weights, "model.safetensors is a Git LFS pointer"),
        (break_tokenizer, "its tokenizer cannot be read"),
        (break_settings, "its tokenizer cannot be read"),
        (ask_for_code, "config.json asks for code of its own"),
    ],
)
@pytest.mark.parametrize("method", ["base", "fft"])
def test_a_model_that_cannot_be_loaded_is_refused_whatever_the_study_does_with_it(profile, fault, expected, method):
    write_study(profile.parent, [{"method": method}])
    fault(profile.parent / "model")
    assert expected in refused(profile)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local hub cache that is all there is: the model of the profile as `someone/old`, with pickled weights only."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for function in (resolve._commit, resolve.hub_files, resolve._hub_file):
        function.cache_clear()
    repository = tmp_path / "hub" / "models--someone--old"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def test_a_hub_repository_with_pickled_weights_alone_is_taken_by_plan_and_stage_alike(profile, hub):
    shutil.copytree(profile.parent / "model", hub)
    torch.save(load_file(hub / "model.safetensors"), hub / "pytorch_model.bin")
    (hub / "model.safetensors").unlink()
    check(profile, "model.path=someone/old")
    assert (pinned("someone/old", COMMIT, "model").local_path() / "pytorch_model.bin").is_file()


def test_a_hub_repository_without_weights_is_refused(profile, hub):
    shutil.copytree(profile.parent / "model", hub)
    (hub / "model.safetensors").unlink()
    assert "someone/old: no weight files" in refused(profile, "model.path=someone/old")


def test_damaged_weights_in_the_hubs_cache_are_refused(profile, hub):
    shutil.copytree(profile.parent / "model", hub)
    break_weights(hub)
    assert "Git LFS pointer" in refused(profile, "model.path=someone/old")


def test_data_of_which_most_rows_are_too_long_are_refused_and_the_share_is_the_users(profile):
    rows_of(profile, [long_row(n) for n in range(38)] + [row("1 + 1 =", "2"), row("2 + 2 =", "4")])
    message = refused(profile, "data.validation_rows=0", *NO_VALIDATION)
    assert "about 95% of 40 rows are too long" in message
    assert "runtime.max_dropped = 0.5" in message
    check(profile, "data.validation_rows=0", "runtime.max_dropped=0.95", *NO_VALIDATION)


NO_VALIDATION = [f"{part}.{key}" for part in ("fine_tune", "mask.training") for key in ("validations=0", "keep=last")]


def test_more_validation_rows_than_there_are_rows_are_refused(profile):
    rows_of(profile, [row(f"{n} + {n} =", str(2 * n)) for n in range(40)])
    assert "data.validation_rows = 40: there are 40 rows" in refused(profile, "data.validation_rows=40")
    check(profile, "data.validation_rows=39")


def test_the_share_that_may_be_dropped_is_in_no_key(profile):
    ids = [[step.node.id for step in check(profile, *more)[0][0].steps] for more in ([], ["runtime.max_dropped=0.9"])]
    assert ids[0] == ids[1]


def test_a_template_that_leaves_out_what_a_row_says_is_refused_with_the_line(profile):
    odd = row("3 + 4 =", "7")
    odd["messages"][1]["reasoning_content"] = "three and four"
    rows_of(profile, [*(row(f"{n} + 1 =", str(n + 1)) for n in range(3_000)), odd])
    message = refused(profile)
    assert "sums.jsonl line 3001" in message
    assert "does not show the reasoning_content" in message


def lay_out(profile, kind):
    """Write the rows otherwise, and return where they lie."""
    plain = profile.parent / "data" / "sums.jsonl"
    if kind == "gzip":
        path = plain.with_suffix(".jsonl.gz")
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif kind == "parquet":
        path = plain.with_suffix(".parquet")
        datasets.Dataset.from_list([json.loads(line) for line in plain.read_text().splitlines()]).to_parquet(path)
    else:
        path = profile.parent / "folder"
        path.mkdir()
        shutil.copy(plain, path / "train.jsonl")
    return path


@pytest.mark.parametrize("kind", ["gzip", "parquet", "folder"])
def test_rows_in_other_forms_are_looked_through_and_known_by_their_content(profile, kind):
    path = lay_out(profile, kind)
    override = f"data.mixture=[{{path: {path}, rows: 60}}]"
    before = data_id(profile, override)
    assert "holds only 60" in refused(profile, f"data.mixture=[{{path: {path}, rows: 61}}]")
    if kind == "folder":
        rows_of(profile, [row("1 + 1 =", "3")] * 60).replace(path / "train.jsonl")
        assert data_id(profile, override) != before


def data_id(profile, override):
    plan = check(profile, override)[0][0]
    return next(step.node.id for step in plan.steps if step.node.stage == "prepare-data")


def test_split_and_configuration_are_in_the_key_and_their_defaults_are_not(profile):
    folder = profile.parent / "folder"
    folder.mkdir()
    shutil.copy(profile.parent / "data" / "sums.jsonl", folder / "train.jsonl")
    shutil.copy(profile.parent / "data" / "sums.jsonl", folder / "test.jsonl")

    def key(more):
        return data_id(profile, f"data.mixture=[{{path: {folder}{more}}}]")

    assert key("") == key(", split: train") != key(", split: test")
    assert "no split 'dev'" in refused(profile, f"data.mixture=[{{path: {folder}, split: dev}}]")


def unreadable(path):
    """Put in place of a file one that is there and cannot be read, not by root either."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that nobody can read")
@pytest.mark.parametrize(
    "name", ["data/sums.jsonl", "model/config.json", "model/tokenizer.json", "benchmarks/sums.jsonl"]
)
def test_a_file_that_cannot_be_read_is_named(profile, name):
    unreadable(profile.parent / name)
    assert "cannot be read" in refused(profile)


@pytest.mark.skipif(os.name != "posix", reason="links of files")
def test_a_link_to_nowhere_and_a_folder_in_place_of_a_file_are_refused(profile):
    (profile.parent / "dangling.jsonl").symlink_to("nowhere.jsonl")
    assert "no such file" in refused(profile, f"data.mixture=[{{path: {profile.parent / 'dangling.jsonl'}}}]")
    (profile.parent / "empty.jsonl").mkdir()
    assert "cannot be loaded" in refused(profile, f"data.mixture=[{{path: {profile.parent / 'empty.jsonl'}}}]")


def test_a_long_file_of_rows_that_do_not_fit_is_refused_without_encoding_all_of_it(profile, monkeypatch, capsys):
    encoded = []
    encode = checked_chat()._encode_batch

    def counting(batch, *more):
        encoded.append(len(batch))
        return encode(batch, *more)

    monkeypatch.setattr(checked_chat(), "_encode_batch", counting)
    path = profile.parent / "data" / "sums.jsonl"
    line = json.dumps(long_row(0)) + "\n"
    path.write_text(line * 100_000)
    assert "every one of the" in refused(profile, *NO_VALIDATION, "data.validation_rows=0")
    assert 1_024 <= sum(encoded) < 2_048
    assert "checking sums.jsonl: 100,000 rows" in capsys.readouterr().err


def checked_chat():
    from mft_core.data import assistant_tokens

    return assistant_tokens


def test_a_study_of_kept_checkpoints_passes_the_checks_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))
    plans, _ = checked_plans([load_study("trajectory")], load_profile("tiny"))
    assert any(step.node.stage == "pick-checkpoint" for step in plans[0].steps)

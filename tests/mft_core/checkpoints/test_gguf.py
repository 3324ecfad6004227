"""GGUF files become ordinary checkpoints that say what their weights were dequantised from."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from mft_core.checkpoints.files import load_model, save_model
from mft_core.checkpoints.gguf import dequantised, import_gguf
from mft_core.errors import ConfigError
from tests.support.tiny import TULU, make_model, make_tokenizer


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    from tests.support.gguf_file import write_gguf

    folder = tmp_path_factory.mktemp("gguf")
    given = write_gguf(folder / "tiny.gguf", make_model())
    return folder / "out", given, import_gguf(folder / "tiny.gguf", folder / "out")


def test_an_imported_checkpoint_has_the_values_of_the_files_blocks(imported):
    directory, given, _ = imported
    found = load_file(directory / "model.safetensors")
    assert set(given) == set(found)
    for name, values in given.items():
        assert (found[name].numpy() == values).all(), name


def test_what_a_checkpoint_was_dequantised_from_stays_with_what_is_trained_from_it(imported, tmp_path):
    directory, _, told = imported
    assert "dequantised from Q4_1" in told
    assert "exact zeros" in told
    model = load_model(directory, torch.float32, torch.device("cpu"))
    save_model(model, tmp_path / "trained", torch.float32, directory)
    for folder in (directory, tmp_path / "trained"):
        assert dequantised(json.loads((folder / "config.json").read_text())) == told


def test_an_imported_checkpoint_has_the_files_tokenizer_and_chat_template(imported):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(imported[0])
    text = "The sum of seven and five is twelve.</s>"
    assert tokenizer(text).input_ids == make_tokenizer()(text).input_ids
    assert tokenizer.chat_template == TULU.read_text()
    assert tokenizer.eos_token_id == 2


def test_a_file_that_was_never_quantised_is_not_called_dequantised(tmp_path):
    from tests.support.gguf_file import write_gguf

    write_gguf(tmp_path / "plain.gguf", make_model(), "F16")
    assert "not quantised" in import_gguf(tmp_path / "plain.gguf", tmp_path / "out")
    assert dequantised(json.loads((tmp_path / "out" / "config.json").read_text())) is None


@pytest.mark.parametrize(
    ("content", "words"), [(b"no model", "no GGUF file"), (b"GGUF\x03\x00\x00\x00cut", "damaged"), (None, "no such")]
)
def test_what_is_no_whole_gguf_file_is_refused_and_nothing_written(tmp_path, content, words):
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_pipe_is_not_waited_for_and_an_out_that_exists_is_told_first(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="no such file"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        import_gguf(tmp_path / "nowhere.gguf", tmp_path / "model.gguf")


def test_a_word_of_somebody_elses_is_not_told():
    assert dequantised({"dequantised_from": "Q4_1 | <b>better than all</b>"}) is None
    assert dequantised({}) is None

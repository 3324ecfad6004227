"""Checkpoints that cannot be what they say: told before compute, with file and remedy; and no code of theirs runs."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mft_core.checkpoints.files import check_weights, load_model, read_config
from mft_core.data.tokens import Limits
from mft_core.errors import ConfigError
from tests.support.tiny import make_tokenizer, save_checkpoint

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def checkpoint(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def edit(directory, name="config.json", **changes):
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(directory, **changes):
    weights = load_file(directory / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None},
              directory / "model.safetensors", {"format": "pt"})  # fmt: skip


def pickled(directory, content=None):
    path = directory / "model.safetensors"
    torch.save(content or load_file(path), directory / "pytorch_model.bin")
    path.unlink()


def cut(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5_000])


def untie(directory):
    rewrite(directory, **{"lm_head.weight": None})


def spoil(directory, number):
    name = "model.layers.2.mlp.up_proj.weight"
    weight = load_file(directory / "model.safetensors")[name]
    weight[0, 0] = number
    rewrite(directory, **{name: weight})


def in_8_bits(directory, dtype=torch.float8_e4m3fn):
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(directory, **{name: load_file(directory / "model.safetensors")[name].to(dtype)})


FAULTS = {
    "LFS pointer": (lambda d: (d / "model.safetensors").write_text(LFS), "model.safetensors is a Git LFS pointer"),
    "pickled LFS pointer": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "pytorch_model.bin").write_text(LFS)),
        "pytorch_model.bin is a Git LFS pointer",
    ),
    "not whole": (cut, "model.safetensors is damaged or not whole"),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors is damaged or not whole"),
    "a layer too few": (
        lambda d: edit(d, num_hidden_layers=5),
        "weights are missing or misshapen, e.g. model.layers.4",
    ),
    "a layer too many": (lambda d: edit(d, num_hidden_layers=3), "says 3 layers, and there are weights of more"),
    "other vocabulary": (lambda d: edit(d, vocab_size=700), "missing or misshapen"),
    "no head": (untie, "e.g. lm_head.weight"),
    "not a number": (
        lambda d: spoil(d, float("nan")),
        "model.layers.2.mlp.up_proj.weight in model.safetensors has num",
    ),
    "infinite": (lambda d: spoil(d, float("-inf")), "not finite"),
    "not a number, pickled": (
        lambda d: (spoil(d, float("nan")), pickled(d)),
        "model.layers.2.mlp.up_proj.weight in pytorch_model.bin has num",
    ),
    "8 bits": (in_8_bits, "quantised"),
    "8 bits of whole numbers": (lambda d: in_8_bits(d, torch.int8), "is torch.int8, so quantised"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_those_of_the_model_are_refused_with_the_file_or_the_weight(checkpoint, fault):
    make, expected = FAULTS[fault]
    make(checkpoint)
    with pytest.raises(ConfigError) as caught:
        check_weights(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert expected in str(caught.value)
    if not any(word in fault for word in ("not a number", "infinite", "8 bits")):
        with pytest.raises(ConfigError, match=r"^model = "):
            load_model(checkpoint, torch.float32, torch.device("cpu"))


def test_pickled_weights_are_read_as_plain_tensors(checkpoint):
    expected = load_file(checkpoint / "model.safetensors")
    pickled(checkpoint)
    check_weights(checkpoint)
    model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_not_run(checkpoint, tmp_path):
    pickled(checkpoint, {"model.norm.weight": Harmful(tmp_path / "ran")})
    for look in (check_weights, lambda path: load_model(path, torch.float32, torch.device("cpu"))):
        with pytest.raises(ConfigError, match="plain tensors only"):
            look(checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model_type", ["own", "llama"])
def test_a_model_that_needs_code_of_its_own_is_refused_and_none_is_run(checkpoint, tmp_path, monkeypatch, model_type):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who would be asked says yes
    (checkpoint / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit(checkpoint, model_type=model_type, architectures=["OwnForCausalLM"], auto_map=auto_map)
    with pytest.raises(ConfigError, match=r"config\.json asks for code of its own .*own\.OwnForCausalLM"):
        read_config(checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("architectures", [None, 5, "LlamaForCausalLM", []])
def test_a_config_that_names_no_class_is_refused_for_that_and_its_family_is_not_called_no_decoder(
    checkpoint, architectures
):
    edit(checkpoint, architectures=architectures)
    with pytest.raises(ConfigError, match=r"config\.json names no class \(architectures\)"):
        read_config(checkpoint)


def test_a_config_whose_class_is_no_text_is_refused(checkpoint):
    edit(checkpoint, architectures=[5, 0.5])
    with pytest.raises(ConfigError, match=r"5, 0\.5 is not a decoder"):
        read_config(checkpoint)


@pytest.mark.parametrize("content", ["{", "[1]", '{"cache_implementation": "x"}'])
def test_settings_of_generation_that_cannot_be_read_are_refused(checkpoint, content):
    (checkpoint / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read"):
        read_config(checkpoint)


def test_code_that_a_known_family_carries_besides_is_not_run_and_not_needed(checkpoint, tmp_path):
    (checkpoint / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    edit(checkpoint, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own"})
    check_weights(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_what_a_model_takes_is_read_from_its_configuration(checkpoint):
    assert Limits.of(read_config(checkpoint)) == Limits(len(make_tokenizer()), 512)

"""A decoder's sizes: those of the weights where they are there, and close to them by config.json alone."""

import json
import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mft_core.geometry import read_geometry
from mft_core.masks.sites import choose_sites, find_sites
from tests.support.tiny import make_model

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text",
            "olmo2", "phi3", "gpt_neox", "gpt2", "opt", "falcon")  # fmt: skip
ROUGH = {"falcon": 0.2, "opt": 0.03, "gpt2": 0.02}
"""by how much config.json alone is wrong: key heads that are shared, learned positions"""


def built(family, **changes):
    """Return the model on the meta device, and its config.json as `save_pretrained` writes it."""
    config = AutoConfig.for_model(family, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, json.loads(config.to_json_string(use_diff=True))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def masked(model, layers, modules="both"):
    parameters = dict(model.named_parameters())
    return sum(site.of(parameters).numel() for site in choose_sites(find_sites(model), layers, modules))


def told(geometry, layers, modules="both"):
    return sum(matrix.weights for matrix in geometry.masked(layers, modules))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoints_own_headers_say_its_weights_and_maskable_matrices_whatever_the_family(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    geometry = read_geometry(json.loads((tmp_path / "config.json").read_text()), tmp_path)
    assert geometry.weights == count(model)
    for modules in ("both", "attention", "mlp"):
        assert told(geometry, (1, 2), modules) == masked(model, (1, 2), modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_alone_is_close_before_the_weights_are_there(family):
    model, config = built(family, num_hidden_layers=4)
    geometry = read_geometry(config)
    assert geometry.weights == pytest.approx(count(model), rel=ROUGH.get(family, 0.001))
    assert told(geometry, (1, 2)) == pytest.approx(masked(model, (1, 2)), rel=ROUGH.get(family, 0.001))


def test_matrices_are_chosen_by_the_names_that_a_mask_takes(tmp_path):
    model = make_model("gpt2")
    model.save_pretrained(tmp_path)
    geometry = read_geometry(model.config.to_dict(), tmp_path)
    for modules in ("c_attn", "mlp.*", "attn.c_proj,c_fc"):
        assert told(geometry, (0, 3), modules) == masked(model, (0, 3), modules)


@pytest.mark.parametrize("damage", ["cut", "part", "gone"])
def test_weights_that_are_not_all_there_are_not_taken_for_the_model(damage, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    if damage == "cut":
        shards[0].write_bytes(shards[0].read_bytes()[:40])
    for shard in {"cut": [], "part": shards[len(shards) // 2 :], "gone": shards}[damage]:
        shard.unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    assert read_geometry(config, tmp_path) == read_geometry(config)
    assert read_geometry(config).weights == count(model)


def test_published_configurations_may_leave_out_what_their_family_has_by_default():
    model, config = built("gemma3_text", num_hidden_layers=2)
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        del config[key]
    assert read_geometry(config).weights == pytest.approx(count(model), rel=0.001)


def test_llama2_7b_has_its_published_size_and_four_layers_of_it_are_masked():
    geometry = read_geometry(built("llama")[1])
    assert geometry.weights == 6_738_415_616
    assert told(geometry, (4, 5, 6, 7)) == 809_500_672


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": -2},
        {"head_dim": 0},
        {"vocab_size": "many"},
        {"hidden_size": 0},
    ],
)
def test_sizes_that_are_none_stop_no_plan(change):
    _, config = built("llama", num_hidden_layers=4)
    assert len(read_geometry({**config, **change}).layers) == 4


def test_a_number_of_layers_that_no_model_has_is_none(tmp_path):
    _, config = built("llama", num_hidden_layers=4)
    assert read_geometry({**config, "num_hidden_layers": 10**9}).layers == ()
    for header in (b"[1]", b'{"a": {"shape": ["x"]}}', b'{"a": 5}', b"[" * 5000):
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        assert len(read_geometry(config, tmp_path).layers) == 4
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert len(read_geometry(config, tmp_path).layers) == 4

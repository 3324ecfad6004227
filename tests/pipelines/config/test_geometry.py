"""What config.json says of a model's matrices is what transformers builds and `mft_core.masks.sites` finds."""

import json
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mft_core.errors import ConfigError
from mft_core.masks.sites import choose_sites, find_sites
from pipelines.config.geometry import KNOWN, read_geometry

CHANGES = {
    "llama grouped, tied": ("llama", {"num_key_value_heads": 8, "tie_word_embeddings": True}),
    "mistral with wide heads": ("mistral", {"hidden_size": 5120, "head_dim": 128, "num_key_value_heads": 8}),
    "qwen2_moe with dense layers": ("qwen2_moe", {"mlp_only_layers": [0], "decoder_sparse_step": 2}),
    "falcon 40b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 8, "hidden_size": 2048, "num_attention_heads": 32},
    ),
    "falcon rw": ("falcon", {"multi_query": False, "alibi": True, "bias": True, "hidden_size": 2048,
                             "num_attention_heads": 32, "parallel_attn": False}),
    "opt 350m": ("opt", {"word_embed_proj_dim": 512, "hidden_size": 1024, "num_attention_heads": 16, "ffn_dim": 4096,
                         "do_layer_norm_before": False}),
    "gpt2 with inner": ("gpt2", {"n_inner": 2000}),
    "phi3 grouped": ("phi3", {"num_key_value_heads": 8, "hidden_size": 4096, "intermediate_size": 14336}),
}  # fmt: skip


def built(family, **changes):
    """Return the model on the meta device, and its config.json as `save_pretrained` writes it."""
    config = AutoConfig.for_model(family, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, json.loads(config.to_json_string(use_diff=True))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def by_path(model):
    parameters = dict(model.named_parameters())
    found = Counter()
    for site in find_sites(model):
        found[site.layer, site.path] += site.of(parameters).numel()
    return found


def told(geometry):
    return Counter(
        {(index, matrix.path): matrix.weights for index, layer in enumerate(geometry.layers) for matrix in layer}
    )


def check(model, config):
    geometry = read_geometry(config)
    assert told(geometry) == by_path(model)
    assert geometry.weights == pytest.approx(count(model), rel=0.001)
    assert geometry.largest >= max(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", sorted(KNOWN))
def test_weights_and_maskable_matrices_are_those_of_the_family(family):
    check(*built(family, num_hidden_layers=4))


@pytest.mark.parametrize("name", CHANGES)
def test_variants_within_a_family_are_told_apart(name):
    family, changes = CHANGES[name]
    check(*built(family, num_hidden_layers=4, **changes))


def test_published_configurations_may_leave_out_what_their_family_has_by_default():
    model, config = built("gemma3_text", num_hidden_layers=2)
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        del config[key]
    check(model, config)
    model, config = built("gpt2", num_hidden_layers=2)
    check(model, {key: value for key, value in config.items() if key != "tie_word_embeddings"})
    model, config = built("qwen3_moe", num_hidden_layers=2)
    check(model, {**config, "num_experts": config.pop("num_local_experts")})


def test_llama2_7b_has_its_published_size_and_four_layers_of_it_are_masked():
    model, config = built("llama")
    geometry = read_geometry(config)
    assert geometry.weights == count(model) == 6_738_415_616
    parameters = dict(model.named_parameters())
    sites = find_sites(model)
    layers = (4, 5, 6, 7)
    for modules in ("both", "attention", "mlp", "q_proj,k_proj", "mlp.*", "self_attn.o_proj,down_proj", "*_proj"):
        wanted = sum(site.of(parameters).numel() for site in choose_sites(sites, layers, modules))
        assert sum(matrix.weights for matrix in geometry.masked(layers, modules)) == wanted
    assert sum(matrix.weights for matrix in geometry.masked(layers, "both")) == 809_500_672


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt2", "falcon"])
@pytest.mark.parametrize("modules", ["both", "attention", "mlp", "c_proj", "*expert*", "mlp.experts.down_proj"])
def test_modules_mean_the_same_matrices_as_in_a_mask(family, modules):
    model, config = built(family, num_hidden_layers=2)
    parameters = dict(model.named_parameters())
    matrices = read_geometry(config).masked((1,), modules)
    try:
        sites = choose_sites(find_sites(model), (1,), modules)
    except ConfigError:
        assert matrices == []  # nothing of that name, which the checks before compute refuse
        return
    assert sum(matrix.weights for matrix in matrices) == sum(site.of(parameters).numel() for site in sites)
    assert {matrix.path for matrix in matrices} == {site.path for site in sites}


def test_an_unknown_family_is_taken_for_a_llama():
    model, config = built("llama", num_hidden_layers=2)
    assert read_geometry({**config, "model_type": "new"}) == read_geometry(config)
    assert read_geometry({**config, "model_type": "new"}).weights == count(model)

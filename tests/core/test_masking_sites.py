from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from mft_core.errors import ConfigError
from mft_core.sites import choose_sites, find_sites, n_layers
from tests.tiny import make_model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma"])
def test_seven_matrices_per_layer_are_found_under_their_parameter_names(family: str) -> None:
    model = make_model(family)
    sites = find_sites(model)
    assert [site.role for site in sites[:7]] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert len(sites) == 7 * 4
    assert n_layers(model) == 4
    assert sites[-1].name == "model.layers.3.mlp.down_proj.weight"
    assert {site.name for site in sites} <= {name for name, _ in model.named_parameters()}


def test_fused_and_renamed_families_are_rows_of_the_table() -> None:
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=50,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    assert sorted(site.role for site in find_sites(opt) if site.layer == 0) == ["down", "k", "o", "q", "up", "v"]
    roles = {site.role: site.kind for site in find_sites(neox) if site.layer == 1}
    assert roles == {"qkv": "attention", "o": "attention", "up": "mlp", "down": "mlp"}


def test_sites_are_chosen_by_layer_and_class() -> None:
    sites = find_sites(make_model())
    chosen = choose_sites(sites, (1, 3), "attention")
    assert {site.layer for site in chosen} == {1, 3}
    assert [site.role for site in chosen] == ["q", "k", "v", "o"] * 2
    assert len(choose_sites(sites, (0,), "mlp")) == 3
    assert len(choose_sites(sites, (0, 1), "both")) == 14


def test_a_class_without_a_matrix_in_the_layers_is_refused() -> None:
    only_attention = [site for site in find_sites(make_model()) if site.kind == "attention"]
    with pytest.raises(
        ConfigError, match="modules = 'both': no maskable layer matched: no known mlp matrix in layers 2-3"
    ):
        choose_sites(only_attention, (2, 3), "both")


def test_a_model_without_known_matrices_is_refused() -> None:
    model = make_model()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                delattr(parent, name)
                setattr(parent, f"strange_{name}", child)
    with pytest.raises(ConfigError, match="no maskable layer matched; known matrix names are q_proj"):
        find_sites(model)


def test_tied_sites_are_refused() -> None:
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight is tied"):
        find_sites(model)


def test_quantised_weights_are_refused() -> None:
    model = make_model()
    quantised = nn.Linear(32, 32, bias=False)
    quantised.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    model.model.layers[2].self_attn.q_proj = quantised
    with pytest.raises(ConfigError, match=r"layers\.2\.self_attn\.q_proj\.weight: Linear of torch\.int8"):
        find_sites(model)


def test_what_is_not_a_decoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear is not a decoder"):
        find_sites(nn.Linear(2, 2))
    encoder = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(ConfigError, match="no maskable layer matched"):
        find_sites(encoder)

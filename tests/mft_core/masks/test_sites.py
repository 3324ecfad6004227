from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from mft_core.errors import ConfigError
from mft_core.masks.sites import choose_sites, find_sites, n_layers
from tests.support.tiny import make_model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma"])
def test_seven_matrices_per_layer_are_found_under_their_parameter_names(family: str) -> None:
    model = make_model(family)
    sites = find_sites(model)
    assert [site.role for site in sites[:7]] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert len(sites) == 7 * 4
    assert n_layers(model) == 4
    assert sites[-1].name == "model.layers.3.mlp.down_proj.weight"
    assert {site.name for site in sites} <= {name for name, _ in model.named_parameters()}


_ATTENTION = [
    ("self_attn.q_proj", "q"),
    ("self_attn.k_proj", "k"),
    ("self_attn.v_proj", "v"),
    ("self_attn.o_proj", "o"),
]
_GATED = [("mlp.gate_proj", "gate"), ("mlp.up_proj", "up"), ("mlp.down_proj", "down")]
_EXPERTS = [
    *(("mlp.experts.gate_up_proj", "expert-gate-up") for _ in range(4)),
    *(("mlp.experts.down_proj", "expert-down") for _ in range(4)),
]


@pytest.mark.parametrize(
    ("family", "matrices"),
    [
        ("qwen3", [*_ATTENTION, *_GATED]),
        ("gemma2", [*_ATTENTION, *_GATED]),
        ("gemma3", [*_ATTENTION, *_GATED]),
        ("olmo2", [*_ATTENTION, *_GATED]),
        (
            "phi3",
            [
                ("self_attn.o_proj", "o"),
                ("self_attn.qkv_proj", "qkv"),
                ("mlp.gate_up_proj", "gate-up"),
                ("mlp.down_proj", "down"),
            ],
        ),
        (
            "gpt_neox",
            [
                ("attention.query_key_value", "qkv"),
                ("attention.dense", "o"),
                ("mlp.dense_h_to_4h", "up"),
                ("mlp.dense_4h_to_h", "down"),
            ],
        ),
        ("gpt2", [("attn.c_attn", "qkv"), ("attn.c_proj", "o"), ("mlp.c_fc", "up"), ("mlp.c_proj", "down")]),
        (
            "opt",
            [
                ("self_attn.k_proj", "k"),
                ("self_attn.v_proj", "v"),
                ("self_attn.q_proj", "q"),
                ("self_attn.out_proj", "o"),
                ("fc1", "up"),
                ("fc2", "down"),
            ],
        ),
        (
            "falcon",
            [
                ("self_attention.query_key_value", "qkv"),
                ("self_attention.dense", "o"),
                ("mlp.dense_h_to_4h", "up"),
                ("mlp.dense_4h_to_h", "down"),
            ],
        ),
        ("mixtral", [*_ATTENTION, *_EXPERTS]),
        ("qwen3_moe", [*_ATTENTION, *_EXPERTS]),
        (
            "qwen2_moe",
            [
                *_ATTENTION,
                *_EXPERTS,
                ("mlp.shared_expert.gate_proj", "gate"),
                ("mlp.shared_expert.up_proj", "up"),
                ("mlp.shared_expert.down_proj", "down"),
            ],
        ),
    ],
)
def test_a_layer_of_each_family_has_these_matrices_and_no_others(family: str, matrices: list[tuple[str, str]]) -> None:
    model = make_model(family)
    sites = [site for site in find_sites(model) if site.layer == 1]
    assert [(site.path, site.role) for site in sites] == matrices
    attention = {"q", "k", "v", "o", "qkv"}
    assert all(site.kind == ("attention" if site.role in attention else "mlp") for site in sites)
    parameters = dict(model.named_parameters())
    assert len({site.name for site in sites}) == len(sites)
    assert all(site.of(parameters).ndim == 2 for site in sites)
    assert all(site.transposed == (family == "gpt2") for site in sites)


def test_only_the_language_decoder_of_a_multimodal_model_is_masked() -> None:
    model = make_model("gemma3")
    assert len(model.model.vision_tower.encoder.layers) == n_layers(model)
    assert {site.name.split(".layers.")[0] for site in find_sites(model)} == {"model.language_model"}


def test_a_dense_layer_among_layers_of_experts_has_its_own_matrices() -> None:
    sites = [site for site in find_sites(make_model("qwen2_moe")) if site.layer == 2]
    assert [(site.path, site.role) for site in sites] == [*_ATTENTION, *_GATED]


def test_each_expert_is_a_site_of_its_own() -> None:
    model = make_model("mixtral")
    parameter = "model.layers.1.mlp.experts.down_proj"
    sites = [site for site in find_sites(model) if site.parameter == parameter]
    assert [site.name for site in sites] == [f"{parameter}[{expert}]" for expert in range(4)]
    parameters = dict(model.named_parameters())
    for expert, site in enumerate(sites):
        assert torch.equal(site.of(parameters), parameters[parameter][expert])


def test_experts_stored_by_their_inputs_are_said_to_be() -> None:
    sites = [site for site in find_sites(make_model("gpt_oss")) if site.layer == 0]
    assert {site.role for site in sites if site.transposed} == {"expert-gate-up", "expert-down"}
    assert not any(site.transposed for site in sites if site.kind == "attention")


def test_modules_are_named_so_that_no_other_matrix_of_the_layer_is_meant() -> None:
    assert [site.module for site in find_sites(make_model("gpt2"))][:4] == [
        "c_attn",
        "attn.c_proj",
        "c_fc",
        "mlp.c_proj",
    ]
    modules = {site.module for site in find_sites(make_model("qwen2_moe")) if site.layer == 1}
    assert {"mlp.experts.down_proj", "mlp.shared_expert.down_proj", "q_proj"} <= modules


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3"])
def test_a_model_without_weights_has_the_same_sites(family: str) -> None:
    model = make_model(family)
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(model.config)
    assert find_sites(bare) == find_sites(model)


def test_sites_are_chosen_by_layer_and_class() -> None:
    sites = find_sites(make_model())
    chosen = choose_sites(sites, (1, 3), "attention")
    assert {site.layer for site in chosen} == {1, 3}
    assert [site.role for site in chosen] == ["q", "k", "v", "o"] * 2
    assert len(choose_sites(sites, (0,), "mlp")) == 3
    assert len(choose_sites(sites, (0, 1), "both")) == 14


@pytest.mark.parametrize(
    ("family", "modules", "roles"),
    [
        ("llama", "q_proj", ["q"]),
        ("llama", "self_attn.q_proj", ["q"]),
        ("llama", "up_proj,q_proj", ["q", "up"]),
        ("llama", " [qk]_proj , mlp.* ", ["q", "k", "gate", "up", "down"]),
        ("llama", "*_proj", ["q", "k", "v", "o", "gate", "up", "down"]),
        ("gpt2", "c_proj", ["o", "down"]),
        ("gpt2", "mlp.c_proj", ["down"]),
        ("opt", "fc?", ["up", "down"]),
        ("mixtral", "mlp.experts.down_proj", ["expert-down"] * 4),
        ("mixtral", "gate_up_proj,o_proj", ["o", *["expert-gate-up"] * 4]),
        ("qwen2_moe", "mlp.shared_expert.*", ["gate", "up", "down"]),
        ("qwen2_moe", "down_proj", [*["expert-down"] * 4, "down"]),
    ],
)
def test_matrices_are_chosen_by_patterns_of_their_names(family: str, modules: str, roles: list[str]) -> None:
    chosen = choose_sites(find_sites(make_model(family)), (0, 1), modules)
    assert [site.role for site in chosen if site.layer == 1] == roles
    assert {site.layer for site in chosen} == {0, 1}


def test_a_pattern_may_match_in_some_of_the_layers_only() -> None:
    sites = find_sites(make_model("qwen2_moe"))
    assert {site.layer for site in choose_sites(sites, (1, 2), "mlp.gate_proj,q_proj") if site.role == "gate"} == {2}


@pytest.mark.parametrize("modules", ["q_porj", "o_proj,q_porj", "mlp.q_proj", "Q_PROJ", "[q"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are(modules: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_sites(find_sites(make_model()), (1, 2), modules)
    said = str(caught.value)
    assert said.startswith(f"modules = '{modules}': no matrix in layers 1-2 matches '{modules.split(',')[-1]}'.")
    assert "Valid: attention, mlp, both, or patterns of self_attn.q_proj, self_attn.k_proj," in said
    assert ("Did you mean 'q_proj'?" in said) == ("q_porj" in modules)


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


class _HiddenType(nn.Parameter):
    """Quantised weights that pass for others: bitsandbytes' parameters, torchao's tensors."""


class _QuantLinear(nn.Module):
    """GPTQ's and AWQ's layers hold no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))


def _linear(weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(32, 32, bias=False)
    linear.weight = weight
    return linear


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (_linear(nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)), "Linear of torch.int8"),
        (_linear(nn.Parameter(torch.zeros(32, 32).to(torch.float8_e4m3fn))), "Linear of torch.float8_e4m3fn"),
        (_linear(_HiddenType(torch.zeros(32, 32))), "Linear of torch.float32"),
        (_QuantLinear(), "_QuantLinear"),
    ],
    ids=["int8", "fp8", "bitsandbytes", "gptq"],
)
def test_quantised_weights_are_refused(layer: nn.Module, said: str) -> None:
    model = make_model()
    model.model.layers[2].self_attn.q_proj = layer
    with pytest.raises(ConfigError) as caught:
        find_sites(model)
    assert str(caught.value).startswith(f"model.layers.2.self_attn.q_proj.weight: {said} is not a plain linear layer")


def test_quantised_experts_are_refused() -> None:
    model = make_model("mixtral")
    experts = model.model.layers[3].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn))
    with pytest.raises(ConfigError, match=r"layers\.3\.mlp\.experts\.down_proj: MixtralExperts of torch\.float8"):
        find_sites(model)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_a_quantised_model_is_refused_by_its_configuration(method: str) -> None:
    model = make_model()
    model.config.quantization_config = {"quant_method": method}
    with pytest.raises(ConfigError, match="LlamaForCausalLM is quantised; masks need the plain checkpoint"):
        find_sites(model)


def test_what_is_not_a_decoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear is not a decoder"):
        find_sites(nn.Linear(2, 2))
    encoder = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(ConfigError, match="no maskable layer matched"):
        find_sites(encoder)


def test_a_decoder_whose_layers_are_not_found_is_refused() -> None:
    model = make_model()
    model.config.num_hidden_layers = 5
    with pytest.raises(ConfigError, match="not a decoder that masks know: 0 lists of 5 layers, where exactly one is"):
        find_sites(model)
    model.config.num_hidden_layers = 4
    model.model.more_layers = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(ConfigError, match="2 lists of 4 layers"):
        find_sites(model)


def test_a_list_inside_the_layers_is_not_taken_for_them() -> None:
    model = make_model()
    for layer in model.model.layers:
        layer.parts = nn.ModuleList(nn.Identity() for _ in range(4))
    assert n_layers(model) == 4

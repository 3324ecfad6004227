"""Head layouts, checked on what the models compute: a change of one head's weights shows in that head alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mft_core.analysis.heads import CONCATENATED, GROUPED, find_heads
from mft_core.masks.sites import Site, find_sites
from tests.support.tiny import make_model

LAYER = 1
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "glm4", "opt", "gpt_oss")
FALCONS = {
    "multi-query": {"multi_query": True, "new_decoder_architecture": False},
    "one key per query": {"multi_query": False, "num_kv_heads": 4, "new_decoder_architecture": False},
    "grouped": {"new_decoder_architecture": True},
}
MODELS = {
    **{family: (family, {}) for family in (*PLAIN, *sorted(CONCATENATED), *sorted(GROUPED - {"falcon"}))},
    "gptj": ("gptj", {"rotary_dim": 8}),
    **{f"falcon, {kind}": ("falcon", changes) for kind, changes in FALCONS.items()},
}


def _attention(model: PreTrainedModel) -> dict[str, Site]:
    return {site.role: site for site in find_sites(model) if site.layer == LAYER and site.kind == "attention"}


def _heads_output(model: PreTrainedModel, output: Site) -> Tensor:
    """Return what goes into o: (tokens, heads * width)."""
    seen: list[Tensor] = []
    module = model.get_submodule(output.parameter.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
    ids = torch.arange(14).view(2, 7) * 13 % 300
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    hook.remove()
    return seen[0]


@torch.no_grad()
def _changed_heads(
    model: PreTrainedModel, site: Site, lines: np.ndarray, of_inputs: np.ndarray
) -> tuple[set[int], bool]:
    """Zero these outputs of a matrix; return the heads whose output changes, and whether it became zero."""
    output = _attention(model)["o"]
    before = _heads_output(model, output)
    weight = site.of(dict(model.named_parameters()))
    bias = dict(model.named_parameters()).get(site.parameter.replace(".weight", ".bias"))
    original = weight.clone()
    if bias is not None:
        bias.zero_()
        before = _heads_output(model, output)
    (weight.t() if site.transposed else weight)[torch.from_numpy(lines)] = 0
    after = _heads_output(model, output)
    weight.copy_(original)
    columns = ((after - before).abs() > 1e-7).any(0).numpy()
    heads = set(of_inputs[columns].tolist())
    zero = not bool(after[:, torch.from_numpy(np.isin(of_inputs, list(heads)))].any())
    return heads, zero


@pytest.mark.parametrize("name", MODELS)
def test_a_heads_weights_change_that_heads_output_alone(name: str) -> None:
    family, changes = MODELS[name]
    model = make_model(family, num_hidden_layers=2, initializer_range=0.5, **changes)
    layouts = find_heads(model)
    sites = _attention(model)
    queries = model.config.get_text_config(decoder=True).num_attention_heads
    of_inputs = layouts[sites["o"].name].heads["o"]
    assert layouts[sites["o"].name].axis == "inputs"
    found = {
        (projection, site): heads
        for site in sites.values()
        if site.role != "o"
        for projection, heads in layouts[site.name].heads.items()
    }
    assert {projection for projection, _ in found} == {"q", "k", "v"}
    for (projection, site), heads in found.items():
        count = int(heads.max()) + 1
        group = queries // count
        for head in range(count):
            changed, zero = _changed_heads(model, site, np.flatnonzero(heads == head), of_inputs)
            assert changed == set(range(head * group, (head + 1) * group)), (projection, head)
            assert zero == (projection == "v"), (projection, head)


def test_layouts_that_are_not_known_are_left_out() -> None:
    fused = make_model("codegen", num_hidden_layers=2)
    assert {site.role for site in find_sites(fused) if site.name in find_heads(fused)} == {"o"}
    latent = make_model("deepseek_v3")
    assert {site.role for site in find_sites(latent) if site.name in find_heads(latent)} == {"o"}

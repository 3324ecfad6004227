from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mft_core.errors import ConfigError
from mft_core.masks.mask_file import Mask, load_mask, make_mask, save_mask
from mft_core.masks.masked_sites import check_base
from mft_core.masks.merge import merge
from mft_core.masks.selection import Global, Rows, Scope, select
from mft_core.masks.sites import Site, choose_sites, find_sites
from tests.support.tiny import make_model


def make_small_mask(model: PreTrainedModel, sparsity: float = 0.21, layers: tuple[int, ...] = (1, 2)) -> Mask:
    """Return a magnitude mask of the model's attention and MLP matrices in these layers."""
    sites = choose_sites(find_sites(model), layers, "both")
    weights = dict(model.named_parameters())
    kept = {site.name: select(weights[site.name], sparsity) for site in sites}
    base = [(site.name, weights[site.name]) for site in sites]
    return make_mask(sites, kept, base, sparsity=sparsity, selector="magnitude", modules="both")


def make_tiny_mask(**settings: Any) -> Mask:
    """Return a mask at 40% of `tiny_weights`."""
    base = tiny_weights()
    settings = {"sparsity": 0.4, "selector": "magnitude", "modules": "both", **settings}
    kept = settings.pop("kept", None) or {site.name: select(weight, 0.4) for site, weight in base}
    weights = [(site.name, weight) for site, weight in base]
    return make_mask([site for site, _ in base], kept, weights, **settings)


def tiny_weights() -> list[tuple[Site, Tensor]]:
    """Return four matrices of odd sizes in layers 1 and 2, two of them experts in one parameter."""
    whole = "model.layers.2.mlp.experts.gate_up_proj"
    plain = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (1, 2)]
    sites = [Site(name, layer, "q", "attention", "q_proj", name) for layer, name in enumerate(plain, start=1)]
    sites += [Site(f"{whole}[{i}]", 2, "expert-gate-up", "mlp", "gate_up_proj", whole, i) for i in range(2)]
    shapes = [(3, 5), (7, 1), (3, 3), (3, 3)]
    return [
        (site, ((torch.arange(rows * columns) * 37 + i) % 101 - 50.0).view(rows, columns) / 64)
        for i, (site, (rows, columns)) in enumerate(zip(sites, shapes, strict=True))
    ]


def _masks_of(scores: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
    return dict(zip(scores, scope.masks(list(scores.values())), strict=True))


def _scores(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site.name: torch.rand(site.shape, generator=generator) for site in make_tiny_mask().config.sites}


def _earlier() -> list[tuple[str, Tensor]]:
    return [(site.name, weight / 2) for site, weight in tiny_weights()]


def make_global_mask() -> Mask:
    return make_tiny_mask(kept=_masks_of(_scores(), Global(0.4, 0.3)), scope="global", min_kept=0.3)


def make_threshold_mask() -> Mask:
    kept = {name: scores >= 0.25 for name, scores in _scores().items()}
    return make_tiny_mask(kept=kept, scope="global-threshold", selector="learned", thresholds={"mlp": 0.25})


def test_a_mask_survives_the_disk_and_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    mask = make_small_mask(make_model())
    save_mask(mask, tmp_path / "a")
    loaded = load_mask(tmp_path / "a")
    assert loaded.config == mask.config
    assert all(torch.equal(kept, mask.kept[name]) for name, kept in loaded.kept.items())
    save_mask(loaded, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_mask_file_takes_about_one_bit_per_weight(tmp_path: Path) -> None:
    mask = make_small_mask(make_model())
    save_mask(mask, tmp_path)
    assert (tmp_path / "mask.safetensors").stat().st_size * 8 <= 1.05 * mask.weights


def test_sizes_that_are_no_multiple_of_eight_survive(tmp_path: Path) -> None:
    model = make_model()
    sites = find_sites(model)[:2]
    kept = {site.name: select(torch.randn(3, 5), 0.4) for site in sites}
    base = [(site.name, torch.ones(3, 5)) for site in sites]
    mask = make_mask(sites, kept, base, sparsity=0.4, selector="random", modules="attention")
    save_mask(mask, tmp_path)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load_mask(tmp_path).kept.items())


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (dict(make_model(seed=1).named_parameters()), "the mask was made for other weights (sha256 differs)"),
        (
            dict(make_model().bfloat16().named_parameters()),
            "is bfloat16 (32, 32) here; the mask was made for float32 (32, 32)",
        ),
        ({}, "does not belong to this model, which has no weight named model.layers.1."),
    ],
)
def test_another_base_is_refused(weights: Mapping[str, Tensor], said: str) -> None:
    first = make_small_mask(make_model()).config.sites[0]
    with pytest.raises(ConfigError) as caught:
        check_base(first, weights.get(first.name))
    assert said in str(caught.value)


def _truncate(directory: Path) -> None:
    path = directory / "mask.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def _edit_bits(directory: Path, position: int, flipped: int) -> None:
    path = directory / "mask.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= flipped
    path.write_bytes(bytes(content))


def _flip_a_bit(directory: Path) -> None:
    _edit_bits(directory, -2, 0x80)


def _set_a_padding_bit(directory: Path) -> None:
    """As only a program could that also knows the digest."""
    _edit_bits(directory, -1, 0x01)
    bits = load_file(directory / "mask.safetensors")["kept"]
    _edit_config(directory, mask_sha256=hashlib.sha256(bits.data).hexdigest())


def _drop_a_byte(directory: Path) -> None:
    path = directory / "mask.safetensors"
    save_file({"kept": load_file(path)["kept"][:-1]}, path)


def _rename_the_tensor(directory: Path) -> None:
    path = directory / "mask.safetensors"
    save_file({"other": np.zeros(3, np.uint8)}, path)


def _add_a_tensor(directory: Path) -> None:
    path = directory / "mask.safetensors"
    save_file({**load_file(path), "more": np.zeros(3, np.uint8)}, path)


def _pickle_it(directory: Path) -> None:
    path = directory / "mask.safetensors"
    torch.save(torch.from_numpy(load_file(path)["kept"]), path)


def _edit_config(directory: Path, **changes: object) -> None:
    path = directory / "mask_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _claim_another_sparsity(directory: Path) -> None:
    _edit_config(directory, sparsity=0.5)


def _claim_no_number(directory: Path) -> None:
    _edit_config(directory, sparsity=float("nan"))


def _edit_first_site(directory: Path, **changes: object) -> None:
    first, *others = json.loads((directory / "mask_config.json").read_text())["sites"]
    _edit_config(directory, sites=[{**first, **changes}, *others])


def _claim_another_count(directory: Path) -> None:
    _edit_first_site(directory, zeros=7)
    _edit_config(directory, scope="combined")


def _claim_a_huge_shape(directory: Path) -> None:
    _edit_first_site(directory, shape=[10**9, 10**9], zeros=4 * 10**17)


def _claim_a_negative_shape(directory: Path) -> None:
    _edit_first_site(directory, shape=[-3, -5])


def _list_a_site_twice(directory: Path) -> None:
    sites = json.loads((directory / "mask_config.json").read_text())["sites"]
    _edit_config(directory, sites=[*sites, sites[0]])


def _claim_other_layers(directory: Path) -> None:
    _edit_config(directory, layers_to_transform=[0, 1])


def _claim_another_base(directory: Path) -> None:
    _edit_config(directory, base_digest="0" * 64)


def _add_a_key(directory: Path) -> None:
    _edit_config(directory, sparsty=1)


def _remove_the_config(directory: Path) -> None:
    (directory / "mask_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "no readable mask.safetensors"),
        (_flip_a_bit, "was altered (sha256 differs)"),
        (_drop_a_byte, "its sites need"),
        (_rename_the_tensor, "it holds ['other'], where 'kept' alone is expected"),
        (_add_a_tensor, "it holds ['kept', 'more'], where 'kept' alone is expected"),
        (_pickle_it, "no readable mask.safetensors"),
        (_set_a_padding_bit, "has bits behind its last weight"),
        (_claim_another_sparsity, "where sparsity 0.5 of 15 weights is 7"),
        (_claim_no_number, "sparsity = nan"),
        (_claim_another_count, "has 6 zeros (recorded: 7)"),
        (_claim_a_huge_shape, "its sites need [125000000000000005] of U8"),
        (_claim_a_negative_shape, "Input should be greater than 0"),
        (_list_a_site_twice, "a matrix is listed twice in sites"),
        (_claim_other_layers, "layers_to_transform are not the layers of the listed sites"),
        (_claim_another_base, "base_digest is not that of the listed sites"),
        (_add_a_key, "unknown key 'sparsty'. Did you mean 'sparsity'?"),
        (_remove_the_config, "no readable mask_config.json"),
    ],
)
def test_a_damaged_mask_is_refused_and_the_damage_named(
    damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    save_mask(make_tiny_mask(), tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_mask(tmp_path)
    assert said in str(caught.value)


def test_a_mask_made_in_memory_fits_the_checkpoint_saved_from_it(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    mask = make_small_mask(model)
    save_mask(mask, tmp_path / "mask")
    assert merge(tmp_path / "base", tmp_path / "mask", tmp_path / "out").config == mask.config


_GOLDEN = {
    "mask.safetensors": "90167730521e05be15c5f51e29947eecd2fd74dea77ae8e946e1566c57fc006a",
    "mask_config.json": "bfc1d0831b3f289a6641fe70664940dba3fd110913fccb2a70ca28e8a0c1cd65",
}


def test_the_bytes_of_a_local_mask_are_those_of_the_first_format(tmp_path: Path) -> None:
    save_mask(make_tiny_mask(), tmp_path)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert found == _GOLDEN


@pytest.mark.parametrize(
    "mask",
    [
        make_global_mask(),
        make_threshold_mask(),
        make_tiny_mask(kept=_masks_of(_scores(), Rows(0.4)), scope="rows", selector="wanda"),
        make_tiny_mask(selector="soft", modules="q_proj,mlp.experts.*"),
        make_tiny_mask(selector="movement"),
        make_tiny_mask(selector="rewind", rewound_to=_earlier()),
    ],
    ids=lambda mask: f"{mask.config.scope}-{mask.config.selector}",
)
def test_masks_of_every_scope_survive_the_disk(mask: Mask, tmp_path: Path) -> None:
    save_mask(mask, tmp_path)
    loaded = load_mask(tmp_path)
    assert loaded.config == mask.config
    assert all(torch.equal(kept, mask.kept[name]) for name, kept in loaded.kept.items())


def test_a_mask_that_rewinds_says_to_what_and_one_that_does_not_is_written_as_before(tmp_path: Path) -> None:
    rewound = make_tiny_mask(selector="rewind", rewound_to=_earlier())
    sites = json.loads(rewound.config.to_json())["sites"]
    halves = [hashlib.sha256(weight.numpy().tobytes()).hexdigest() for _, weight in _earlier()]
    assert [site["rewound_sha256"] for site in sites] == halves
    assert "rewound" not in make_tiny_mask().config.to_json()

    del sites[1]["rewound_sha256"]
    save_mask(rewound, tmp_path)
    altered = {**json.loads(rewound.config.to_json()), "sites": sites}
    (tmp_path / "mask_config.json").write_text(json.dumps(altered))
    with pytest.raises(ConfigError, match="some of the listed sites have rewound_sha256 and others have not"):
        load_mask(tmp_path)


def test_thresholds_give_the_share_that_they_give() -> None:
    mask = make_threshold_mask()
    assert mask.config.sparsity == 0.4
    assert mask.config.share == mask.zeros / mask.weights != 0.4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 0.2}, "has 6 zeros, where sparsity 0.2 of 15 weights is 3"),
        ({"scope": "global", "sparsity": 0.2}, "the mask has 14 zeros, where sparsity 0.2 of 40 weights is 8"),
        ({"scope": "global", "sparsity": 0.35, "min_kept": 0.7}, "keeps 9 of 15 weights, fewer than its min_kept"),
        ({"min_kept": 0.1}, "min_kept belongs to scope 'global'"),
        ({"thresholds": {"mlp": 0.1}}, "thresholds belong to scope 'global-threshold'"),
        ({"scope": "global-threshold", "thresholds": {"norm": 0.1}}, "Input should be 'attention' or 'mlp'"),
        ({"scope": "global-threshold", "thresholds": {"mlp": float("inf")}}, "finite"),
    ],
)
def test_a_mask_that_does_not_fit_its_settings_cannot_be_made(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make_tiny_mask(**settings)


def test_a_matrix_that_is_stored_transposed_has_a_mask_of_the_stored_shape() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2)).eval()
    mask = make_small_mask(model, 0.25, layers=(0,))
    assert mask.kept["transformer.h.0.mlp.c_fc.weight"].shape == (8, 32)

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mft_core.adapter import Mask, apply_mask, load_mask, make_mask, save_mask
from mft_core.errors import ConfigError
from mft_core.masking import select
from mft_core.sites import choose_sites, find_sites
from tests.tiny import make_model


def make_small_mask(model: PreTrainedModel, sparsity: float = 0.21, layers: tuple[int, ...] = (1, 2)) -> Mask:
    """Return a magnitude mask of the model's attention and MLP matrices in these layers."""
    sites = choose_sites(find_sites(model), layers, "both")
    weights = dict(model.named_parameters())
    kept = {site.name: select(weights[site.name], sparsity) for site in sites}
    base = [(site.name, weights[site.name]) for site in sites]
    return make_mask(sites, kept, base, sparsity=sparsity, selector="magnitude", modules="both")


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


def test_applying_a_mask_zeroes_exactly_its_entries() -> None:
    model, base = make_model(), make_model().state_dict()
    mask = make_small_mask(model)
    apply_mask(model, mask)
    for name, weight in model.state_dict().items():
        expected = base[name].masked_fill(~mask.kept[name], 0) if name in mask.kept else base[name]
        assert torch.equal(weight, expected)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (make_model(seed=1), "the mask was made for other weights (sha256 differs)"),
        (make_model().bfloat16(), "is bfloat16 (32, 32) here; the mask was made for float32 (32, 32)"),
        (torch.nn.Linear(2, 2), "does not belong to this model, which has no weight named model.layers.1."),
    ],
)
def test_another_base_is_refused_and_left_as_it_was(model: torch.nn.Module, said: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        apply_mask(model, make_small_mask(make_model()))
    assert said in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _truncate(directory: Path) -> None:
    path = directory / "mask.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def _flip_a_bit(directory: Path) -> None:
    path = directory / "mask.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def _drop_a_byte(directory: Path) -> None:
    path = directory / "mask.safetensors"
    save_file({"kept": load_file(path)["kept"][:-1]}, path)


def _rename_the_tensor(directory: Path) -> None:
    path = directory / "mask.safetensors"
    save_file({"other": np.zeros(3, np.uint8)}, path)


def _edit_config(directory: Path, **changes: object) -> None:
    path = directory / "mask_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _claim_another_sparsity(directory: Path) -> None:
    _edit_config(directory, sparsity=0.5)


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
        (_rename_the_tensor, "no readable mask.safetensors ('kept')"),
        (_claim_another_sparsity, "where sparsity 0.5 of 1024 weights is 512"),
        (_claim_another_base, "base_digest is not that of the listed sites"),
        (_add_a_key, "unknown key 'sparsty'. Did you mean 'sparsity'?"),
        (_remove_the_config, "no readable mask_config.json"),
    ],
)
def test_a_damaged_mask_is_refused_and_the_damage_named(damage: object, said: str, tmp_path: Path) -> None:
    save_mask(make_small_mask(make_model()), tmp_path)
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_mask(tmp_path)
    assert said in str(caught.value)


def test_a_mask_made_in_memory_fits_the_checkpoint_saved_from_it(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    apply_mask(AutoModelForCausalLM.from_pretrained(tmp_path), make_small_mask(model))

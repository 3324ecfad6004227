from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from mft_core.checkpoints.files import WeightFiles, load_model, read_config, save_model, skeleton
from mft_core.errors import ConfigError
from mft_core.masks.mask_file import load_mask, make_mask, save_mask
from mft_core.masks.merge import merge, unmerge
from mft_core.masks.selection import select
from mft_core.masks.sites import choose_sites, find_sites
from mft_core.recipes import MergeMask
from mft_core.stages import get_stage
from mft_core.store.sources import local_checkpoint
from tests.mft_core.masks.test_mask_file import make_small_mask
from tests.support.small_training import make_context
from tests.support.tiny import make_model, make_tokenizer, save_checkpoint

_CPU = torch.device("cpu")


def _merge(checkpoint: Path, tmp_path: Path, sparsity: float = 0.21) -> Path:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    save_mask(make_small_mask(model, sparsity), tmp_path / "mask")
    out = tmp_path / "out"
    out.mkdir()
    inputs = {"model": checkpoint, "mask": tmp_path / "mask"}
    get_stage("merge-mask").run(MergeMask(), inputs, out, make_context(tmp_path / "work"))
    return out / "model"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_merging_zeroes_the_exact_count_and_leaves_every_other_bit(
    dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "base"
    make_model().to(dtype).save_pretrained(checkpoint, max_shard_size=shard)
    make_tokenizer().save_pretrained(checkpoint)
    merged = _merge(checkpoint, tmp_path)
    assert sorted(path.name for path in merged.iterdir()) == sorted(path.name for path in checkpoint.iterdir())
    assert (len(list(merged.glob("*.safetensors"))) > 1) == (shard == "40KB")
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").state_dict()
    result = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").state_dict()
    masked = 0
    for name, tensor in result.items():
        assert tensor.dtype == dtype
        if torch.equal(_bits(tensor), _bits(base[name])):
            continue
        masked += 1
        differs = tensor != base[name]
        assert not tensor[differs].any()
        assert int((tensor == 0).sum()) - int((base[name] == 0).sum()) == int(differs.sum())
        assert int(differs.sum()) == int(0.21 * tensor.numel())
    assert masked == 14


def test_licence_and_model_card_go_with_what_is_trained_and_masked(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    terms = {"LICENSE": "as you like", "LICENSE.txt": "the same", "README.md": "# A model"}
    before = local_checkpoint("model", base).digest
    for name in ("LICENSE", "README.md"):
        (base / name).write_text(terms[name])
    assert local_checkpoint("model", base).digest == before, "they are no part of what the model is"
    (base / "LICENSE.txt").write_text(terms["LICENSE.txt"])
    save_model(make_model(), tmp_path / "trained", torch.float32, base)
    merged = _merge(tmp_path / "trained", tmp_path)
    for checkpoint in (tmp_path / "trained", merged):
        assert {name: (checkpoint / name).read_text() for name in terms} == terms


def test_merging_a_mask_of_nothing_changes_nothing(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base")
    merged = _merge(checkpoint, tmp_path, sparsity=0.0)
    for path in checkpoint.iterdir():
        assert (merged / path.name).read_bytes() == path.read_bytes()


def test_a_mask_of_another_checkpoint_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    save_mask(make_small_mask(make_model(seed=1)), tmp_path / "mask")
    checkpoint, out = save_checkpoint(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    inputs = {"model": checkpoint, "mask": tmp_path / "mask"}
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight: the mask was made for other"):
        get_stage("merge-mask").run(MergeMask(), inputs, out, make_context(tmp_path / "work"))
    assert list(out.iterdir()) == []


def test_models_that_are_no_decoders_are_refused(tmp_path: Path) -> None:
    small = {"vocab_size": 50, "num_hidden_layers": 1}
    BertForMaskedLM(BertConfig(hidden_size=16, num_attention_heads=2, **small)).save_pretrained(tmp_path / "bert")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    t5.save_pretrained(tmp_path / "t5")
    for name, kind in (("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration")):
        with pytest.raises(ConfigError, match=f"{kind} is not a decoder"):
            read_config(tmp_path / name)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no readable Hugging Face checkpoint"):
        load_model(tmp_path, torch.float32, _CPU)


def test_a_checkpoint_that_lacks_weights_is_refused_instead_of_filled_with_noise(tmp_path: Path) -> None:
    model = make_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.2.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"1 weights are missing or misshapen, e\.g\. model\.layers\.2\.mlp\.up_proj"):
        load_model(tmp_path, torch.float32, _CPU)


def test_dropout_asked_of_a_family_without_any_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_checkpoint(tmp_path)
    monkeypatch.setattr("mft_core.checkpoints.files._DROPOUTS", ("resid_pdrop",))
    with pytest.raises(ConfigError, match=r"training\.dropout = 0\.1: models of type 'llama' have none"):
        load_model(checkpoint, torch.float32, _CPU, dropout=0.1)


_ODD_BITS = {
    torch.float32: (0x80000000, 0x7FC01234, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0x00000001),
    torch.bfloat16: (0x8000, 0x7FC1, 0x7F81, 0xFFFF, 0x7F80, 0x0001),
    torch.float16: (0x8000, 0x7E01, 0x7C01, 0xFFFF, 0x7C00, 0x0001),
}
"""-0.0, a NaN with a payload, a signalling NaN, the negative NaN of all ones, infinity, the least subnormal"""


def _odd_checkpoint(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a sharded checkpoint in which every matrix holds all kinds of odd values, many times."""
    model = make_model().to(dtype)
    bits = torch.tensor(_ODD_BITS[dtype], dtype=torch.int64)
    with torch.no_grad():
        for parameter in model.parameters():
            odd = bits.repeat(20)[: parameter.numel()]
            integers = torch.int32 if dtype == torch.float32 else torch.int16
            wrapped = odd.where(odd < 2 ** (8 * dtype.itemsize - 1), odd - 2 ** (8 * dtype.itemsize)).to(integers)
            parameter.view(-1)[: len(odd)] = wrapped.view(dtype)
    model.save_pretrained(directory, max_shard_size="40KB")
    make_tokenizer().save_pretrained(directory)
    return directory


def _random_mask(checkpoint: Path, directory: Path, sparsity: float = 0.5) -> Path:
    sites = choose_sites(find_sites(skeleton(checkpoint)), (1, 2), "both")
    base = list(WeightFiles(checkpoint).tensors([site.name for site in sites]))
    draws = torch.Generator().manual_seed(3)
    kept = {name: select(torch.rand(weight.shape, generator=draws), sparsity) for name, weight in base}
    save_mask(make_mask(sites, kept, base, sparsity=sparsity, selector="random", modules="both"), directory)
    return directory


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", list(_ODD_BITS))
def test_unmerging_restores_every_byte_of_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = _odd_checkpoint(tmp_path / "base", dtype)
    mask_directory = _random_mask(checkpoint, tmp_path / "mask")
    mask = merge(checkpoint, mask_directory, tmp_path / "merged", keep_removed=True)
    for name, kept in mask.kept.items():
        assert not _bits(WeightFiles(tmp_path / "merged").tensor(name)[~kept]).any()
    progress = []
    restored = unmerge(tmp_path / "merged", tmp_path / "again", lambda done, total: progress.append((done, total)))
    assert restored.config == mask.config
    assert _files(tmp_path / "again") == _files(checkpoint)
    assert progress[-1][0] == progress[-1][1] == len(progress) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "base", "mask", "merged"]


def _rewinding(checkpoint: Path, earlier: Path, directory: Path) -> Path:
    """Write a random mask of the checkpoint that goes back to the values of an earlier one."""
    plain = load_mask(_random_mask(checkpoint, directory))
    names = [site.name for site in plain.config.sites]
    files, back = WeightFiles(checkpoint), WeightFiles(earlier)
    sites = [site for site in find_sites(skeleton(checkpoint)) if site.name in names]
    values = [(name, back.tensor_like(name, files.tensor(name))) for name in names]
    kept = {name: plain.kept[name] for name in names}
    mask = make_mask(sites, kept, files.tensors(names), sparsity=plain.config.sparsity, selector="rewind",
                     modules="both", rewound_to=values)  # fmt: skip
    save_mask(mask, directory)
    return directory


@pytest.mark.parametrize("dtype", list(_ODD_BITS))
def test_a_rewind_mask_puts_the_earlier_values_in_the_type_of_the_checkpoint(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint, earlier = _odd_checkpoint(tmp_path / "base", dtype), save_checkpoint(tmp_path / "earlier", seed=1)
    directory = _rewinding(checkpoint, earlier, tmp_path / "mask")
    mask = merge(checkpoint, directory, tmp_path / "merged", keep_removed=True, rewind_to=earlier)
    assert mask.zeros
    merged, before, back = (WeightFiles(path) for path in (tmp_path / "merged", checkpoint, earlier))
    for name, kept in mask.kept.items():
        expected = torch.where(kept, before.tensor(name), back.tensor(name).to(dtype))
        assert torch.equal(_bits(merged.tensor(name)), _bits(expected))
    unmerge(tmp_path / "merged", tmp_path / "again")
    assert _files(tmp_path / "again") == _files(checkpoint)


def test_a_rewind_mask_is_refused_without_its_earlier_model_or_with_another(tmp_path: Path) -> None:
    checkpoint, earlier, other, small = (
        save_checkpoint(tmp_path / name, seed=seed, **changes)
        for seed, (name, changes) in enumerate(
            {"base": {}, "earlier": {}, "other": {}, "small": {"head_dim": 4}}.items()
        )
    )
    directory = _rewinding(checkpoint, earlier, tmp_path / "mask")
    for given, said in (
        (None, "sets weights back to the values of the model that the fine-tuning started from.*--rewind-to MODEL"),
        (other, "goes back to other values of model.layers.*give the model that the mask was learned with"),
        (small, r"is \(16, 32\) there and has to be \(32, 32\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            merge(checkpoint, directory, tmp_path / "merged", rewind_to=given)
    with pytest.raises(ConfigError, match="the mask sets weights to zero; leave the model to rewind to out"):
        merge(checkpoint, _random_mask(checkpoint, tmp_path / "zeros"), tmp_path / "merged", rewind_to=earlier)
    assert not (tmp_path / "merged").exists()


def test_what_was_removed_lies_beside_the_merged_checkpoint_which_is_the_same_as_without(tmp_path: Path) -> None:
    checkpoint = _odd_checkpoint(tmp_path / "base")
    mask_directory = _random_mask(checkpoint, tmp_path / "mask")
    merge(checkpoint, mask_directory, tmp_path / "plain")
    merge(checkpoint, mask_directory, tmp_path / "merged", keep_removed=True)
    kept = _files(tmp_path / "merged")
    removed = {name: kept.pop(name) for name in list(kept) if name.startswith("mask/")}
    assert kept == _files(tmp_path / "plain")
    assert removed.keys() == {"mask/mask.safetensors", "mask/mask_config.json", "mask/removed.safetensors"}
    mask = load_mask(tmp_path / "merged" / "mask")
    values = load_file(tmp_path / "merged" / "mask" / "removed.safetensors")
    for name, weight in WeightFiles(checkpoint).tensors(list(mask.kept)):
        assert torch.equal(_bits(values[name]), _bits(weight[~mask.kept[name]]))


def test_a_merged_checkpoint_with_what_was_removed_loads_as_the_one_without(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base")
    mask_directory = _random_mask(checkpoint, tmp_path / "mask")
    merge(checkpoint, mask_directory, tmp_path / "merged", keep_removed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loaded[1][problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    checkpoint = save_checkpoint(tmp_path / "base")
    merge(checkpoint, _random_mask(checkpoint, tmp_path / "mask"), tmp_path / "merged", keep_removed=True)
    return tmp_path / "merged"


def _refuses_to_unmerge(merged: Path, said: str) -> None:
    before = sorted(merged.parent.iterdir())
    with pytest.raises(ConfigError, match=said):
        unmerge(merged, merged.parent / "again")
    assert sorted(merged.parent.iterdir()) == before


def test_a_checkpoint_merged_without_what_was_removed_cannot_be_unmerged(merged: Path) -> None:
    shutil.rmtree(merged / "mask")
    _refuses_to_unmerge(merged, "no folder mask/ there, so what was removed is not known")


def test_a_missing_or_cut_file_of_removed_values_is_refused(merged: Path) -> None:
    path = merged / "mask" / "removed.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    _refuses_to_unmerge(merged, r"no readable mask/removed\.safetensors")
    path.unlink()
    _refuses_to_unmerge(merged, r"no readable mask/removed\.safetensors")


def test_a_flipped_bit_in_the_removed_values_is_refused(merged: Path) -> None:
    path = merged / "mask" / "removed.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    _refuses_to_unmerge(merged, r"the values kept of model\.layers\..* do not give the base weight")


@pytest.mark.parametrize("damage", ["dropped", "shortened", "converted"])
def test_removed_values_that_do_not_fit_the_mask_are_refused(damage: str, merged: Path) -> None:
    path = merged / "mask" / "removed.safetensors"
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    values = load_file(path)
    first = min(values)
    taken = values.pop(first)
    if damage != "dropped":
        values[first] = taken[1:].clone() if damage == "shortened" else taken.double()
    save_file(values, path, metadata=metadata)
    _refuses_to_unmerge(merged, "does not hold what its mask removes")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_trained_on_after_the_merge_are_refused(name: str, merged: Path) -> None:
    path = merged / "model.safetensors"
    tensors = load_file(path)
    tensors[name] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    _refuses_to_unmerge(merged, "the weight files are not those that the merge wrote")


def test_an_altered_mask_is_refused(merged: Path) -> None:
    path = merged / "mask" / "mask_config.json"
    config = json.loads(path.read_text())
    config["sites"][0]["base_sha256"] = "0" * 64
    path.write_text(json.dumps(config))
    _refuses_to_unmerge(merged, "base_digest is not that of the listed sites")


def test_an_interrupted_merge_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base")
    mask_directory = _random_mask(checkpoint, tmp_path / "mask")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for keep_removed in (False, True):
        with pytest.raises(KeyboardInterrupt):
            merge(checkpoint, mask_directory, tmp_path / "merged", stop, keep_removed=keep_removed)
    merge(checkpoint, mask_directory, tmp_path / "merged", keep_removed=True)
    with pytest.raises(KeyboardInterrupt):
        unmerge(tmp_path / "merged", tmp_path / "again", stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mask", "merged"]

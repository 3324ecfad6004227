"""Mask learning from checkpoint to checkpoint, on a tiny random model of each family."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mft_core.checkpoints.files import WeightFiles, load_model, skeleton
from mft_core.data.batching import micro_batches
from mft_core.draws import seeded_generator
from mft_core.errors import ConfigError
from mft_core.masks.mask_file import Mask, load_mask
from mft_core.masks.masking import initial_scores
from mft_core.masks.merge import merge, unmerge
from mft_core.masks.selection import masked_count, select
from mft_core.masks.sites import Site, choose_sites, find_sites
from mft_core.methods import CALIBRATED, SELECTORS, TRAINED
from mft_core.recipes import LearnMask
from mft_core.stages import learn_mask
from mft_core.training.loss import LossHead, keeps_packed_apart
from tests.support.small_training import make_context, make_data, make_recipe, save_data
from tests.support.tiny import make_model, save_checkpoint

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "phi", "phi3", "olmo2", "glm4",
    "starcoder2", "gpt_neox", "gpt2", "opt", "falcon", "bloom", "mpt", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
    "granitemoe", "gpt_oss", "deepseek_v3",
)  # fmt: skip
SPARSITY = 0.23
_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


def _learn(checkpoint: Path, data: Path, directory: Path, earlier: Path | None = None, **changes: Any) -> Mask:
    """Learn a mask of layers 1 and 2 in three steps, and return it as it was saved in `directory/mask`."""
    settings = {"layers": "1-2", "sparsity": SPARSITY, "score_init": "normal", "seed": 7} | changes
    if settings["score_init"]:
        settings["training"] = make_recipe(max_steps=3)
    directory.mkdir()
    inputs = {"model": checkpoint, "data": data} | ({"base": earlier} if earlier else {})
    learn_mask.run(LearnMask.model_validate(settings), inputs, directory, make_context(directory / "work"))
    return load_mask(directory / "mask")


def _sites(checkpoint: Path) -> list[Site]:
    return choose_sites(find_sites(skeleton(checkpoint)), (1, 2), "both")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(24).view(2, 12) * 13 % 300
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _reload(directory: Path) -> PreTrainedModel:
    """Load as anybody would."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    model, info = loaded
    assert not any(info[problem] for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    return model.eval()


def _check_merged(checkpoint: Path, merged: Path, mask: Mask) -> None:
    """Check that zeros are where the mask says and nowhere else, in number, place and every other bit."""
    sites = _sites(checkpoint)
    assert [site.name for site in sites] == list(mask.kept)
    base, result = (dict(_reload(path).state_dict()) for path in (checkpoint, merged))
    for site in sites:
        kept, weight = mask.kept[site.name], site.of(base)
        assert int((~kept).sum()) == masked_count(SPARSITY, weight.numel())
        assert torch.equal(_bits(site.of(result)), _bits(weight.masked_fill(~kept, 0)))
        assert int((site.of(result) == 0).sum()) == masked_count(SPARSITY, weight.numel())  # none was zero before
    untouched = base.keys() - {site.parameter for site in sites}
    assert untouched
    assert all(torch.equal(_bits(result[name]), _bits(base[name])) for name in untouched)
    masked_in_memory = load_model(checkpoint, torch.float32, _CPU).eval()
    parameters = dict(masked_in_memory.named_parameters())
    with torch.no_grad():
        for site in sites:
            site.of(parameters).masked_fill_(~mask.kept[site.name], 0)
    assert torch.equal(_logits(_reload(merged)), _logits(masked_in_memory))
    assert not torch.equal(_logits(_reload(merged)), _logits(_reload(checkpoint)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_learned_mask_reaches_the_merged_checkpoint_exactly(family: str, data: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base", family)
    mask = _learn(checkpoint, data, tmp_path / "learned")
    assert len((tmp_path / "learned" / "history.jsonl").read_text().splitlines()) == 3
    merge(checkpoint, tmp_path / "learned" / "mask", tmp_path / "merged", keep_removed=True)
    _check_merged(checkpoint, tmp_path / "merged", mask)
    unmerge(tmp_path / "merged", tmp_path / "again")
    for path in checkpoint.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_has_the_loss_of_its_examples_alone_packed_or_padded(family: str) -> None:
    model, data = make_model(family), make_data().train
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3  # else a random model hardly looks at other tokens
    step, packs = np.arange(16), keeps_packed_apart(model)
    with LossHead(model) as head, torch.no_grad():

        def loss(examples: np.ndarray, packing: bool) -> float:
            batches = micro_batches(data, examples, 10_000, packing).batches
            return sum(head.summed_loss(batch, _CPU).item() for batch in batches)

        alone = sum(loss(step[index : index + 1], packing=False) for index in step)
        assert loss(step, packing=False) == pytest.approx(alone, abs=1e-3)
        if packs:
            assert loss(step, packing=True) == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "phi3", "falcon", "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]
)
def test_learning_moves_the_mask_of_every_matrix(family: str, data: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base", family)
    mask = _learn(checkpoint, data, tmp_path / "learned")
    files = WeightFiles(checkpoint)
    for site in _sites(checkpoint):
        start = initial_scores(files.tensor(site.name), "normal", seeded_generator(7, site.name))
        assert not torch.equal(mask.kept[site.name], select(start, SPARSITY)), site.name


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "selector",
    sorted(name for name, row in SELECTORS.items() if name != "learned" and not (row.matches or row.rescales)),
)
def test_every_selector_works_on_transposed_weights_and_on_experts(
    selector: str, family: str, data: Path, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(tmp_path / "base", family)
    settings: dict[str, Any] = {"selector": selector, "score_init": "normal" if selector in TRAINED else None}
    if selector in CALIBRATED:
        settings["calibration_rows"] = 8
    if selector == "wanda" and family != "gpt2":
        settings["modules"] = "attention"  # what an expert is given cannot be observed: refused
    earlier = save_checkpoint(tmp_path / "earlier", family, seed=1) if SELECTORS[selector].rewinds else None
    mask = _learn(checkpoint, data, tmp_path / "learned", earlier, **settings)
    merge(checkpoint, tmp_path / "learned" / "mask", tmp_path / "merged", rewind_to=earlier)
    base, result = (dict(_reload(path).state_dict()) for path in (checkpoint, tmp_path / "merged"))
    instead = dict(_reload(earlier).state_dict()) if earlier else {name: torch.zeros_like(base[name]) for name in base}
    assert mask.zeros
    for site in choose_sites(find_sites(skeleton(checkpoint)), (1, 2), settings.get("modules", "both")):
        expected = torch.where(mask.kept[site.name], site.of(base), site.of(instead))
        assert torch.equal(_bits(site.of(result)), _bits(expected))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_tied_embeddings_stay_tied_and_untouched(family: str, data: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base", family, tie_word_embeddings=True)
    mask = _learn(checkpoint, data, tmp_path / "learned")
    merge(checkpoint, tmp_path / "learned" / "mask", tmp_path / "merged")
    _check_merged(checkpoint, tmp_path / "merged", mask)
    merged = _reload(tmp_path / "merged")
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize(
    "changes", [{"alibi": True}, {"new_decoder_architecture": True}, {"multi_query": False, "num_kv_heads": 4}]
)
def test_variants_of_falcon(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base", "falcon", **changes)
    mask = _learn(checkpoint, data, tmp_path / "learned")
    merge(checkpoint, tmp_path / "learned" / "mask", tmp_path / "merged")
    _check_merged(checkpoint, tmp_path / "merged", mask)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_shards_and_bfloat16(family: str, data: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "base"
    make_model(family).bfloat16().save_pretrained(checkpoint, max_shard_size="20KB")
    assert len(list(checkpoint.glob("*.safetensors"))) > 5
    _learn(checkpoint, data, tmp_path / "learned")
    mask = merge(checkpoint, tmp_path / "learned" / "mask", tmp_path / "merged", keep_removed=True)
    base, result = (dict(_reload(path).state_dict()) for path in (checkpoint, tmp_path / "merged"))
    for site in _sites(checkpoint):
        assert torch.equal(_bits(site.of(result)), _bits(site.of(base).masked_fill(~mask.kept[site.name], 0)))
    unmerge(tmp_path / "merged", tmp_path / "again")
    for path in checkpoint.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def _rename(checkpoint: Path, pattern: str, name: str) -> None:
    """Give the tensors of a one-file checkpoint other names, by a regular expression."""
    path = checkpoint / "model.safetensors"
    tensors = {re.sub(pattern, name, key): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "renaming"),
    [
        ("gpt2", (r"^transformer\.", "")),
        ("falcon", (r"^transformer\.", "")),
        ("bloom", (r"^transformer\.", "")),
        ("opt", (r"^model\.", "")),
        ("gpt_neox", (r"^gpt_neox\.", "")),
        ("llama", (r"^model\.", "")),
        ("gemma3", (r"^language_model\.model\.", "model.language_model.")),
    ],
)
def test_checkpoints_with_another_prefix_are_masked_under_their_own_names(
    family: str, renaming: tuple[str, str], data: Path, tmp_path: Path
) -> None:
    plain = save_checkpoint(tmp_path / "plain", family)
    checkpoint = tmp_path / "base"
    shutil.copytree(plain, checkpoint)
    _rename(checkpoint, *renaming)
    names = load_file(checkpoint / "model.safetensors").keys()
    assert names != load_file(plain / "model.safetensors").keys()
    mask = _learn(checkpoint, data, tmp_path / "learned")
    assert mask.config == _learn(plain, data, tmp_path / "learned-plain").config
    merge(checkpoint, tmp_path / "learned" / "mask", tmp_path / "merged")
    _check_merged(checkpoint, tmp_path / "merged", mask)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == names


@pytest.mark.parametrize(
    ("family", "one", "matrix", "made_of"),
    [
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.3.w1.weight",
            "model.layers.1.mlp.experts.gate_up_proj[3]",
            ("w1", "w3"),
        ),
        (
            "qwen3_moe",
            "model.layers.1.mlp.experts.3.gate_proj.weight",
            "model.layers.1.mlp.experts.gate_up_proj[3]",
            ("gate_proj", "up_proj"),
        ),
    ],
)
def test_experts_are_read_from_the_tensors_of_each_and_written_back_to_them(
    family: str, one: str, matrix: str, made_of: tuple[str, str], data: Path, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(tmp_path / "base", family)
    before = load_file(checkpoint / "model.safetensors")
    assert one in before
    parts = [one.replace(made_of[0], part) for part in made_of]
    files = WeightFiles(checkpoint)
    assert [piece.tensor for piece in files.pieces[matrix]] == parts
    assert torch.equal(files.tensor(matrix), torch.cat([before[part] for part in parts]))
    assert torch.equal(files.tensor(matrix), _reload(checkpoint).get_parameter(matrix[:-3])[3])
    mask = _learn(checkpoint, data, tmp_path / "learned")
    merge(checkpoint, tmp_path / "learned" / "mask", tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(torch.cat([after[part] for part in parts]), files.tensor(matrix) * mask.kept[matrix])


def test_experts_that_lie_in_one_tensor_are_masked_there(data: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "base"
    make_model("mixtral").save_pretrained(checkpoint, save_original_format=False)
    assert load_file(checkpoint / "model.safetensors")["model.layers.1.mlp.experts.down_proj"].shape == (4, 32, 64)
    mask = _learn(checkpoint, data, tmp_path / "learned")
    merge(checkpoint, tmp_path / "learned" / "mask", tmp_path / "merged")
    _check_merged(checkpoint, tmp_path / "merged", mask)


def test_an_expert_missing_from_the_checkpoint_is_refused_before_compute(data: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base", "mixtral")
    _rename(checkpoint, r"^model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight$", "elsewhere")
    with pytest.raises(
        ConfigError, match=r"no weight named model\.layers\.1\.mlp\.experts\.gate_up_proj\[0\], nor all"
    ):
        _learn(checkpoint, data, tmp_path / "learned")


def test_a_matrix_missing_from_the_checkpoint_is_refused_before_compute(data: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base", "gpt2")
    _rename(checkpoint, r"h\.2\.attn\.c_proj\.weight", "h.2.attn.other")
    with pytest.raises(ConfigError, match=r"no weight named transformer\.h\.2\.attn\.c_proj\.weight"):
        _learn(checkpoint, data, tmp_path / "learned")


def test_pickled_weights_are_refused_with_the_way_to_convert_them(data: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"Pickled weights .* are not read here; convert them: .*save_pretrained"):
        _learn(checkpoint, data, tmp_path / "learned")


def test_a_missing_shard_is_refused_before_compute(data: Path, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    next((tmp_path / "base").glob("model-00003-*.safetensors")).unlink()
    with pytest.raises(ConfigError, match=r"model-0000\d-of-\d+\.safetensors of its index is missing"):
        _learn(tmp_path / "base", data, tmp_path / "learned")


def test_the_single_file_is_read_where_an_index_lies_beside_it_as_transformers_does(tmp_path: Path) -> None:
    make_model(seed=1).save_pretrained(tmp_path, max_shard_size="40KB")
    save_checkpoint(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(WeightFiles(tmp_path).tensor(name), _reload(tmp_path).get_parameter(name))

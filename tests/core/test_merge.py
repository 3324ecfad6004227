from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from mft_core.adapter import save_mask
from mft_core.checkpoint_io import load_model, read_config
from mft_core.errors import ConfigError
from mft_core.recipes import MergeMask
from mft_core.stages import get_stage
from tests.core.test_adapter import make_small_mask
from tests.small_training import make_context
from tests.tiny import make_model, make_tokenizer, save_checkpoint

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
    monkeypatch.setattr("mft_core.checkpoint_io._DROPOUTS", ("resid_pdrop",))
    with pytest.raises(ConfigError, match=r"training\.dropout = 0\.1: models of type 'llama' have none"):
        load_model(checkpoint, torch.float32, _CPU, dropout=0.1)

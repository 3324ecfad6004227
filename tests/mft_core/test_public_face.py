"""`import mft_core as mft`: cheap to import, and what the README says can be done with it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import mft_core as mft
from mft_core.masks.sites import choose_sites, find_sites
from mft_core.selectors.rewind import RewindMaskTuner
from tests.mft_core.evaluation.test_lm_eval_harness import QUESTIONS, write_task
from tests.support.tiny import make_model, save_checkpoint

README = Path(__file__).parents[2] / "README.md"


def snippets() -> list[str]:
    """Return the Python of the README's section about loops of one's own."""
    section = README.read_text().split("## In your own training loop")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def batches(count: int = 6) -> list[dict[str, Any]]:
    draws = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 60, (2, 8), generator=draws) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in drawn]


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


def trained(model: PreTrainedModel, count: int = 2, **settings: Any) -> mft.MaskTuner:
    tuner = mft.MaskTuner(model, **{"sparsity": 0.3, "layers": "1-2", "lr": 0.02, **settings})
    for batch in batches(count):
        model(**batch).loss.backward()
        tuner.step()
    return tuner


def test_importing_the_package_brings_neither_torch_nor_transformers() -> None:
    code = "import sys, mft_core; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_name_of_the_face_is_there_and_a_wrong_one_is_answered_with_them() -> None:
    assert sorted(mft.__all__) == sorted(name for names in mft._HOMES.values() for name in names) == sorted(dir(mft))
    for module, names in mft._HOMES.items():
        for name in names:
            assert getattr(mft, name) is getattr(importlib.import_module(f"mft_core.{module}"), name)
    with pytest.raises(AttributeError, match=r"no attribute 'MaskTunr'; it has .*MaskTuner"):
        mft.MaskTunr  # noqa: B018


def test_the_loop_of_the_readme_has_at_most_eight_lines_and_learns_and_merges_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = snippets()[0]
    assert len([line for line in loop.splitlines() if line]) <= 8
    monkeypatch.chdir(tmp_path)
    model = load(save_checkpoint(tmp_path / "ft"))
    untouched = mft.MaskTuner(load(tmp_path / "ft"), sparsity=0.1, layers="last:4", lr=1e-3).masks()
    variables: dict[str, Any] = {"model": model, "loader": batches(20)}
    exec(loop, variables)
    mask = mft.load_mask("mask")
    assert any(not torch.equal(mask.kept[name], first) for name, first in untouched.items()), "it has learned"
    base = make_model().state_dict()
    merged = load(tmp_path / "merged").state_dict()
    assert set(mask.kept) == {site.name for site in choose_sites(find_sites(model), range(4), "both")}
    for name, weight in base.items():
        assert torch.equal(merged[name], weight * mask.kept[name] if name in mask.kept else weight)
        assert torch.equal(model.state_dict()[name], merged[name]), "the model in memory is the merged one"
    assert str(mask) == "mask (learned) of 28 matrices in layers 0-3: 9.96% of 36,864 weights zero"
    mft.where_it_cuts(mask, "where.png")
    assert Path("where.png").read_bytes().startswith(b"\x89PNG")


def test_two_checkpoints_are_evaluated_and_compared(tmp_path: Path) -> None:
    one, other = save_checkpoint(tmp_path / "one"), save_checkpoint(tmp_path / "other", seed=1)
    folder = write_task(tmp_path / "tasks", "sums", ["?"] * len(QUESTIONS))
    said = [row["response"] for row in mft.evaluate(one, "sums", folder).items]
    write_task(folder, "sums", said)
    before, after = mft.evaluate(str(one), "sums", str(folder)), mft.evaluate(other, "sums", folder)
    assert str(before) == "sums: exact_match 100.0% of 24 items"
    found = mft.compare(after, before)
    assert (found.baseline, found.wins) == (1.0, 0)
    assert found.gain == pytest.approx(after.summary["accuracy"] - 1)
    assert found.gain < -0.5
    assert re.fullmatch(r"-\d+\.\d points \[-.*\] on 24 items, 100\.0% to .*, p = .*: worse", str(found))
    with pytest.raises(mft.StageError, match="they did not get the same items"):
        mft.compare(mft.evaluate(other, "sums", folder, limit=3), before)
    with pytest.raises(mft.ConfigError, match=r"unknown key 'metrik'. Did you mean 'metric'"):
        mft.evaluate(one, "sums", folder, metrik="acc")
    with pytest.raises(mft.ConfigError, match="sums"):
        mft.evaluate(one, "sum", folder)


def test_two_evaluations_of_a_number_that_should_fall_gain_what_it_fell_by() -> None:
    summary = {"benchmark": "prose", "metric": "perplexity", "higher_is_better": False}
    before, after = (
        mft.Evaluation([{"item": str(item), "outcome": value + item} for item in range(40)], summary)
        for value in (9.0, 7.0)
    )
    found = mft.compare(after, before)
    assert (found.gain, found.wins, found.losses) == (2.0, 40, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 10}, r"MaskTuner: sparsity = 10: sparsity is the share .* valid: 0 <= sparsity < 1"),
        ({"layers": "last:9"}, r"layers = 'last:9': the model has 4 layers; valid: last:1 to last:4"),
        ({"modules": "q_prj"}, r"matches 'q_prj'. Did you mean"),
        ({"scope": "globl"}, r"MaskTuner: scope = 'globl': .*Did you mean 'global'"),
        ({"min_kept": 0.5}, r"min_kept belongs to scope 'global'"),
        ({"init": "norml"}, r"unknown init 'norml'. Did you mean 'normal'"),
        ({"lr": None}, r"give lr, .* or optimizer"),
        ({"optimizer": torch.optim.SGD}, r"give lr, .* or optimizer"),
    ],
)
def test_settings_that_are_not_valid_are_refused_before_the_model_is_touched(
    settings: dict[str, Any], message: str
) -> None:
    model = make_model()
    with pytest.raises(mft.ConfigError, match=message):
        mft.MaskTuner(model, **{"sparsity": 0.1, "layers": "1", "lr": 0.1, **settings})
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(weight, make_model().state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_step_without_a_gradient_is_refused_and_changes_nothing() -> None:
    model = make_model()
    tuner = trained(model)
    before = tuner.snapshot()
    model(**batches(1)[0]).loss.backward()
    model.zero_grad()
    with pytest.raises(mft.StageError, match=r"call backward\(\) before step\(\)"):
        tuner.step()
    assert all(torch.equal(score, before[name]) for name, score in tuner.snapshot().items())


def test_a_model_loaded_in_another_type_has_its_mask_tied_to_what_the_checkpoint_stores(tmp_path: Path) -> None:
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "ft")
    tuner = trained(load(tmp_path / "ft", torch.float32))
    mft.save_mask(tuner.mask(), tmp_path / "float32")
    with pytest.raises(mft.ConfigError, match=r"is bfloat16 .* here; the mask was made for float32"):
        mft.merge(tmp_path / "ft", tmp_path / "float32", tmp_path / "merged")
    mft.save_mask(tuner.mask(tmp_path / "ft"), tmp_path / "mask")
    mft.merge(tmp_path / "ft", tmp_path / "mask", tmp_path / "merged")
    held = tuner.model.state_dict()
    assert all(torch.equal(weight, held[name]) for name, weight in load(tmp_path / "merged").state_dict().items())
    other = save_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(mft.ConfigError, match=r"checkpoint = .*other: .* has other weights there"):
        tuner.mask(other)


@pytest.mark.parametrize("scope", ["global", "global-threshold"])
def test_a_mask_of_every_scope_is_what_the_model_holds(scope: str, tmp_path: Path) -> None:
    tuner = trained(load(save_checkpoint(tmp_path / "ft")), scope=scope)
    mft.save_mask(tuner.mask(), tmp_path / "mask")
    assert mft.merge(tmp_path / "ft", tmp_path / "mask", tmp_path / "merged").config.scope == scope
    held = tuner.model.state_dict()
    assert all(torch.equal(weight, held[name]) for name, weight in load(tmp_path / "merged").state_dict().items())


def test_a_rewinding_tuner_makes_a_mask_that_rewinds(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", seed=1)
    model = load(save_checkpoint(tmp_path / "ft"))
    tuner = RewindMaskTuner(model, earlier=load(base).state_dict(), sparsity=0.3, layers="1-2", lr=0.02)
    mft.save_mask(tuner.mask(), tmp_path / "mask")
    mft.merge(tmp_path / "ft", tmp_path / "mask", tmp_path / "merged", rewind_to=base)
    held = model.state_dict()
    assert all(torch.equal(weight, held[name]) for name, weight in load(tmp_path / "merged").state_dict().items())

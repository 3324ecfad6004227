"""What holds for every method of the table; a new one joins by its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mft_core.checkpoints.files import WeightFiles
from mft_core.errors import explain
from mft_core.figures import style
from mft_core.masks.mask_file import load_mask
from mft_core.masks.merge import merge, unmerge
from mft_core.masks.selection import masked_count
from mft_core.methods import METHODS, SELECTORS, Contrast, Method, uses
from mft_core.recipes import LearnMask
from mft_core.stages import get_stage
from mft_core.statistics.tables import method_label
from pipelines.config.setup import MaskSpec, Setup
from pipelines.config.study import SearchSpec, VariantSpec
from tests.support.small_training import make_context, make_recipe, save_data
from tests.support.tiny import save_checkpoint

MASKING = pytest.mark.parametrize("row", SELECTORS.values(), ids=lambda row: row.name)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("methods")
    return {
        "model": save_checkpoint(folder / "model"),
        "base": save_checkpoint(folder / "base", seed=1),
        "data": save_data(folder / "data"),
    }


def learn(row: Method, inputs: dict[str, Path], out: Path, seed: int = 0) -> Path:
    """Run the stage with what the row says that the selector needs, and nothing else; returns the mask."""
    details: dict[str, Any] = {"calibration_rows": 9} if row.observes else {}
    if row.trained:
        details = {"training": make_recipe(max_steps=2), "score_init": "normal"}
    needed = {"model", *(["data"] if row.trained or row.observes else []), *(["base"] if row.sees_base else [])}
    if row.matches:
        inputs = {**inputs, "mask": learn(METHODS[row.matches], inputs, out.with_name(f"{out.name}-like"), seed)}
        needed.add("mask")
    out.mkdir()
    recipe = LearnMask(selector=row.selector, sparsity=0.3, layers="1-2", seed=seed, **details)
    get_stage("learn-mask").run(
        recipe, {name: inputs[name] for name in needed}, out, make_context(out.parent / f"work-{out.name}")
    )
    return out / "mask"


@MASKING
def test_every_mask_is_exact_reproducible_of_its_seed_and_can_be_undone(
    row: Method, inputs: dict[str, Path], tmp_path: Path
) -> None:
    directory = learn(row, inputs, tmp_path / "one")
    mask = load_mask(directory)
    assert [site.zeros for site in mask.config.sites] == [masked_count(0.3, site.numel) for site in mask.config.sites]
    again, other = (load_mask(learn(row, inputs, tmp_path / str(seed), seed)) for seed in (0, 1))
    assert again.config == mask.config
    assert (other.config.mask_sha256 != mask.config.mask_sha256) == row.seeded

    merged = tmp_path / "merged"
    merge(inputs["model"], directory, merged, keep_removed=True, rewind_to=inputs["base"] if row.rewinds else None)
    before, base, after = (WeightFiles(path) for path in (inputs["model"], inputs["base"], merged))
    for name in before.pieces:
        kept = mask.kept[name] if name in mask.kept else torch.tensor(True)
        weight, instead = before.tensor(name), base.tensor(name) if row.rewinds else torch.tensor(0.0)
        if row.rescales and name in mask.kept:
            weight = instead + (weight - instead) / kept.double().mean().item()
            torch.testing.assert_close(after.tensor(name)[kept], weight[kept])
            weight[kept] = after.tensor(name)[kept]
        assert torch.equal(after.tensor(name), torch.where(kept, weight, instead)), name
    unmerge(merged, tmp_path / "undone")
    undone = WeightFiles(tmp_path / "undone")
    assert all(torch.equal(undone.tensor(name), before.tensor(name)) for name in before.pieces)


def test_every_method_has_a_label_and_a_look_of_its_own() -> None:
    assert len({row.label for row in METHODS.values()}) == len(METHODS)
    shown = [row for row in METHODS.values() if row.role != "reference"]
    assert len({style.of_method(row.name) for row in shown}) == len(shown)
    assert len({row.marker for row in shown}) == len(shown)
    assert all(method_label(row.name) == row.label for row in shown)


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda row: row.name)
def test_the_sections_of_a_method_are_those_of_a_setup(row: Method) -> None:
    assert row.sections <= Setup.model_fields.keys()
    assert (row.selector is not None) == ("mask" in row.sections)
    assert uses(row.name, "seed") == row.seeded
    assert uses(row.name, "model.path")


@MASKING
def test_a_setting_of_masks_makes_a_difference_exactly_where_the_selector_looks_at_it(row: Method) -> None:
    used = {name for name in MaskSpec.model_fields if uses(row.name, f"mask.{name}")}
    trained = row.trained or row.matches is not None  # what makes a difference to the mask that it resembles
    expected = {"sparsity", "layers", "modules"}
    expected |= {"training", "score_init"} if trained else set()
    expected |= {"calibration_rows"} if row.observes else set()
    expected |= {"domain", "data", "fraction"} if trained or row.observes else set()
    expected |= {"scope", "min_kept"} if "global" in row.scopes else set()
    expected |= {"granularity"} if row.granular else set()
    assert used == expected
    assert uses(row.name, "mask.training.learning_rate") == trained


@pytest.mark.parametrize(
    ("given", "meant"), [("rewnd", "rewind"), ("magntude", "magnitude"), ("continued-ff", "continued-fft")]
)
def test_an_unknown_method_is_answered_with_the_nearest_and_the_list(given: str, meant: str) -> None:
    with pytest.raises(ValidationError) as caught:
        VariantSpec.model_validate({"method": given})
    said = str(explain(caught.value, VariantSpec, "study x"))
    assert said.startswith(f"study x: method = '{given}': Input should be 'base', 'fft', ")
    assert said.endswith(f"'wanda' or 'movement'. Did you mean '{meant}'?")


def test_a_method_is_a_choice_in_json_schemas_and_a_search_is_of_those_that_learn() -> None:
    assert VariantSpec.model_json_schema()["properties"]["method"]["enum"] == list(METHODS)
    searched = SearchSpec.model_json_schema()["properties"]["method"]["enum"]
    assert searched == [row.name for row in METHODS.values() if row.trained]


def test_a_contrast_is_of_variants_of_one_fine_tuning():
    contrast = Contrast.parse("mft - fft")
    mft, fft = (
        {"variant": f"{name} seed=0", "method": name, "fine_tune.seed": 42, "seed": None} for name in ("mft", "fft")
    )
    assert contrast.pairs(mft | {"seed": 0}, fft)
    assert not contrast.pairs(mft, fft | {"fine_tune.seed": 43})
    both = Contrast.parse("mft sparsity=0.1 - magnitude sparsity=0.2")
    masks = [{"variant": f"{name} sparsity={share}", "method": name, "mask.sparsity": share} for name, share in
             (("mft", 0.1), ("magnitude", 0.2))]  # fmt: skip
    assert both.pairs(*masks), "they differ in what the contrast names on both sides"

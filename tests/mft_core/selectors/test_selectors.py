"""Every selector through its one interface, against its definition."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
import torch
from peft.utils.merge_utils import magnitude_based_pruning, random_pruning
from torch import Tensor

from mft_core.checkpoints.files import WeightFiles, load_model
from mft_core.data.tokens import TokenDataset
from mft_core.draws import seeded_generator
from mft_core.errors import ConfigError
from mft_core.masks.mask_file import load_mask
from mft_core.masks.masking import initial_scores
from mft_core.masks.matching import deciles
from mft_core.masks.merge import merge
from mft_core.masks.selection import remove_least, select
from mft_core.methods import CALIBRATED, TRAINED
from mft_core.methods import SELECTORS as ROWS
from mft_core.recipes import LearnMask
from mft_core.selectors import SELECTORS
from mft_core.selectors.soft import SoftMaskTuner
from mft_core.stages import get_stage
from mft_core.training.loss import LossHead
from tests.support.small_training import make_context, make_job, make_recipe, save_data
from tests.support.tiny import make_model, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("selectors") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("selectors") / "data")


def _settings(selector: str) -> dict[str, Any]:
    trained = {"training": make_recipe(max_steps=3), "score_init": "normal"} if selector in TRAINED else {}
    return {"selector": selector, **trained, **({"calibration_rows": 9} if selector in CALIBRATED else {})}


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_selector_removes_the_exact_count_in_every_scope(
    selector: str, scope: str, checkpoint: Path, data: Path
) -> None:
    if scope not in ROWS[selector].scopes:
        with pytest.raises(ValueError, match="has no scope 'global'; valid: local"):
            make_job(checkpoint, data, scope=scope, **_settings(selector))
        return
    job = make_job(checkpoint, data, checkpoint, scope=scope, **_settings(selector))
    kept = SELECTORS[selector](job).kept
    assert list(kept) == [site.name for site in job.sites]
    zeros = [int((~mask).sum()) for mask in kept.values()]
    if scope == "local":
        assert zeros == [int(0.3 * mask.numel()) for mask in kept.values()]
    else:
        assert sum(zeros) == int(0.3 * sum(mask.numel() for mask in kept.values()))
    again = SELECTORS[selector](job).kept
    assert all(torch.equal(again[name], mask) for name, mask in kept.items())


def test_magnitude_masks_the_smallest_weights(checkpoint: Path) -> None:
    job = make_job(checkpoint, selector="magnitude")
    kept = SELECTORS["magnitude"](job).kept
    for site, weight in job.weights():
        assert torch.equal(kept[site.name], select(weight, 0.3))


@pytest.mark.parametrize("selector", ["random", "dare", "wanda", "movement"])
def test_a_seed_draws_its_own_mask(selector: str, checkpoint: Path, data: Path) -> None:
    one, two = (
        SELECTORS[selector](make_job(checkpoint, data, **{**_settings(selector), "seed": seed})).kept for seed in (1, 2)
    )
    assert any(not torch.equal(one[name], two[name]) for name in one)


def _everything(data: Path) -> dict[str, Any]:
    return {"calibration_rows": len(TokenDataset.load(data / "train.safetensors"))}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wanda_weighs_magnitudes_by_the_norm_of_their_input(family: str, data: Path, tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model", family)
    job = make_job(directory, data, selector="wanda", **_everything(data))
    kept = SELECTORS["wanda"](job).kept
    model = load_model(directory, torch.float32, torch.device("cpu")).eval()
    site = next(site for site in job.sites if site.role == "up")
    seen: list[Tensor] = []
    module = model.get_submodule(site.parameter.removesuffix(".weight"))
    module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()[0]))
    train = TokenDataset.load(data / "train.safetensors")
    for index in range(len(train)):  # one sequence at a time: no padding anywhere
        model(input_ids=torch.from_numpy(train.example(index)[0]).long().unsqueeze(0))
    norms = torch.cat(seen).square().sum(0).sqrt()
    weight = module.weight.detach().t() if site.transposed else module.weight.detach()
    scores = weight.abs() * norms
    mask = kept[site.name].t() if site.transposed else kept[site.name]
    for row, row_kept in zip(scores, mask, strict=True):
        assert torch.equal(row_kept, remove_least(row, int((~row_kept).sum())))


def test_movement_removes_what_the_gradient_moves_towards_zero(checkpoint: Path, data: Path) -> None:
    job = make_job(checkpoint, data, selector="movement", **_everything(data))
    kept = SELECTORS["movement"](job).kept
    model = load_model(checkpoint, torch.float32, torch.device("cpu")).eval()
    batches = job.calibration()
    with LossHead(model) as head:
        sum(head.summed_loss(batch, model.device) for batch in batches.batches).backward()
    for site in job.sites:
        weight = model.get_parameter(site.parameter)
        assert weight.grad is not None
        scores = (-weight * weight.grad).detach()
        mask = kept[site.name]
        agreed = (mask == remove_least(scores, int(0.3 * scores.numel()))).float().mean()
        assert agreed > 0.999  # sums in another order may swap neighbours


def test_more_calibration_rows_than_there_are_is_an_error(checkpoint: Path, data: Path) -> None:
    job = make_job(checkpoint, data, selector="movement", calibration_rows=1000)
    with pytest.raises(ConfigError, match="calibration_rows = 1000: the training data have 40 sequences"):
        SELECTORS["movement"](job)


def _soft(model: Any, steps: int = 4) -> SoftMaskTuner:
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
    return SoftMaskTuner(model, sparsity=0.3, layers="1-2", seed=5, optimizer=optimizer, steps=steps)


def test_the_soft_gradient_is_the_derivative_of_what_is_computed() -> None:
    model, name = make_model(), "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name).detach().clone()
    soft = _soft(model)
    score = soft.state_dict()["scores"][name]
    mask = soft.masks()[name]
    (3.0 * model.get_parameter(name)).sum().backward()
    soft.trained()
    free = score.clone().requires_grad_(True)
    cut = score[~mask].max()
    (3.0 * weight * torch.sigmoid(10.0 / score.std() * (free - cut))).sum().backward()
    torch.testing.assert_close(score.grad, free.grad)


def test_soft_gates_harden_into_the_mask_and_validations_see_the_mask() -> None:
    model, name = make_model(), "model.layers.2.mlp.down_proj.weight"
    weight = model.get_parameter(name).detach().clone()
    soft = _soft(model)
    between: list[int] = []
    for _ in range(4):
        held = model.get_parameter(name)
        share = (held / weight).detach()
        between.append(int(((share > 0.01) & (share < 0.99)).sum()))
        with soft.evaluating():
            assert torch.equal(held, weight.masked_fill(~soft.masks()[name], 0))
        held.sum().backward()
        soft.step()
    assert between[0] > 100
    assert between[-1] < 10
    assert between == sorted(between, reverse=True)


@pytest.mark.parametrize("init", ["normal", "kaiming-uniform"])
def test_a_random_mask_is_no_more_alike_to_the_learned_one_of_its_seed_than_chance(init: str, checkpoint: Path) -> None:
    job = make_job(checkpoint, selector="random")
    random = SELECTORS["random"](job).kept
    both = either = 0
    for site, weight in job.weights():
        first = select(initial_scores(weight, init, seeded_generator(job.recipe.seed, site.name)), 0.3)  # type: ignore[arg-type]
        both += int((~first & ~random[site.name]).sum())
        either += int((~first | ~random[site.name]).sum())
    assert both / either == pytest.approx(0.3 / 1.7, abs=0.02)  # independent masks; about 19,000 weights


def test_the_selectors_settings_reach_what_learns(checkpoint: Path, data: Path) -> None:
    floored = make_job(checkpoint, data, scope="global", min_kept=0.65, **_settings("learned"))
    assert all(mask.float().mean() >= 0.649 for mask in SELECTORS["learned"](floored).kept.values())
    choice = SELECTORS["learned"](make_job(checkpoint, data, scope="global-threshold", **_settings("learned")))
    assert choice.thresholds is not None
    assert set(choice.thresholds) == {"attention", "mlp"}


def test_a_matched_random_mask_has_the_learned_counts_in_every_stratum_and_chance_alone_within_them(
    checkpoint: Path, tmp_path: Path
) -> None:
    base = save_checkpoint(tmp_path / "base", seed=1)
    jobs = [make_job(checkpoint, None, base, selector="matched", seed=seed) for seed in range(40)]
    drawn = [SELECTORS["matched"](job).kept for job in jobs]
    given = load_mask(jobs[0].inputs["mask"]).kept
    for (site, weight), (_, earlier) in zip(jobs[0].weights(), jobs[0].base_weights(), strict=True):
        flats = [pandas.Series(values.abs().flatten().numpy()) for values in (weight, weight - earlier)]
        parts = [(flat.rank(method="min") - 1) * 10 // len(flat) for flat in flats]
        frame = pandas.DataFrame({"w": parts[0], "d": parts[1], "like": ~given[site.name].flatten().numpy()})
        for index, kept in enumerate(drawn):
            frame[index] = ~kept[site.name].flatten().numpy()
        counts = frame.groupby(["w", "d"]).sum()
        assert all((counts[index] == counts["like"]).all() for index in range(len(drawn)))
        own = frame.groupby(["w", "d"])["like"].transform("mean").to_numpy()  # what a draw within the stratum expects
        share = frame[list(range(len(drawn)))].mean(axis=1).to_numpy()
        mixed = (own > 0) & (own < 1)
        spread = numpy.sqrt(own[mixed] * (1 - own[mixed]) / len(drawn))
        z = (share[mixed] - own[mixed]) / spread
        assert abs(z.mean()) < 0.2
        assert 0.8 < z.std() < 1.2, "every entry of a stratum is as likely as another"


def test_equal_values_share_a_decile() -> None:
    assert deciles(torch.tensor([0.0] * 5 + [-1.0, 2.0, 3.0, 4.0, 5.0])).tolist() == [0] * 5 + [5, 6, 7, 8, 9]


def test_a_matched_mask_of_other_matrices_weights_or_sparsity_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(checkpoint, None, checkpoint, selector="matched")
    for change in ({"sparsity": 0.2}, {"layers": (0, 1)}):
        other = make_job(checkpoint, None, checkpoint, **{"selector": "matched", **change})
        with pytest.raises(ConfigError, match=r"give a mask of the same \d+ matrices and sparsity"):
            SELECTORS["matched"](replace(other, inputs={**other.inputs, "mask": job.inputs["mask"]}))
    another = save_checkpoint(tmp_path / "another", seed=2)
    with pytest.raises(ConfigError, match="made for other weights"):
        SELECTORS["matched"](replace(job, inputs={**job.inputs, "model": another}))


def test_the_smallest_updates_are_those_that_peft_prunes(checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(checkpoint, None, save_checkpoint(tmp_path / "base", seed=1), selector="delta_magnitude")
    kept = SELECTORS["delta_magnitude"](job).kept
    for (site, weight), (_, earlier) in zip(job.weights(), job.base_weights(), strict=True):
        change = weight - earlier
        count = int((~kept[site.name]).sum())
        pruned = magnitude_based_pruning(change, 1 - count / change.numel() + 1e-9)
        assert torch.equal(pruned != 0, kept[site.name])


def test_dare_is_peft_s_pruning_with_rescaling_and_keeps_the_model_on_average(checkpoint: Path, tmp_path: Path) -> None:
    base, merged = save_checkpoint(tmp_path / "base", seed=1), []
    for seed in range(60):
        out = tmp_path / str(seed)
        inputs, context = {"model": checkpoint, "base": base}, make_context(tmp_path / "work")
        recipe = LearnMask(selector="dare", sparsity=0.5, layers="1", modules="q_proj", seed=seed)
        get_stage("learn-mask").run(recipe, inputs, out, context)
        merge(checkpoint, out / "mask", out / "model", rewind_to=base)
        name = load_mask(out / "mask").config.sites[0].name
        merged.append(WeightFiles(out / "model").tensor(name))
    weight, earlier = (WeightFiles(path).tensor(name) for path in (checkpoint, base))
    pruned = random_pruning(weight - earlier, 0.5, rescale=True)
    both = (pruned != 0) & (merged[0] != earlier)
    torch.testing.assert_close((merged[0] - earlier)[both], pruned[both])
    off = torch.stack(merged).mean(0) - weight
    assert off.square().mean() < 2 * (weight - earlier).square().mean() / len(merged)  # p / (1 − p) = 1 of the variance


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("granularity", ["row", "column"])
def test_whole_rows_or_columns_of_least_mean_magnitude_go(granularity: str, family: str, tmp_path: Path) -> None:
    job = make_job(save_checkpoint(tmp_path / "model", family), selector="magnitude", granularity=granularity)
    kept = SELECTORS["magnitude"](job).kept
    for site, weight in job.weights():
        lines, mask = ((tensor.t() if site.transposed else tensor) for tensor in (weight, kept[site.name]))
        if granularity == "column":
            lines, mask = lines.t(), mask.t()
        count = int(0.3 * lines.numel())
        assert int((~mask).sum()) == count
        whole, part = divmod(count, lines.shape[1])
        order = lines.abs().mean(1).argsort()
        assert not mask[order[:whole]].any()
        assert int((~mask[order[whole]]).sum()) == part, "the exact count ends within one line"
        assert mask[order[whole + 1 :]].all()


def test_random_rows_are_whole_and_of_their_seed(checkpoint: Path) -> None:
    drawn = []
    for seed in (1, 2):
        job = make_job(checkpoint, selector="random", granularity="row", sparsity=0.25, seed=seed)
        drawn.append(SELECTORS["random"](job).kept)
        for mask in drawn[-1].values():
            assert torch.equal(mask.any(1), mask.all(1))  # a quarter of these matrices is a number of whole rows
            assert int((~mask).sum()) == 0.25 * mask.numel()
    assert any(not torch.equal(drawn[0][name], mask) for name, mask in drawn[1].items())


def test_rows_of_a_learned_mask_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="granularity 'row' belongs to the selectors magnitude and random"):
        make_job(checkpoint, granularity="row", **_settings("learned"))

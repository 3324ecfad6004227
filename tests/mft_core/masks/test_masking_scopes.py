"""Every scope, and soft masks, against masks made inside the forward pass; killed and resumed, they end the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mft_core.masks.masking import MaskTuner
from mft_core.masks.sites import Site
from mft_core.optimizers.factory import optimizer_factory
from mft_core.selectors.soft import SoftMaskTuner
from mft_core.stage import Progress
from mft_core.training.loop import train
from tests.support.small_training import make_context, make_data, make_recipe
from tests.support.tiny import make_model

_STEPS = 4


def _adamw(scores: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(scores, lr=0.003, weight_decay=0.0)


def _make(model: Any, scope: str, *, soft: bool = False, steps: int = _STEPS, **settings: Any) -> MaskTuner:
    kind: Callable[..., MaskTuner] = SoftMaskTuner if soft else MaskTuner
    more = {"sparsity": 0.3, "layers": "1-2", "seed": 5, "optimizer": _adamw, **settings}
    return kind(model, scope=scope, **more, **({"steps": steps} if soft else {}))


def _lowest_removed(values: list[Tensor], sparsity: float, floor: float, together: bool) -> list[Tensor]:
    """The definition: sort, and remove from the bottom; of matrices together, what the floors protect is infinite."""
    if not together:
        return [_lowest_removed([value], sparsity, 0.0, True)[0] for value in values]
    guarded = []
    for value in values:
        flat = value.flatten().clone()
        keep = int(floor * flat.numel())
        flat[flat.sort(stable=True).indices[flat.numel() - keep :]] = torch.inf
        guarded.append(flat)
    flat = torch.cat(guarded)
    mask = torch.ones(flat.numel())
    mask[flat.sort(stable=True).indices[: int(sparsity * flat.numel())]] = 0
    sizes = [value.numel() for value in values]
    return [part.view(value.shape) for part, value in zip(mask.split(sizes), values, strict=True)]


def _in_forward(
    scores: list[Tensor], sites: list[Site], scope: str, floor: float, cuts: dict[str, float]
) -> list[Tensor]:
    """Hard masks whose gradient is that of |S|, or of S where thresholds are on S."""
    signed = scope == "global-threshold"
    values = [score if signed else score.abs() for score in scores]
    plain = [value.detach() for value in values]
    if signed:
        hard = [(value >= cuts[site.kind]).float() for value, site in zip(plain, sites, strict=True)]
    else:
        hard = _lowest_removed(plain, 0.3, floor, scope == "global")
    return [mask + value - value.detach() for mask, value in zip(hard, values, strict=True)]


def _gates(scores: list[Tensor], scope: str, step: int, widths: list[float]) -> list[Tensor]:
    hard = _lowest_removed([score.detach() for score in scores], 0.3, 0.0, scope == "global")
    sharpness = 10.0 * 100.0 ** (step / (_STEPS - 1))
    return [
        torch.sigmoid(sharpness / width * (score - score.detach()[mask == 0].max()))
        for score, mask, width in zip(scores, hard, widths, strict=True)
    ]


@pytest.mark.parametrize(
    ("family", "scope", "soft", "settings"),
    [
        ("llama", "global", False, {}),
        ("llama", "global", False, {"min_kept": 0.6}),
        ("llama", "global-threshold", False, {}),
        ("llama", "local", False, {"init": "magnitude"}),
        ("gpt2", "global-threshold", False, {"init": "kaiming-uniform"}),
        ("mixtral", "local", False, {}),
        ("mixtral", "global", False, {"min_kept": 0.6}),
        ("llama", "local", True, {}),
        ("llama", "global", True, {}),
    ],
)
def test_learning_is_that_of_masking_inside_the_forward_pass(
    family: str, scope: str, soft: bool, settings: dict[str, Any]
) -> None:
    base, model = make_model(family), make_model(family)
    weights = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    tuner = _make(model, scope, soft=soft, **settings)
    sites = tuner.sites
    scores = [nn.Parameter(score) for score in tuner.snapshot().values()]
    reference = _adamw(scores)
    widths = [float(score.detach().std()) for score in scores]
    cuts: dict[str, float] = {}
    for kind in ("attention", "mlp"):
        values = torch.cat([s.detach().flatten() for s, site in zip(scores, sites, strict=True) if site.kind == kind])
        cuts[kind] = float(values.sort().values[int(0.3 * values.numel())])
    generator = torch.Generator().manual_seed(0)
    for step in range(_STEPS):
        for _ in range(2):
            ids = torch.randint(3, 60, (3, 9), generator=generator)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            floor = settings.get("min_kept", 0.0)
            masks = _gates(scores, scope, step, widths) if soft else _in_forward(scores, sites, scope, floor, cuts)
            masked: dict[str, Any] = dict(weights)
            stacked: dict[str, list[Tensor]] = {}
            for site, mask in zip(sites, masks, strict=True):
                if site.index is None:
                    masked[site.parameter] = weights[site.parameter] * mask
                else:
                    stacked.setdefault(site.parameter, []).append(weights[site.parameter][site.index] * mask)
            masked |= {name: torch.stack(matrices) for name, matrices in stacked.items()}
            expected = functional_call(base, masked, (), {"input_ids": ids, "labels": ids, "use_cache": False}).loss
            expected.backward()
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
        tuner.step()
        reference.step()
        reference.zero_grad()
    if soft:
        for found, score in zip(tuner.snapshot().values(), scores, strict=True):
            torch.testing.assert_close(found, score.detach(), atol=1e-5, rtol=0)
        return
    final = _in_forward(scores, sites, scope, settings.get("min_kept", 0.0), cuts)
    for found, mask in zip(tuner.masks().values(), final, strict=True):
        assert torch.equal(found, mask.detach().round().bool())


class _KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("family", "scope", "soft"),
    [
        ("llama", "local", True),
        ("llama", "global", True),
        ("mixtral", "global", False),
        ("llama", "global-threshold", False),
    ],
)
def test_a_killed_training_ends_with_the_masks_of_an_undisturbed_one(
    family: str, scope: str, soft: bool, tmp_path: Path
) -> None:
    recipe = make_recipe(validations=5, keep="best", learning_rate=0.03)

    def run(work: Path, stop: int | None = None) -> Any:
        def report(progress: Progress) -> None:
            if progress.step == stop:
                raise _KilledError

        model = make_model(family)
        floor = {"min_kept": 0.2} if scope == "global" and not soft else {}
        tuner = _make(model, scope, soft=soft, steps=10, optimizer=optimizer_factory(recipe), **floor)
        context = replace(make_context(work, checkpoint_seconds=0), report=report)
        rows = train(tuner, make_data(), recipe, context).rows
        return rows, tuner.masks(), tuner.snapshot(), dict(model.named_parameters())

    whole = run(tmp_path / "whole")
    for stop in (3, 7):
        with pytest.raises(_KilledError):
            run(tmp_path / "killed", stop)
    again = run(tmp_path / "killed")
    assert whole[0] == again[0]
    for found, expected in zip(again[1:], whole[1:], strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_soft_masks_are_validated_as_the_hard_masks_that_they_become(tmp_path: Path) -> None:
    recipe = make_recipe(validations=1, learning_rate=0.03, max_steps=2)
    model = make_model()
    tuner = _make(model, "local", soft=True, steps=10, optimizer=optimizer_factory(recipe))
    loss = train(tuner, make_data(), recipe, make_context(tmp_path)).rows[-1]["validation_loss"]
    tuner.finish()
    other = _make(model, "local", sparsity=0.0)  # what `finish` has left is a model like any other
    again = train(
        other, make_data(), make_recipe(validations=1, max_steps=1, learning_rate=1e-9), make_context(tmp_path / "b")
    )
    assert again.rows[-1]["validation_loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finished_model_holds_the_mask_and_trains_like_any_other(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    tuner = _make(model, "local", soft=True)
    masks = tuner.masks()
    tuner.finish()
    for name, mask in masks.items():
        assert bool((model.get_parameter(name)[~mask] == 0).all())
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    ordinary = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    ordinary.step()
    assert all(weight.grad is not None and weight.grad.dtype == dtype for weight in model.parameters())

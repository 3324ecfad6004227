"""Interpolation between base and fine-tuned weights, against its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mft_core.errors import ConfigError
from mft_core.recipes import Interpolate
from mft_core.stages import get_stage
from tests.support.small_training import make_context
from tests.support.tiny import save_checkpoint


def interpolated(alpha: float, model: Path, base: Path, out: Path) -> dict[str, torch.Tensor]:
    """Run the stage, and return the weights that it wrote."""
    get_stage("interpolate").run(Interpolate(alpha=alpha), {"model": model, "base": base}, out, make_context(out))
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_every_weight_lies_at_the_share_between_base_and_fine_tuned_model(alpha: float, tmp_path: Path) -> None:
    places = [save_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate(("model", "base"))]
    tuned, base = (load_file(place / "model.safetensors") for place in places)
    made = interpolated(alpha, *places, tmp_path / "out")
    assert made.keys() == tuned.keys()
    for name, values in made.items():
        if alpha in (0, 1):
            assert torch.equal(values, tuned[name] if alpha else base[name]), name
        torch.testing.assert_close(values, alpha * tuned[name] + (1 - alpha) * base[name])


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    deeper = save_checkpoint(tmp_path / "base", num_hidden_layers=2)
    with pytest.raises(ConfigError, match="give the model that the fine-tuning started from"):
        interpolated(0.5, model, deeper, tmp_path / "out")

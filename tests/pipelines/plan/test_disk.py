"""The disk that a plan asks for is enough for what its stages leave and for the state of those that run."""

import pytest

from mft_core.geometry import read_geometry
from mft_core.recipes import Training
from mft_core.stages.flops_and_memory import state_bytes
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.cost.plan_view import as_dict
from pipelines.cost.predicted import bills
from pipelines.plan.plan import make_plan
from tests.support.mini import TRAINING, write_profile, write_study
from tests.support.tiny import make_model

SMALL = 1_000_000


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def needed(tmp_path):
    """Return what the plan of the variants needs in bytes, without the megabyte that it allows each stage."""

    def plan(*variants, overrides=(), seeds=(0,), **changes):
        profile = load_profile(str(write_profile(tmp_path, **changes)))
        study = load_study(str(write_study(tmp_path, list(variants), seeds)))
        store = ArtifactStore(tmp_path / "home")
        found = make_plan(study, profile, store, overrides)
        assert as_dict(bills([found], store)[0])["disk_needed_bytes"] == found.disk_needed
        return found.disk_needed - SMALL * len(found.steps)

    return plan


def test_a_fine_tuning_needs_its_checkpoint_two_states_and_the_snapshots_of_both(needed, model):
    weights = model.num_parameters()
    assert needed({"method": "fft"}) == weights * (4 + 24 + 12)
    last = {**TRAINING, "keep": "last", "precision": "bfloat16"}
    assert needed({"method": "fft"}, fine_tune=last) == weights * (2 + 24)


def test_a_mask_needs_a_bit_for_each_weight_and_the_state_of_its_scores_alone(needed, model):
    weights = model.num_parameters()
    masked = sum(p.numel() for n, p in model.named_parameters() if ".layers.1." in n or ".layers.2." in n)
    both = needed({"method": "fft"}, {"method": "mft"})
    assert both == pytest.approx(weights * (4 + 4 + 36) + masked / 8, rel=0.01)  # one training at a time
    two = needed({"method": "fft"}, {"method": "mft"}, overrides=["runtime.heavy_slots=2"])
    assert two == pytest.approx(both + masked * 36, rel=0.01)


def test_trainings_that_wait_for_a_slot_need_no_state_yet(needed, model):
    weights = model.num_parameters()
    one = needed({"method": "continued-fft"})
    assert needed({"method": "continued-fft"}, seeds=(0, 1, 2)) == one + 2 * weights * 4


def test_adapters_need_the_state_of_their_own_numbers_alone(needed, model):
    adapters = read_geometry(model.config.to_dict()).adapters(4)
    lora = {"rank": 4, "training": TRAINING}
    one = needed({"method": "lora"}, lora=lora)
    assert needed({"method": "lora"}, lora=lora, overrides=["runtime.heavy_slots=2"]) == one + adapters * 36


def test_lean_optimizers_have_a_smaller_state():
    sizes = {
        name: state_bytes(Training.model_validate({**TRAINING, "keep": "last", "optimizer": name}), 1000)
        for name in ("adamw", "adamw-8bit", "adafactor")
    }
    assert sizes == {"adamw": 24_000, "adamw-8bit": 12_062, "adafactor": 8_000}

"""What shipped studies promise of their designs, held on the profile `tiny`."""

from collections import Counter

import pytest

from mft_core.data.batching import plan_epochs
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan


@pytest.fixture
def variants(tmp_path):
    def of(study):
        return make_plan(load_study(study), load_profile("tiny"), ArtifactStore(tmp_path)).variants

    return of


def test_a_tuning_tries_as_many_settings_of_every_method_on_two_fine_tunings_or_more(variants):
    tried = Counter((item.setup.method, item.setup.replicate) for item in variants("tuning"))
    assert set(tried.values()) == {12}
    assert set(tried) == {(name, at) for name in ("fft", "continued-fft", "lora", "mft") for at in range(2)}
    of_masks = [item.setup.mask for item in variants("tuning") if item.setup.method == "mft"]
    dials = ("sparsity", "score_init"), ("learning_rate", "epochs")
    tried_values = [{getattr(mask, name) for mask in of_masks} for name in dials[0]]
    tried_values += [{getattr(mask.training, name) for mask in of_masks} for name in dials[1]]
    assert all(len(values) >= 3 for values in tried_values), "a choice can lie between two others"


def test_less_data_are_compared_at_equal_passes_and_at_equal_steps(variants):
    masks = {item.name: item.setup.mask for item in variants("data-ratio") if item.setup.method == "mft"}.values()
    whole = {mask.training.epochs for mask in masks if mask.fraction == 1}
    assert len(whole) == 1
    rows = 3_400

    def steps(mask):
        training = mask.training
        return len(plan_epochs(round(mask.fraction * rows), training.batch_size, training.epochs, 0))

    (most,) = {steps(mask) for mask in masks if mask.fraction == 1}
    for fraction in (0.1, 0.25, 0.5):
        own = [mask for mask in masks if mask.fraction == fraction]
        assert whole <= {mask.training.epochs for mask in own}, "equal passes"
        # the last step of a pass may be smaller, so that more passes are some steps more
        assert any(steps(mask) == pytest.approx(most, rel=0.03) for mask in own), "equal steps"

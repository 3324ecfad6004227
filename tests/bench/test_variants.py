"""What `make bench` times is one computation: the three variants agree on losses, gradients and masks."""

import pytest
import torch

from mft_core.masks.masking import MaskTuner
from mft_core.masks.sites import find_sites
from mft_core.recipes import Training
from tests.bench import memory
from tests.bench.variants import VARIANTS, make_variant, masked_weights
from tests.bench.worker import Job, Steps, make_model

LAYERS = [1, 2]
SPARSITY = 0.3


def job(variant):
    return Job(variant, "tiny", "cpu", "float32", LAYERS, SPARSITY, tokens=16)


def prepared(name, learning_rate):
    """Return the variant and its steps; the weights of the dense one begin as W ⊙ M of the first mask."""
    training = Training(learning_rate=learning_rate, epochs=1, batch_size=1)
    model = make_model(job(name))
    if name == "dense":
        masked = make_variant("mask", make_model(job(name)), LAYERS, SPARSITY, training).model
        model.load_state_dict(masked.state_dict())
    variant = make_variant(name, model, LAYERS, SPARSITY, training)
    return variant, Steps(job(name), variant)


def losses(steps, accumulation=2, count=3):
    found = []
    for _ in range(count):
        found.append(sum(steps.micro_batch(accumulation).item() for _ in range(accumulation)))
        steps.step()
    return found


def test_while_nothing_moves_the_three_variants_have_the_same_losses():
    found = {name: losses(prepared(name, learning_rate=1e-30)[1]) for name in VARIANTS}
    assert len(set(found["dense"])) == 3  # three different batches
    torch.testing.assert_close(found["mask"], found["dense"], atol=1e-6, rtol=0)
    torch.testing.assert_close(found["sorting"], found["dense"], atol=1e-6, rtol=0)


def test_mask_and_sorting_learn_the_same_masks_with_the_same_losses():
    (mask, mask_steps), (sorting, sorting_steps) = (prepared(name, learning_rate=0.01) for name in ("mask", "sorting"))
    first = mask.masks()
    torch.testing.assert_close(losses(mask_steps), losses(sorting_steps), atol=1e-5, rtol=0)
    for name, kept in sorting.masks().items():
        assert torch.equal(kept, mask.masks()[name]), name
    assert sum(int((kept != mask.masks()[name]).sum()) for name, kept in first.items()) > 1000


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_the_matrices_of_the_layers_and_nothing_else(name):
    variant, steps = prepared(name, learning_rate=0.01)
    steps.micro_batch(accumulation=1)
    trained = [parameter for parameter in variant.model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == masked_weights(make_model(job(name)), LAYERS)
    assert all(parameter.grad is not None for parameter in trained)


def test_memory_is_counted_to_the_byte():
    def work():
        kept = torch.zeros(1000)
        passing = torch.ones(3000)
        del passing
        return kept + 1

    assert memory.cpu_peak(work) == pytest.approx(4 * 4000, abs=256)


def test_a_mask_takes_scores_copy_states_and_gradient_and_no_more_than_a_matrix_beside():
    model = make_model(job("mask"))
    weights = masked_weights(model, LAYERS)
    largest = max(site.of(dict(model.named_parameters())).numel() for site in find_sites(model))

    def work():
        tuner = MaskTuner(model, sparsity=SPARSITY, layers="1-2", seed=0, optimizer=torch.optim.AdamW)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        tuner.step()

    held = weights * (4 + 4 + 8 + 4)
    assert held <= memory.cpu_peak(work) <= held + 16 * largest + 100_000

"""Optimizer steps and micro-batches: nothing lost, nothing twice, the loss the same however it is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_core.data.batching import IGNORED, micro_batches, plan_epochs
from mft_core.data.tokens import TokenDataset
from tests.support.tiny import make_model


def random_dataset(lengths, seed=0, vocabulary=300):
    generator = np.random.default_rng(seed)
    return TokenDataset.from_examples(
        [(generator.integers(3, vocabulary, length), generator.random(length) < 0.5) for length in lengths]
    )


plans = st.tuples(st.integers(1, 40), st.integers(1, 12), st.floats(0.05, 3.5), st.integers(0, 5))


@given(plans)
def test_every_epoch_shows_every_example_exactly_once(plan):
    examples, batch_size, epochs, seed = plan
    steps = list(plan_epochs(examples, batch_size, epochs, seed))
    seen = [int(index) for step in steps for index in step]
    assert len(seen) == math.ceil(round(examples * epochs, 6))
    for start in range(0, len(seen), examples):
        epoch = seen[start : start + examples]
        assert len(set(epoch)) == len(epoch)
    assert set(seen[:examples]) <= set(range(examples))
    assert all(0 < len(step) <= batch_size for step in steps)


@given(plans, st.data())
def test_a_step_asked_for_by_number_is_the_step_of_the_undisturbed_run(plan, data):
    undisturbed = list(plan_epochs(*plan))
    k = data.draw(st.integers(0, len(undisturbed) - 1))
    assert plan_epochs(*plan)[k].tolist() == undisturbed[k].tolist()


def test_the_number_of_steps_is_known_in_advance_and_an_incomplete_batch_is_kept():
    plan = plan_epochs(10, 4, 2.5, 0)
    assert [len(step) for step in plan] == [4, 4, 2, 4, 4, 2, 4, 1]
    assert len(plan) == 8
    assert len(plan_epochs(10, 4, 0.1 + 0.2, 0)) == 1  # three examples: 0.30000000000000004 is not a fourth


def test_epochs_and_seeds_shuffle_differently():
    plan = plan_epochs(50, 50, 2, 0)
    assert plan[0].tolist() != plan[1].tolist()
    assert plan[0].tolist() != plan_epochs(50, 50, 2, 1)[0].tolist()


def test_a_step_beyond_the_plan_is_refused():
    with pytest.raises(IndexError, match="step 3 of 3"):
        plan_epochs(10, 4, 1, 0)[3]


def examples_in(batch):
    """Take a micro-batch apart again: (token ids, labels) of every example in it."""
    found = []
    for row in range(len(batch["input_ids"])):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        if "position_ids" in batch:
            starts = [i for i, position in enumerate(batch["position_ids"][row].tolist()) if position == 0]
            bounds = zip(starts, [*starts[1:], len(ids)], strict=True)
            parts = [(ids[a:b], labels[a:b]) for a, b in bounds]
            found += [part for part in parts if any(part[0])]  # token 0 only stands in the padding
        else:
            length = int(batch["attention_mask"][row].sum())
            assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (len(ids) - length)
            assert set(labels[length:]) <= {IGNORED}
            found.append((ids[:length], labels[:length]))
    return found


@settings(max_examples=150)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=25), st.integers(1, 120), st.booleans())
def test_cutting_a_step_keeps_every_token_and_every_label_exactly_once(lengths, limit, packing):
    dataset = random_dataset(lengths)
    indices = np.arange(len(lengths))
    step = micro_batches(dataset, indices, limit, packing)

    expected = []
    for index in indices:
        ids, in_loss = dataset.example(index)
        expected.append((ids.tolist(), np.where(in_loss, ids, IGNORED).tolist()))
    assert sorted(part for batch in step.batches for part in examples_in(batch)) == sorted(expected)
    assert step.loss_tokens == dataset.loss_tokens
    assert step.tokens == sum(lengths)
    for batch in step.batches:
        assert batch["input_ids"].numel() <= limit or len(batch["input_ids"]) == 1
        assert batch["input_ids"].shape[1] <= max(lengths)


def test_only_the_examples_of_the_step_are_laid_out():
    dataset = random_dataset([4, 9, 5])
    step = micro_batches(dataset, np.array([2]), 100, packing=False)
    assert [ids for ids, _ in examples_in(step.batches[0])] == [dataset.example(2)[0].tolist()]
    assert step.tokens == 5


def test_examples_of_similar_length_share_a_micro_batch():
    dataset = random_dataset([10, 2, 10, 2, 10, 2])
    step = micro_batches(dataset, np.arange(6), 30, packing=False)
    assert [tuple(batch["input_ids"].shape) for batch in step.batches] == [(3, 10), (3, 2)]


@pytest.mark.parametrize(
    ("lengths", "limit", "shapes"),
    [
        ([10, 6, 4, 5, 5], 100, [(3, 10)]),
        ([10, 6, 4, 5, 5], 20, [(2, 10), (1, 10)]),
        ([10, 6, 4, 7], 100, [(3, 10)]),
    ],
)
def test_packing_fills_rows_as_wide_as_the_longest_example(lengths, limit, shapes):
    step = micro_batches(random_dataset(lengths), np.arange(len(lengths)), limit, packing=True)
    assert [tuple(batch["input_ids"].shape) for batch in step.batches] == shapes


def losses_by_example(model, dataset, packing, limit):
    """Return each example's losses, token by token, keyed by its tokens."""
    losses = {}
    with torch.no_grad():
        for batch in micro_batches(dataset, np.arange(len(dataset)), limit, packing).batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=IGNORED
            )
            marked = (torch.nn.functional.pad(loss, (1, 0)) + 1) * (batch["input_ids"] != 0)
            parts = zip(examples_in(batch), examples_in({**batch, "input_ids": marked}), strict=True)
            for (ids, _), (values, _) in parts:
                losses[tuple(ids)] = torch.tensor(values) - 1.0
    return losses


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_packed_example_has_the_same_loss_at_every_token_as_alone(attention, family):
    torch.set_num_threads(1)
    model = make_model(family)
    model.set_attn_implementation(attention)
    dataset = random_dataset([17, 5, 9, 12, 3, 7, 2, 16, 1])
    alone = losses_by_example(model, dataset, packing=False, limit=1)
    for packing, limit in [(True, 40), (True, 1000), (False, 60)]:
        together = losses_by_example(model, dataset, packing, limit)
        assert together.keys() == alone.keys()
        for ids, expected in alone.items():
            assert torch.allclose(together[ids], expected, atol=1e-5, rtol=0)
    assert max(values.max() for values in alone.values()) > 1  # not all zero


def test_the_models_own_loss_over_a_packed_step_counts_the_labels_that_were_reported():
    torch.set_num_threads(1)
    model = make_model()
    dataset = random_dataset([17, 5, 9, 12, 3])
    sums = {}
    for packing in (True, False):
        step = micro_batches(dataset, np.arange(5), 1000, packing)
        with torch.no_grad():
            sums[packing] = sum(
                model(**batch, use_cache=False, num_items_in_batch=step.loss_tokens).loss for batch in step.batches
            )
    assert torch.allclose(sums[True], sums[False], atol=1e-5, rtol=0)

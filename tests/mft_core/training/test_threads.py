"""Two heavy stages in one process: neither changes what the other computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mft_core.checkpoints import files as checkpoint_io
from mft_core.checkpoints.files import load_model, skeleton
from mft_core.compute import PROCESS_WIDE
from mft_core.draws import seeded_generator
from mft_core.masks.masking import MaskTuner, initial_scores
from mft_core.recipes import Training
from mft_core.selectors import SELECTORS
from mft_core.stage import Progress, StageContext
from mft_core.training.full_tuning import FullTuner
from mft_core.training.loop import History, train
from tests.support.small_training import make_context, make_data, make_job, make_recipe, make_trainable
from tests.support.tiny import make_model, save_checkpoint


def prepare(recipe: Training) -> MaskTuner | FullTuner:
    """Make a model, with attention dropout as the recipe has it, and what learns its mask."""
    model = make_model()  # draws from the process's generator: not beside a training
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = recipe.dropout
    return make_trainable("mask", model, recipe)


def run(
    recipe: Training,
    work: Path,
    told: Callable[[Progress], None] = lambda progress: None,
    trainable: MaskTuner | FullTuner | None = None,
) -> History:
    """Learn a mask."""
    context = make_context(work)
    context = StageContext(context.runtime, work, told, context.log)
    return train(trainable or prepare(recipe), make_data(), recipe, context)


def free_for_others() -> bool:
    """Say whether another thread could take the lock now."""
    taken: list[bool] = []

    def attempt() -> None:
        taken.append(PROCESS_WIDE.acquire(blocking=False))
        if taken[0]:
            PROCESS_WIDE.release()

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return taken[0]


def test_trainings_with_dropout_in_two_threads_end_as_if_each_was_alone(tmp_path: Path) -> None:
    recipes = [make_recipe(dropout=0.2, seed=seed) for seed in (1, 2)]
    alone = [run(recipe, tmp_path / f"alone-{recipe.seed}") for recipe in recipes]
    together: dict[int, History] = {}

    def one(recipe: Training, trainable: MaskTuner | FullTuner) -> None:
        together[recipe.seed] = run(recipe, tmp_path / f"together-{recipe.seed}", trainable=trainable)

    threads = [threading.Thread(target=one, args=(recipe, prepare(recipe))) for recipe in recipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[1].rows, together[2].rows] == [history.rows for history in alone]
    assert alone[0].rows != run(make_recipe(seed=1), tmp_path / "quiet").rows


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_processs_generators_are_used_only_with_dropout_and_then_alone(dropout: float, tmp_path: Path) -> None:
    before, free, touched = torch.get_rng_state(), [], []

    def told(progress: Progress) -> None:
        free.append(free_for_others())
        touched.append(not torch.equal(torch.get_rng_state(), before))

    run(make_recipe(dropout=dropout), tmp_path, told)
    assert set(free) == {dropout == 0}
    assert set(touched) == {dropout > 0}
    assert torch.equal(torch.get_rng_state(), before)
    assert free_for_others()


def test_a_training_beside_a_model_that_is_loaded_in_bfloat16_has_the_same_losses(tmp_path: Path) -> None:
    expected = run(make_recipe(), tmp_path / "alone")

    def told(progress: Progress) -> None:  # as if another thread were loading from here on
        torch.set_default_dtype(torch.bfloat16)

    try:
        assert run(make_recipe(), tmp_path / "beside", told).rows == expected.rows
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("init", ["normal", "kaiming-uniform", "magnitude"])
def test_scores_and_random_masks_do_not_depend_on_the_default_dtype(init: Any, tmp_path: Path) -> None:
    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        job = make_job(save_checkpoint(tmp_path / "model"), selector="random")
        mask = SELECTORS["random"](job).kept[job.sites[0].name]
        return initial_scores(torch.ones(8, 8), init, seeded_generator(1, "a")), mask

    expected = draw()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0].dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["from_pretrained", "from_config"])
def test_models_are_loaded_by_one_thread_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, original, free = save_checkpoint(tmp_path / "model"), getattr(AutoModelForCausalLM, name), []

    class Watched:
        @staticmethod
        def load(*arguments: Any, **options: Any) -> Any:
            free.append(free_for_others())
            return original(*arguments, **options)

    setattr(Watched, name, Watched.load)
    monkeypatch.setattr(checkpoint_io, "AutoModelForCausalLM", Watched)
    if name == "from_pretrained":
        load_model(directory, torch.bfloat16, torch.device("cpu"))
    else:
        skeleton(directory)
    assert free == [False]
    assert free_for_others()

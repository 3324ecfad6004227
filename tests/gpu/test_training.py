"""Training on a GPU: in bfloat16, packed, divided, in 8 bits, and where the memory ends; float32 is the CPU's."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mft_core.data.batching import IGNORED, micro_batches
from mft_core.data.tokens import TokenDataset
from mft_core.errors import StageError
from mft_core.masks.mask_file import load_mask
from mft_core.recipes import FineTune, LearnMask
from mft_core.stages import get_stage
from mft_core.training import attention
from mft_core.training.loop import TrainingData, train
from mft_core.training.loss import packed_rows
from tests.gpu import memory
from tests.support.small_training import make_context, make_data, make_recipe, make_trainable, save_data
from tests.support.tiny import make_model, save_checkpoint

pytestmark = pytest.mark.gpu

LONGER: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}


def run_stage(recipe: FineTune | LearnMask, root: Path, **runtime: Any) -> dict[str, Any]:
    """Run a training stage on a tiny checkpoint on the GPU; `out` lies under `root`."""
    if not (root / "model").exists():
        save_checkpoint(root / "model", **LONGER)
        save_data(root / "data")
    name = "learn-mask" if isinstance(recipe, LearnMask) else "fine-tune"
    out = root / f"{name}-{len(list(root.iterdir()))}"
    out.mkdir()
    context = make_context(out / "work", **{"device": "cuda", **runtime})
    inputs = {"model": root / "model", "data": root / "data"}
    return {**get_stage(name).run(recipe, inputs, out, context), "out": out}


def lively(family: str, **changes: Any) -> Any:
    """Return a model on the GPU, float32, that looks at other tokens more than a random one does."""
    model = make_model(family, **LONGER, **changes)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3
    return model.cuda()


@pytest.mark.parametrize("kind", ["full", "mask"])
def test_in_float32_the_losses_are_those_of_the_cpu(kind: str, tmp_path: Path) -> None:
    recipe, losses = make_recipe(max_steps=6, validations=1), {}
    for place in ("cpu", "cuda"):
        trainable = make_trainable(kind, make_model().to(place), recipe)
        history = train(trainable, make_data(), recipe, make_context(tmp_path / place))
        losses[place] = [row["loss"] for row in history.rows] + [history.rows[-1]["validation_loss"]]
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=1e-3)


def test_a_model_is_fine_tuned_and_a_mask_learned_in_bfloat16(tmp_path: Path) -> None:
    training = make_recipe(precision="bfloat16", epochs=4, validations=2, learning_rate=0.003)
    tuned = run_stage(FineTune(training=training), tmp_path)
    assert tuned["final_loss"] < tuned["first_loss"] - 1
    own = training.model_copy(update={"learning_rate": 0.01})
    recipe = LearnMask(sparsity=0.3, layers="1-2", score_init="normal", training=own)
    learned = run_stage(recipe, tmp_path)
    assert learned["final_loss"] < learned["first_loss"]
    masks = load_mask(learned["out"] / "mask").kept
    assert all(int((~mask).sum()) == int(0.3 * mask.numel()) for mask in masks.values())


def examples(lengths: list[int]) -> TokenDataset:
    """Return examples of these lengths in which every token counts."""
    random = np.random.default_rng(0)
    return TokenDataset.from_examples([(random.integers(3, 380, n), np.ones(n, bool)) for n in lengths])


@torch.no_grad()
def losses_by_example(model: Any, data: TokenDataset, packing: bool, bfloat16: bool) -> dict[tuple[int, ...], Tensor]:
    """Return each example's losses, token by token, keyed by its tokens."""
    found = {}
    for batch in micro_batches(data, np.arange(len(data)), 100_000, packing).batches:
        arguments = {name: value.cuda() for name, value in batch.items() if name != "labels"}
        if packing:
            arguments |= attention.bounds(model, batch["position_ids"])
        with torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            logits = model(**arguments, use_cache=False).logits
        labels = batch["labels"][:, 1:].cuda()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
        )
        loss = torch.nn.functional.pad(loss, (1, 0)).cpu()
        for row, ids in enumerate(batch["input_ids"]):
            positions = batch["position_ids"][row] if packing else torch.arange(len(ids))
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for start, stop in itertools.pairwise(starts):
                own = slice(start, start + int((ids[start:stop] != 0).sum()))
                found[tuple(ids[own].tolist())] = loss[row, own][1:]
    found.pop((), None)  # padding
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 8}),
        ("llama", {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 16}),
        ("gemma3_text", {"sliding_window": 16}),
        ("phi3", {}),
        ("mixtral", {}),
    ],
    ids=str,
)
def test_packed_examples_have_the_losses_that_they_have_alone_token_by_token(
    family: str, changes: dict[str, Any]
) -> None:
    model = make_model(family, **(LONGER | changes)).cuda()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 2
    data = examples([150, 17, 5, 90, 12, 3, 130, 7, 2, 16, 1])
    true = losses_by_example(model, data, packing=False, bfloat16=False)
    padded = losses_by_example(model, data, packing=False, bfloat16=True)
    before = model.config._attn_implementation
    with packed_rows(model, kernel=True) as packs:
        assert packs
        assert model.config._attn_implementation == attention.NAME
        packed = losses_by_example(model, data, packing=True, bfloat16=True)
    assert model.config._attn_implementation == before
    assert packed.keys() == padded.keys() == true.keys()
    wrong = {name: max(float((of[ids] - true[ids]).abs().max()) for ids in true if len(ids) > 1) for name, of in
             {"padded": padded, "packed": packed}.items()}  # fmt: skip
    mixed = examples([sum(data.lengths)])
    mixed.input_ids[:] = data.input_ids
    alone = torch.cat([true[tuple(data.example(index)[0].tolist())] for index in range(len(data))])
    as_one = next(iter(losses_by_example(model, mixed, packing=False, bfloat16=False).values()))
    kept = torch.ones(len(as_one), dtype=torch.bool)
    kept[data.offsets[1:-1] - 1] = False
    apart = float((as_one[kept] - alone).abs().max())
    print(f"{family} {changes}: bfloat16 padded {wrong['padded']:.4f}, packed {wrong['packed']:.4f}, mixed {apart:.3f}")
    assert wrong["packed"] < 2 * wrong["padded"] + 0.01
    assert wrong["packed"] < 0.3 * apart


def test_gradients_of_packed_rows_are_those_of_padded_ones(tmp_path: Path) -> None:
    """Losses of several steps in bfloat16 with the kernel follow those in float32 without it."""
    recipe, data = make_recipe(max_steps=8, learning_rate=0.003), make_data()
    for kind in ("full", "mask"):
        losses = []
        for precision in ("float32", "bfloat16"):
            own = recipe.model_copy(update={"precision": precision})
            trainable = make_trainable(kind, lively("llama"), own)
            history = train(trainable, data, own, make_context(tmp_path / f"{kind} {precision}"))
            losses.append([row["loss"] for row in history.rows])
        assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_models_that_the_kernel_is_not_for_are_trained_with_their_own_attention(family: str, tmp_path: Path) -> None:
    recipe = make_recipe(max_steps=3, precision="bfloat16", learning_rate=0.001)
    history = train(
        make_trainable("full", make_model(family).cuda(), recipe), make_data(), recipe, make_context(tmp_path)
    )
    assert len(history.rows) == 3


def test_activations_recomputed_in_the_backward_pass_give_the_same_losses_with_the_kernel(tmp_path: Path) -> None:
    training = make_recipe(precision="bfloat16", max_steps=4, learning_rate=0.003)
    plain, recomputed = (
        run_stage(FineTune(training=training), tmp_path, gradient_checkpointing=way) for way in (False, True)
    )
    assert recomputed["final_loss"] == pytest.approx(plain["final_loss"], abs=2e-3)


def test_one_process_that_divides_its_model_trains_it_as_a_whole_one(tmp_path: Path) -> None:
    """FSDP2 through the elastic launcher, NCCL included."""
    for precision, distance in (("float32", 1e-4), ("bfloat16", 0.02)):
        recipe = FineTune(training=make_recipe(precision=precision, learning_rate=0.003, validations=2, keep="best"))
        whole = run_stage(recipe, tmp_path)
        divided = run_stage(recipe, tmp_path, shard=True)
        assert (divided["out"] / "work/processes").is_dir()
        assert divided["final_loss"] == pytest.approx(whole["final_loss"], abs=distance)
        assert divided["steps"] == whole["steps"]
        assert (divided["out"] / "model/model.safetensors").is_file()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_with_moments_of_8_bits_a_training_ends_near_adamws_loss(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: no 8-bit optimizer")
    ends = {}
    for optimizer in ("adamw", "adamw-8bit"):
        training = make_recipe(precision=precision, optimizer=optimizer, learning_rate=0.003, epochs=4)
        ends[optimizer] = run_stage(FineTune(training=training), tmp_path)
    assert ends["adamw"]["final_loss"] < ends["adamw"]["first_loss"] - 1
    assert ends["adamw-8bit"]["final_loss"] == pytest.approx(ends["adamw"]["final_loss"], abs=0.3)


def wide() -> Any:
    """Return a model whose activations take far more than its weights."""
    return make_model(hidden_size=512, intermediate_size=2048, num_attention_heads=8, head_dim=64).cuda()


@pytest.mark.parametrize("kind", ["full", "mask"])
def test_where_memory_ends_micro_batches_get_smaller_and_the_result_is_the_same(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = TrainingData(examples([512] * 32), examples([512] * 16))
    recipe = make_recipe(epochs=1, batch_size=16, validations=1, max_steps=2, learning_rate=0.001)
    ends: list[Any] = []

    def work(name: str) -> None:
        trainable = make_trainable(kind, wide(), recipe)
        context = make_context(tmp_path / name, micro_batch_tokens=8192)
        history = train(trainable, data, recipe, context)
        losses = [row["loss"] for row in history.rows] + [history.rows[-1]["validation_loss"]]
        ends.append((losses, {name: value.cpu() for name, value in trainable.snapshot().items()}))

    work("first")  # what libraries allocate once
    before, most = memory.peak(lambda: work("undisturbed"))
    assert most - before > 500e6
    failures = memory.times_out_of_memory()
    memory.allow(before + int(0.6 * (most - before)))
    with caplog.at_level(logging.WARNING):
        work("short")
    assert memory.times_out_of_memory() > failures
    assert "the same step again, and all that follow, with at most" in caplog.text
    _, (losses, weights), (cut_losses, cut_weights) = ends
    assert cut_losses == pytest.approx(losses, abs=1e-4)
    for name, weight in weights.items():
        assert float((cut_weights[name] - weight).abs().mean()) < 1e-4, name


def test_where_not_even_one_sequence_fits_the_error_says_what_to_set(tmp_path: Path) -> None:
    recipe = make_recipe(epochs=1, batch_size=16, max_steps=1)
    data = TrainingData(examples([512] * 16), examples([]))
    trainable = make_trainable("full", wide(), recipe)
    memory.allow(torch.cuda.memory_allocated() + 120 * 2**20)
    with pytest.raises(StageError, match=r"out of memory in a pass over 1 x 512 tokens .*gradient_checkpointing"):
        train(trainable, data, recipe, make_context(tmp_path))

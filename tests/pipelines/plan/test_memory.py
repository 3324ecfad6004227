"""The memory that a plan announces is what torch allocates, and follows what the runtime says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mft_core.data.tokens import TokenDataset
from mft_core.geometry import read_geometry
from mft_core.masks.masking import MaskTuner
from mft_core.masks.sites import find_sites
from mft_core.methods import CALIBRATED, SELECTORS, TRAINED
from mft_core.optimizers.factory import dtype_in_training, optimizer_factory
from mft_core.recipes import Evaluate, FineTune, LearnMask, Lora, MergeMask, PrepareData, Runtime, Training
from mft_core.stage import Facts
from mft_core.stages import STAGES
from mft_core.stages import flops_and_memory as needs
from mft_core.stages.flops_and_memory import PROCESS
from mft_core.store.artifacts import ArtifactStore
from mft_core.training import loss
from mft_core.training.activations import recompute_activations
from mft_core.training.full_tuning import FullTuner
from mft_core.training.loop import TrainingData, train
from mft_core.training.lora import LoraTuner
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.cost.plan_view import as_dict, show
from pipelines.cost.predicted import bills
from pipelines.plan.plan import make_plan
from tests.bench.memory import cpu_peak
from tests.support.mini import write_profile, write_study
from tests.support.small_training import make_context

LENGTH = 64
SMALL = {
    "vocab_size": 1024, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA2_7B = {}
"""transformers' defaults"""


def training(**changes):
    return Training.model_validate({"learning_rate": 1e-4, "epochs": 2, "batch_size": 4, "warmup_share": 0, **changes})


def mask_of(layers="1-2", **changes):
    if changes.get("selector", "learned") in TRAINED:
        changes = {"score_init": "normal", "training": training(), **changes}
    return LearnMask.model_validate({"sparsity": 0.1, "layers": layers, **changes})


@pytest.fixture
def parts():
    """Return a stage's memory by part, for a Llama of some sizes."""

    def of(recipe, fields=SMALL, max_length=LENGTH, family="llama", **runtime):
        config = json.loads(AutoConfig.for_model(family, **fields).to_json_string())
        settings = Runtime.model_validate(runtime)
        facts = Facts(read_geometry(config), settings, "bfloat16", max_length, train=100, mask=mask_of())
        (stage,) = [stage for stage in STAGES.values() if stage.recipe is type(recipe)]
        return stage.needs(recipe, facts).memory

    return of


def total(parts):
    return sum(parts.values())


def billions(parts):
    return total(parts) / 1e9


def trainable(recipe, fields=SMALL, family="llama"):
    """Return what the stage of the recipe trains, of a model with random weights."""
    factory = optimizer_factory(recipe.training)
    small = recipe.training.precision == "bfloat16"
    fine_tune = isinstance(recipe, FineTune)
    dtype = dtype_in_training(recipe) if fine_tune else torch.bfloat16 if small else torch.float32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=dtype)
    if not fine_tune:
        return MaskTuner(model, sparsity=0.1, layers="1-2", modules=recipe.modules, seed=0, optimizer=factory)
    if recipe.lora:
        return LoraTuner(model, find_sites(model), recipe.lora, seed=0, optimizer=factory, sparse=recipe.sparse)
    return FullTuner(model, optimizer=factory)


def random_data():
    """Return four sequences of the full length, all of it in the loss, as the estimate takes them to be."""
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(SMALL["vocab_size"], size=LENGTH), np.arange(LENGTH) > 0) for _ in range(4)]
    return TrainingData(TokenDataset.from_examples(pairs), TokenDataset.from_examples(pairs[:1]))


MEASURED = {
    "full": FineTune(training=training()),
    "full in mixed precision": FineTune(training=training(precision="bfloat16")),
    "full with factored moments": FineTune(training=training(optimizer="adafactor")),
    "adapters": FineTune(training=training(precision="bfloat16"), lora=Lora(rank=8, dropout=0)),
    "sparse adapters": FineTune(training=training(), lora=Lora(rank=8, dropout=0), sparse=True),
    "mask": mask_of(),
    "mask of the attention in bfloat16": mask_of(modules="attention", training=training(precision="bfloat16")),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MEASURED)
def test_training_takes_the_memory_that_was_estimated(name, recompute, parts, tmp_path):
    recipe = MEASURED[name]
    settings = {"micro_batch_tokens": 2 * LENGTH, "gradient_checkpointing": recompute}
    context = make_context(tmp_path, **settings)

    def work():
        trained = trainable(recipe)
        if recompute:
            recompute_activations(trained.model, noise=False)
        train(trained, random_data(), recipe.training, context)

    estimated = total(parts(recipe, **settings)) - PROCESS
    assert cpu_peak(work) == pytest.approx(estimated, rel=0.12)


FAMILIES = {
    "gemma2": {"head_dim": 24, "tie_word_embeddings": True},
    "gpt2": {"n_inner": 256, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "gpt_neox": {},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_holds_for_other_families(family, parts, tmp_path):
    recipe, settings = MEASURED["full"], {"micro_batch_tokens": 2 * LENGTH}
    fields = {**SMALL, **FAMILIES[family]}

    def work():
        train(trainable(recipe, fields, family), random_data(), recipe.training, make_context(tmp_path, **settings))

    estimated = total(parts(recipe, fields, family=family, **settings)) - PROCESS
    assert cpu_peak(work) == pytest.approx(estimated, rel=0.12)


def test_llama2_7b_takes_what_its_weights_scores_and_states_take(parts):
    learned = parts(mask_of("4-7", training=training(precision="bfloat16")), LLAMA2_7B)
    assert learned["weights"] == 2 * 6_738_415_616
    assert learned["copy of the masked weights"] == 2 * 809_500_672
    assert learned["scores"] == learned["gradients"] == 4 * 809_500_672
    assert learned["optimizer"] == 8 * 809_500_672
    full = parts(FineTune(training=training(precision="bfloat16")), LLAMA2_7B)
    assert full["weights"] + full["gradients"] + full["optimizer"] == 16 * 6_738_415_616
    assert learned["activations"] < full["activations"]  # autograd stops at layer 4


def test_llama2_7b_is_fine_tuned_on_80_gb_with_lean_optimizer_and_recomputed_activations(parts):
    paper = {"max_length": 4096, "gradient_checkpointing": True}
    lean = training(precision="bfloat16", optimizer="adamw-8bit", batch_size=128)
    assert billions(parts(FineTune(training=lean), LLAMA2_7B, **paper)) < 80
    usual = training(precision="bfloat16", batch_size=128)
    assert billions(parts(FineTune(training=usual), LLAMA2_7B, **paper)) > 100
    mask = mask_of("4-7", training=usual)
    assert billions(parts(mask, LLAMA2_7B, **paper)) < 40 < billions(parts(mask, LLAMA2_7B, max_length=4096)) < 80


def test_many_logits_are_made_a_part_at_a_time(parts, monkeypatch):
    assert needs.MOST_LOGITS == loss.MOST_LOGITS
    wide, lean = {**SMALL, "vocab_size": 100_000}, {"micro_batch_tokens": 100_000, "max_length": 1000}
    recipe = FineTune(training=training(batch_size=100))
    divided = parts(recipe, wide, **lean)["activations"]
    monkeypatch.setattr(needs, "MOST_LOGITS", 2**60)
    assert parts(recipe, wide, **lean)["activations"] - divided > 12 * (100_000 * 100_000 - 2**26) * 0.99


def test_memory_follows_micro_batch_processes_and_sharding(parts):
    recipe = FineTune(training=training(batch_size=8))
    one = parts(recipe, micro_batch_tokens=2 * LENGTH)
    four = parts(recipe, micro_batch_tokens=8 * LENGTH)
    assert four["activations"] > 2 * one["activations"]
    assert parts(recipe, micro_batch_tokens=100 * LENGTH) == four  # a step has no more than eight sequences
    assert parts(recipe, micro_batch_tokens=1) == parts(recipe, micro_batch_tokens=LENGTH)  # one goes beyond the limit
    two = parts(recipe, micro_batch_tokens=100 * LENGTH, processes=2)
    assert two["activations"] < four["activations"]  # four sequences each
    assert two["weights"] == four["weights"]
    shared = parts(recipe, micro_batch_tokens=100 * LENGTH, processes=2, shard=True)
    assert shared["optimizer"] * 2 == two["optimizer"]
    assert shared["weights"] * 2 == two["weights"]


def test_a_mask_of_higher_layers_keeps_fewer_activations(parts):
    assert parts(mask_of("3"))["activations"] < parts(mask_of("0"))["activations"]
    assert parts(mask_of("0", modules="attention"))["scores"] < parts(mask_of("0"))["scores"]


def test_one_ranking_over_all_matrices_takes_more_than_one_in_each(parts):
    recipe = {"selector": "magnitude", "layers": "all"}
    assert total(parts(mask_of(**recipe, scope="global"))) > total(parts(mask_of(**recipe)))


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_every_selector_is_estimated(selector, parts):
    rows = {"calibration_rows": 16} if selector in CALIBRATED else {}
    found = parts(mask_of(selector=selector, **rows))
    row = SELECTORS[selector]
    assert ("weights" in found) == (selector in TRAINED | CALIBRATED)
    assert ("gradients" in found) == (row.trained or row.observes == "gradients")
    assert ("base model's masked weights" in found) == (row.rewinds and row.trained)
    assert ("base model's matrix" in found) == (row.sees_base and not row.trained)
    assert ("strata" in found) == (row.matches is not None)
    assert total(found) > PROCESS


def test_an_evaluation_grows_with_the_sequences_decoded_together(parts):
    recipe = Evaluate(task="gsm8k", num_fewshot=8, precision="bfloat16")
    few, many = (parts(recipe, LLAMA2_7B, eval_batch_size=size) for size in (8, 400))
    assert few["weights"] == many["weights"] == 2 * 6_738_415_616
    assert many["keys and values"] == 50 * few["keys and values"]
    assert few["keys and values"] == 8 * (9 * 128 + 256) * 2 * 4096 * 32 * 2


def test_a_merge_holds_the_checkpoint_and_the_mask(parts):
    assert parts(MergeMask(), LLAMA2_7B)["weights"] == 2 * 6_738_415_616


def test_a_stage_without_a_model_takes_what_a_process_takes(parts):
    assert parts(PrepareData.model_validate({"mixture": [{}], "max_length": 64})) == {"process": PROCESS}


@pytest.fixture
def mini_plan(tmp_path):
    profile = load_profile(str(write_profile(tmp_path)))
    return make_plan(load_study(str(write_study(tmp_path))), profile, ArtifactStore(tmp_path / "home"))


def test_a_plan_says_the_peak_of_every_stage_before_it_runs(mini_plan, tmp_path, capsys):
    bill = bills([mini_plan], ArtifactStore(tmp_path / "home"))[0]
    stages = as_dict(bill)["stages"]
    assert all(stage["peak_memory_bytes"] == sum(stage["memory_parts_bytes"].values()) for stage in stages)
    peaks = {stage["stage"]: stage["peak_memory_bytes"] for stage in reversed(stages)}  # the first of each
    assert peaks["prepare-data"] == PROCESS < peaks["merge-mask"] < peaks["learn-mask"] < peaks["fine-tune"]
    show(bill)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(tuple(peaks))]
    assert len(rows) >= len(peaks)
    assert all(" GB " in row for row in rows)


SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
"""SmolLM2-135M's sizes, but for the number of its layers"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_training_stage_takes_the_memory_that_was_promised_within_a_fifth(tmp_path):
    code = f"from pathlib import Path; from {__name__} import train_smollm2; train_smollm2(Path({str(tmp_path)!r}))"
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["measured"] / 1.05 < told["promised"] < told["measured"] * 1.2, "too little is worse than too much"


def train_smollm2(folder):
    """Fine-tune eight layers of SmolLM2's shape in bfloat16 on rows of many lengths; write promise and measurement."""
    from mft_core.store.sources import local_checkpoint, local_files
    from tests.support.tiny import make_tokenizer

    config = AutoConfig.for_model("llama", num_hidden_layers=8, **SMOLLM2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    lengths = rng.integers(80, 321, size=100)
    rows = [(rng.integers(300, size=length), np.arange(length) > length // 4) for length in lengths]
    (folder / "data").mkdir()
    TokenDataset.from_examples(rows).save(folder / "data" / "train.safetensors")
    TokenDataset.from_examples(rows[:4]).save(folder / "data" / "validation.safetensors")
    spec = training(precision="bfloat16", batch_size=24, max_steps=3, epochs=1, validations=2, keep="best")
    recipe, runtime = FineTune(training=spec), Runtime(threads=1, micro_batch_tokens=2048, device="cpu")
    inputs = {
        "model": local_checkpoint("model", folder / "model"),
        "data": local_files(folder / "data", ["train.safetensors", "validation.safetensors"]),
    }
    built = ArtifactStore(folder / "home").build(STAGES["fine-tune"], recipe, inputs, runtime)
    sizes = read_geometry(json.loads((folder / "model" / "config.json").read_text()), folder / "model")
    promised = STAGES["fine-tune"].needs(recipe, Facts(sizes, runtime, "bfloat16", 320, cpu=True)).memory
    measured = PROCESS + built.manifest["provenance"]["peak_memory_bytes"]
    (folder / "told.json").write_text(json.dumps({"promised": sum(promised.values()), "measured": measured}))

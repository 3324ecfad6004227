"""What a result depends on, as frozen types, one per stage; and apart from them, how it is computed.

A *recipe* is identity: every field enters the key of the artifact. `Runtime` is not: device, micro-batch, threads and
logging change how long a result takes, not what it is; they go into the provenance. Recipes hold no paths: models,
tokenizers, data files and benchmarks enter a stage as inputs, by digest (`mft_core.sources`).

A field added later must have a default that means the old behaviour, so that old keys stay valid.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _share_of_zeros(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError("sparsity is the share of weights set to zero; valid: 0 <= sparsity < 1")
    return value


Sparsity = Annotated[float, AfterValidator(_share_of_zeros)]
"""share of each masked matrix that is set to zero, 0.10 = 10%"""
MaskClass = Literal["attention", "mlp", "both"]
Selector = Literal["learned", "random", "magnitude"]


class Recipe(BaseModel):
    """Base of everything that a user can write in YAML: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MixturePart(Recipe):
    """How many rows one source contributes; the source itself is the stage's input of the same index."""

    rows: int | None = Field(None, gt=0, description="rows drawn without replacement; null takes all")


class PrepareData(Recipe):
    """Recipe of the stage `prepare-data`: rows to token sequences with the loss on assistant tokens."""

    mixture: tuple[MixturePart, ...] = Field(min_length=1)
    fraction: float = Field(1.0, gt=0, le=1, description="share of the mixture that is used")
    max_length: int = Field(gt=1, description="tokens; longer examples are cut if they keep an assistant token")
    validation_rows: int = Field(0, ge=0, description="rows held out to choose checkpoints and learning rates")
    seed: int = Field(42, ge=0)


class Training(Recipe):
    """Optimisation of one training stage; the same for full fine-tuning and for mask learning."""

    learning_rate: float = Field(gt=0)
    epochs: float = Field(gt=0)
    batch_size: int = Field(gt=0, description="sequences per optimizer step")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_share: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    max_grad_norm: float | None = Field(None, gt=0, description="null does not clip")
    precision: Literal["float32", "bfloat16"] = "float32"
    validations: int = Field(0, ge=0, description="evenly spaced measurements of the validation loss")
    keep: Literal["last", "best"] = Field("last", description="'best' keeps the lowest validation loss")
    max_steps: int | None = Field(None, gt=0, description="stop after this many steps of the schedule")
    seed: int = Field(42, ge=0)

    @model_validator(mode="after")
    def _best_needs_validations(self) -> Training:
        if self.keep == "best" and self.validations == 0:
            raise ValueError("keep 'best' needs validations >= 1; set validations, or keep 'last'")
        return self


class FineTune(Recipe):
    """Recipe of the stage `fine-tune`: every weight is trained. Continued fine-tuning starts from its artifact."""

    training: Training


class LearnMask(Recipe):
    """Recipe of the stage `learn-mask` (paper, section 3, local variant) and of its controls.

    `training`, `score_init` belong to the learned mask only; the controls neither have nor hash them.
    """

    selector: Selector = "learned"
    sparsity: Sparsity
    layers: str = Field(description="which decoder layers, e.g. '2-5', '0,3,8-11', 'last:4', 'middle:4', 'all'")
    modules: MaskClass = "both"
    score_init: Literal["normal", "kaiming-uniform"] | None = None
    training: Training | None = None
    seed: int = Field(42, ge=0, description="of the initial scores, or of the random selection")

    @model_validator(mode="after")
    def _learned_has_training(self) -> LearnMask:
        learned = self.selector == "learned"
        if learned != (self.training is not None and self.score_init is not None):
            raise ValueError("'training' and 'score_init' belong to selector 'learned', and it needs both")
        return self


class MergeMask(Recipe):
    """Recipe of the stage `merge-mask`: W ⊙ M written as an ordinary checkpoint; nothing to choose."""


class Evaluate(Recipe):
    """Recipe of the stage `evaluate`: one benchmark, greedy unless the task says otherwise."""

    task: str = Field(description="lm-eval task or group, or the name of a local-file task")
    num_fewshot: int | None = Field(None, ge=0, description="null leaves the task's own number")
    metric: str = Field("exact_match", description="the metric of the task whose per-item outcome is compared")
    filter: str | None = Field(None, description="lm-eval filter; null takes the task's only or first one")
    limit: int | None = Field(None, gt=0, description="items of each (sub)task, for a quick look only")
    apply_chat_template: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(1234, ge=0, description="of the few-shot draw, and of answers where the task samples them")


class Compare(Recipe):
    """Recipe of the stage `compare`: paired statistics of every variant against its baseline."""

    question: str
    variants: tuple[dict[str, str | int | float | None], ...] = Field(description="columns that name each row")
    bootstrap: int = Field(10_000, gt=0, description="resamples")
    confidence: float = Field(0.95, gt=0, lt=1)
    seed: int = Field(0, ge=0)


class Runtime(BaseModel):
    """How results are computed: never in a key, always in the provenance."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:0'")
    threads: int | None = Field(None, gt=0, description="CPU threads of one heavy stage; null lets torch choose")
    micro_batch_tokens: int = Field(8_192, gt=0, description="padded tokens of one forward pass in training")
    eval_batch_size: int = Field(400, gt=0, description="sequences decoded together")
    heavy_slots: int = Field(1, gt=0, description="heavy stages at one time per device")
    checkpoint_seconds: float = Field(60.0, ge=0, description="least time between two resumable states")

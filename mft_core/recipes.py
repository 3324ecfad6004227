"""What a result depends on, as frozen types, one per stage; and apart from them, how it is computed.

A *recipe* is identity: every field enters the key of the artifact. `Runtime` is not: device, micro-batch, threads and
logging change how long a result takes, not what it is; they go into the provenance. Recipes hold no paths: models,
tokenizers, data files and benchmarks enter a stage as inputs, by digest (`mft_core.store.sources`).

A field added later must have a default that means the old behaviour, so that old keys stay valid.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from mft_core.methods import CALIBRATED, SELECTORS, TRAINED, Selector


def _share_of_zeros(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError("sparsity is the share of weights set to zero; valid: 0 <= sparsity < 1")
    return value


Sparsity = Annotated[float, AfterValidator(_share_of_zeros)]
"""share of each masked matrix that is set to zero (by a mask that rewinds: to the base model's values), 0.10 = 10%"""


def _names_modules(value: str) -> str:
    parts = [part.strip() for part in value.split(",")]
    if not all(parts) or (len(parts) > 1 and not CLASSES.isdisjoint(parts)):
        raise ValueError(
            "valid: attention, mlp, both, or names of matrices separated by commas, such as 'q_proj,k_proj' or 'mlp.*'"
        )
    return ",".join(parts)


CLASSES = frozenset({"attention", "mlp", "both"})
Modules = Annotated[str, AfterValidator(_names_modules)]
"""which matrices of a layer: 'attention', 'mlp', 'both', or patterns as the shell has them of their names in the layer
(`self_attn.q_proj`; a pattern without a dot means the last part), separated by commas"""
SiteClass = Literal["attention", "mlp"]
"""what a maskable matrix belongs to"""
Engine = Literal["hf", "vllm", "openai"]
"""what answers prompts: transformers in this process, a vLLM that is started, or a server that is there"""
ScopeName = Literal["local", "global", "global-threshold"]
Granularity = Literal["weight", "row", "column"]
ScoreInit = Literal["normal", "kaiming-uniform", "magnitude"]


class Recipe(BaseModel):
    """Base of everything that a user can write in YAML: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MixturePart(Recipe):
    """How many rows one source contributes; the source itself is the stage's input of the same index."""

    rows: int | None = Field(None, gt=0, description="rows drawn without replacement; null takes all")
    split: str = Field("train", description="of a hub data set or a folder")
    config: str | None = Field(None, description="configuration (subset) of a hub data set or a folder; null: its one")


class PrepareData(Recipe):
    """Recipe of the stage `prepare-data`: rows to token sequences with the loss on assistant tokens."""

    mixture: tuple[MixturePart, ...] = Field(min_length=1)
    fraction: float = Field(1.0, gt=0, le=1, description="share of the mixture that is used")
    max_length: int = Field(gt=1, description="tokens; longer examples keep the whole turns that fit")
    validation_rows: int = Field(0, ge=0, description="rows held out to choose checkpoints and learning rates")
    seed: int = Field(42, ge=0)
    overlap: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a benchmark question's words, in runs of 13 that a row has too, from which on the row is "
        "left out; at 0 one such run is enough",
    )


class Training(Recipe):
    """Optimisation of one training stage; the same for full fine-tuning and for mask learning."""

    learning_rate: float = Field(gt=0)
    epochs: float = Field(gt=0, le=1e6)
    batch_size: int = Field(gt=0, description="sequences per optimizer step")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_share: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    loss: Literal["token", "sequence"] = Field(
        "token",
        description="mean over the loss tokens of all sequences of a step; or mean over those of each sequence, then "
        "over the sequences, so that a short answer counts as much as a long one",
    )
    optimizer: Literal["adamw", "adamw-8bit", "adafactor"] = Field(
        "adamw",
        description="'adamw-8bit' has quantised moments; 'adafactor' factored ones, and a learning rate relative to "
        "the tensor's root mean square, about 50 times that of the others",
    )
    max_grad_norm: float | None = Field(None, gt=0, description="null does not clip")
    precision: Literal["float32", "bfloat16"] = "float32"
    validations: int = Field(0, ge=0, description="evenly spaced measurements of the validation loss")
    keep: Literal["last", "best", "all"] = Field(
        "last",
        description="'best': of the lowest validation loss; 'all': that one, and all validated ones beside",
    )
    max_steps: int | None = Field(None, gt=0, description="stop after this many steps of the schedule")
    seed: int = Field(42, ge=0)

    @model_validator(mode="after")
    def _best_needs_validations(self) -> Training:
        if self.keep != "last" and self.validations == 0:
            raise ValueError(f"keep '{self.keep}' needs validations >= 1; set validations, or keep 'last'")
        return self


class Lora(Recipe):
    """Low-rank adapters (Hu et al., 2021) of the maskable matrices of all layers, merged in the end."""

    rank: int = Field(64, gt=0)
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the adapters' input")


class FineTune(Recipe):
    """Recipe of the stage `fine-tune`: every weight is trained, or with `lora` low-rank adapters of the weights.

    Continued fine-tuning starts from the artifact of another one.
    """

    training: Training
    lora: Lora | None = None
    sparse: bool = Field(
        False, description="SHiRA: of each matrix, as many entries as the adapters' numbers, drawn at random"
    )


def _listed(selectors: frozenset[str]) -> str:
    return f"the selectors {' and '.join(sorted(selectors))}"


class MaskSettings(Recipe):
    """What every mask is chosen by, in a study as in a loop of one's own."""

    selector: Selector = "learned"
    sparsity: Sparsity
    layers: str = Field(description="which decoder layers, e.g. '2-5', '0,3,8-11', 'last:4', 'middle:4', 'all'")
    modules: Modules = "both"
    scope: ScopeName = Field(
        "local",
        description="'local': the share holds in every matrix; 'global': over all chosen matrices by one ranking; "
        "'global-threshold': fixed thresholds for attention and MLP, at which the share holds when learning starts",
    )
    min_kept: float = Field(0.0, ge=0, le=1, description="of scope 'global': least share kept in every matrix")
    seed: int = Field(42, ge=0, description="of the initial scores, of the random selection or of the calibration rows")

    @model_validator(mode="after")
    def _settings_fit_the_scope(self) -> Self:
        if self.min_kept and (self.scope != "global" or self.min_kept + self.sparsity > 1 + 1e-9):
            raise ValueError("min_kept belongs to scope 'global' and is at most 1 - sparsity")
        scopes = SELECTORS[self.selector].scopes
        if self.scope not in scopes:
            raise ValueError(
                f"selector '{self.selector}' has no scope '{self.scope}'; valid: {', '.join(sorted(scopes))}"
            )
        return self


class LearnMask(MaskSettings):
    """Recipe of the stage `learn-mask` (paper, section 3) and of its controls.

    What belongs to some selectors only (`training`, `score_init`, `calibration_rows`) is neither had nor hashed by the
    others.
    """

    score_init: ScoreInit | None = None
    training: Training | None = None
    calibration_rows: int | None = Field(
        None, gt=0, description="training sequences that a calibrated selector looks at"
    )
    granularity: Granularity = Field(
        "weight", description="what is removed: single weights, output rows, input columns"
    )

    @model_validator(mode="after")
    def _settings_fit_the_selector(self) -> LearnMask:
        trained = self.selector in TRAINED
        if trained != (self.training is not None and self.score_init is not None):
            raise ValueError(f"'training' and 'score_init' belong to {_listed(TRAINED)}, which need both")
        if (self.selector in CALIBRATED) != (self.calibration_rows is not None):
            raise ValueError(f"'calibration_rows' belongs to {_listed(CALIBRATED)}, which need it")
        if self.granularity != "weight" and not SELECTORS[self.selector].granular:
            able = frozenset(name for name, row in SELECTORS.items() if row.granular)
            raise ValueError(f"granularity '{self.granularity}' belongs to {_listed(able)}; valid: weight")
        return self


class MergeAdapter(Recipe):
    """Recipe of the stage `merge-adapter`: an adapter of `peft` added to the weights of its base; nothing to choose."""


class MergeMask(Recipe):
    """Recipe of the stage `merge-mask`: W ⊙ M written as an ordinary checkpoint; nothing to choose."""


class Interpolate(Recipe):
    """Recipe of the stage `interpolate`: weights between the base model's and the fine-tuned one's."""

    alpha: float = Field(ge=0, le=1, description="share of the fine-tuned weights; 0 is the base")


class PickCheckpoint(Recipe):
    """Recipe of the stage `pick-checkpoint`: one of the states that a training with keep 'all' has left, or the mean
    of it and those before it.
    """

    point: int = Field(gt=0, description="1 is the first validation")
    of: int = Field(gt=0, description="validations of the training")
    averaged: int = Field(1, gt=0, description="states whose weights are averaged, the last of them at `point`")


class BenchmarkSettings(Recipe):
    """What a benchmark asks of a model, in a profile as in a recipe."""

    task: str = Field(description="lm-eval task or group, or the name of a local-file task")
    num_fewshot: int | None = Field(None, ge=0, description="null leaves the task's own number")
    metric: str = Field("exact_match", description="the metric of the task whose per-item outcome is compared")
    filter: str | None = Field(None, description="lm-eval filter; null takes the task's only or first one")
    average: Literal["items", "tasks"] = Field(
        "items", description="of a group: over all items, or over its tasks (MATH's subjects) of the means over theirs"
    )
    cluster: str | None = Field(
        None, description="field of the items that names what belongs together and is drawn whole; null: each alone"
    )
    limit: int | None = Field(None, gt=0, description="items of each (sub)task, for a quick look only")
    apply_chat_template: bool = True
    allow_code: bool = Field(False, description="run the code that a local-file task names")


class Evaluate(BenchmarkSettings):
    """Recipe of the stage `evaluate`: one benchmark, greedy unless the task says otherwise."""

    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(1234, ge=0, description="of the few-shot draw, and of answers where the task samples them")
    engine: Engine = "hf"
    engine_version: str | None = Field(None, description="of vLLM; of a server, what its owner says that it is")
    judge: str | None = Field(None, description="model that says whose answer is better, where the metric needs one")
    answered_together: int | None = Field(
        None, gt=0, description="sequences decoded together, where that is what is studied; null: as the runtime says"
    )


class Compare(Recipe):
    """Recipe of the stage `compare`: paired statistics of every variant against its baseline, declared contrasts."""

    question: str
    profile: str = Field("", description="whose earlier studies are the priors")
    variants: tuple[dict[str, str | int | float | None], ...] = Field(description="columns that name each row")
    notes: tuple[str, ...] = Field((), description="what a reader must know of the models; stands above the table")
    contest: tuple[str, ...] = Field((), description="methods of whose variants the one that looks best is judged")
    contrasts: tuple[str, ...] = Field((), description="the primaries, such as 'mft - fft'")
    margin: float = Field(1.0, gt=0, le=100, description="points below which a gain or loss is not worth having")
    confidence: float = Field(0.95, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    looks: tuple[int, ...] = Field((), description="numbers of replicates at which the study is declared to be read")
    priors: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="by variant and claim: what earlier studies measured that trainings differ by"
    )


class Runtime(BaseModel):
    """How results are computed: never in a key, always in the provenance."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:0'")
    threads: int | None = Field(
        None, gt=0, description="CPU threads of each process of a heavy stage; null lets torch choose"
    )
    micro_batch_tokens: int = Field(8_192, gt=0, description="padded tokens of one forward pass in training")
    eval_batch_size: int | None = Field(
        None, gt=0, description="sequences decoded together; null: as many as are fast and fit into memory"
    )
    engine_url: str | None = Field(
        None, description="of the OpenAI-compatible server of engine 'openai', e.g. http://127.0.0.1:8000/v1"
    )
    heavy_slots: int = Field(1, gt=0, description="heavy stages at one time per device")
    devices: str = Field(
        "auto",
        pattern=r"^(auto|\d+(,\d+)*)$",
        coerce_numbers_to_str=True,
        description="CUDA devices of this machine that heavy stages share, by number, e.g. '0,1,2'; 'auto': all",
    )
    cluster: str | None = Field(
        None,
        min_length=1,
        description="Dask scheduler whose workers compute heavy stages, e.g. 'tcp://head:8786', or a YAML file that "
        "says how Dask makes a cluster; null: workers on this machine",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    processes: int = Field(1, gt=0, description="training processes on this machine, which share each step's sequences")
    shard: bool = Field(
        False,
        description="FSDP2: divide weights, gradients and optimizer of full fine-tunings among the processes; masks "
        "and adapters train on whole weights",
    )
    max_dropped: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a mixture's rows that may be too long for data.max_length, and so dropped",
    )
    checkpoint_seconds: float = Field(60.0, ge=0, description="least time between two resumable states")


class Anatomy(Recipe):
    """Recipe of the stage `anatomy`: where masks cut, how far they agree, and what the removed weights did."""

    masks: tuple[dict[str, str | int | float | None], ...] = Field(
        min_length=1, description="columns that name each mask, as `Compare.variants` has them"
    )
    rows: int = Field(96, gt=0, description="validation sequences to measure losses on; all, if there are fewer")
    bootstrap: int = Field(2_000, gt=0, description="resamples of the sequences")
    confidence: float = Field(0.95, gt=0, lt=1, description="of intervals, and of the ranges that chance gives")
    seed: int = Field(0, ge=0, description="of the choice of sequences and of the resamples")


class Landscape(Recipe):
    """Recipe of the analysis `landscape`: loss surface, sharpness and a PAC-Bayes bound of a masked model and the model
    that it was made from.
    """

    variant: str = Field("masked", description="what the masked model is called in tables and figures")
    rows: int = Field(200, ge=8, description="sequences of the line and of the bound; all, if there are fewer")
    plane_rows: int = Field(48, gt=0, description="validation sequences of the planes, some of `rows`")
    points: int = Field(9, gt=2, description="of a plane's axis, odd")
    span: float = Field(1.0, gt=0, description="half the width of a plane, in lengths of the filters")
    hessian_batches: int = Field(6, ge=2, description="batches of training sequences, each with a Hessian of its own")
    hessian_rows: int = Field(16, gt=0, description="sequences of such a batch")
    noise: tuple[float, ...] = Field(
        (0.1, 0.2, 0.5, 1.0, 2.0),
        min_length=1,
        description="standard deviations of the bound's noise, in root mean squares of the weights",
    )
    draws: int = Field(5, ge=2, description="of the noise")
    bootstrap: int = Field(2_000, gt=0, description="resamples of the sequences")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    seed: int = Field(0, ge=0, description="of directions, noise and the choice of sequences")

    @model_validator(mode="after")
    def _planes_have_a_centre(self) -> Landscape:
        if self.points % 2 == 0:
            raise ValueError("points is odd, so that the model itself is one of them")
        if min(self.noise) <= 0:
            raise ValueError("noise is a tuple of numbers above 0")
        return self


class Randomisation(Recipe):
    """Recipe of the analysis `randomisation`: the learned mask among masks drawn at random, none of them trained."""

    variant: str = Field("mft", description="what the learned mask is called in tables and figures")
    benchmarks: tuple[str, ...] = Field(min_length=1)
    evaluations: tuple[Evaluate, ...] = Field(min_length=1, description="of the benchmarks, in their order")
    draws: int = Field(200, ge=19, description="random masks, of seeds 0, 1, …; the least p-value is 1 / (draws + 1)")


class PredictLayers(Recipe):
    """Recipe of the analysis `predict-layers`: which layer groups are worth masking, guessed from one backward pass and
    set beside the measured sweep.
    """

    groups: tuple[str, ...] = Field(min_length=3, description="the sweep's layers, as its rows have them")
    modules: Modules = "both"
    sparsity: Sparsity
    domain: str | None = Field(None, description="of the sweep's rows; null where they have only one")
    calibration_rows: int = Field(128, gt=0, description="training sequences to look at; all, if there are fewer")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    seed: int = Field(0, ge=0, description="of the choice of sequences")

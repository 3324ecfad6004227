"""One variant's complete settings, as a user can write and override them (`--set a.b=c`).

A `Setup` is composed, later ones winning, from the profile, the profile's section for the domain, the study, the point
of the study's grid and `--set`. Unlike recipes it holds names and paths; `pipelines.config.resolve` makes a `Resolved`
of it, which knows what these stand for now, and `pipelines.graph.variants` turns that into recipes and inputs, in which
nothing is left but what the results depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mft_core.geometry import Geometry
from mft_core.methods import METHODS, MethodName, uses
from mft_core.recipes import (
    BenchmarkSettings,
    Engine,
    Granularity,
    Lora,
    MixturePart,
    Modules,
    PrepareData,
    Recipe,
    ScopeName,
    ScoreInit,
    Sparsity,
    Training,
)
from mft_core.store.sources import Source

OF_ANOTHER_DOMAIN = ("mask", "continued")
"""sections that may name another domain, whose data they take"""
_DRAWS = 10_000
"""seeds that a replicate has to itself"""


def _layers_text(value: Any) -> Any:
    """Take a single layer as the number that it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError("valid: a layer such as 2, a range such as 2-5, a list such as '0,3,8-11', last:N, middle:N, all")


Layers = Annotated[str, BeforeValidator(_layers_text)]
"""layers of a decoder, as people write them; see `mft_core.layers`"""


def _label(value: str) -> str:
    """Refuse what is no name: labels stand in tables, figures, file names and on terminals."""
    if not value.strip() or len(value) > _LONGEST_LABEL or not value.isprintable():
        raise ValueError(f"valid: 1 to {_LONGEST_LABEL} printable characters, in one line")
    return value


_LONGEST_LABEL = 200
Label = Annotated[str, AfterValidator(_label)]
"""what people call a study, a domain, a benchmark; whatever stands in it is text"""


class ModelSpec(Recipe):
    """The base model."""

    path: str = Field(description="a local checkpoint directory or a hub name")
    revision: str = Field("main", description="of a hub repository; pinned to its commit when planned")
    chat_template: str | None = Field(
        None,
        description="in place of the tokenizer's own: a Jinja file, or the shipped plain, plain_bos or tulu",
    )


class SourceSpec(MixturePart):
    """One source of training rows, each with `messages` or in another of the shapes that are taken."""

    path: str = Field(description="a local JSONL, JSON (also gzipped) or Parquet file, a folder, or a hub data set")
    revision: str = "main"

    @property
    def part(self) -> MixturePart:
        """What of it stands in a recipe."""
        return MixturePart(rows=self.rows, split=self.split, config=self.config)


class DataSpec(PrepareData):
    """The training mixture."""

    mixture: tuple[SourceSpec, ...] = Field(min_length=1)
    overlap: float = Field(
        0.8,
        ge=0,
        le=1,
        description="a row is left out where runs of 13 words that it shares with a benchmark's question make up this "
        "share of the question; 0: where there is one such run; equal questions always go",
    )


class MaskSpec(Recipe):
    """Where and how much is masked, and how a learned mask is trained."""

    sparsity: Sparsity = 0.1
    layers: Layers
    modules: Modules = "both"
    scope: ScopeName = "local"
    min_kept: float = Field(0.0, ge=0, le=1, description="of scope 'global': least share kept in every matrix")
    granularity: Granularity = Field("weight", description="of random and magnitude masks: weight, row or column")
    score_init: ScoreInit = "normal"
    training: Training
    domain: str | None = Field(None, description="whose data the mask is learned on; null is the fine-tuning's own")
    data: DataSpec | None = Field(None, description="the data of that domain; null is the fine-tuning's own")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the training data used for the mask")
    calibration_rows: int = Field(128, gt=0, description="training sequences that a calibrated selector looks at")


class ContinuedSpec(Training):
    """Further full fine-tuning of the fine-tuned model."""

    domain: str | None = Field(None, description="whose data it goes on with; null is the fine-tuning's own")
    data: DataSpec | None = Field(None, description="the data of that domain; null is the fine-tuning's own")

    @property
    def training(self) -> Training:
        """How it is trained, whatever the data."""
        return Training.model_validate(self.model_dump(exclude={"domain", "data"}))


class LoraSpec(Lora):
    """Low-rank adapters and how they are trained."""

    training: Training


class BenchmarkSpec(BenchmarkSettings):
    """One benchmark: an lm-eval task, or a local-file task in a folder."""

    name: Label = Field(description="short name, used in tables and metrics")
    path: str | None = Field(None, description="folder of a local-file task; null for lm-eval's own tasks")


class Setup(Recipe):
    """Everything that one variant depends on.

    `fine_tune` makes of `model` the fine-tuned model that all is compared with; without it `model` is that itself.
    """

    backbone: str
    domain: str
    method: MethodName
    seed: int = Field(0, ge=0, description="of the treatment: initial scores, random selection, order of its data")
    replicate: int = Field(0, ge=0, description="which of the fine-tunings that differ in their seed alone")
    checkpoint: int | None = Field(
        None, gt=0, description="which validated state of its training is taken; null: the one that is kept"
    )
    model: ModelSpec
    precision: Literal["float32", "bfloat16"] = "float32"
    engine: Engine = Field("hf", description="what answers the benchmarks' prompts, one for a study")
    engine_version: str | None = Field(None, description="what the server of engine 'openai' is, for the key")
    judge: str | None = Field(None, description="model that judges answers, as OPENAI_BASE_URL's server calls it")
    data: DataSpec
    fine_tune: Training | None = Field(None, description="null: the model has been fine-tuned before")
    base: ModelSpec | None = Field(None, description="without fine_tune: what the model was fine-tuned from")
    interpolation: float = Field(0.5, ge=0, le=1, description="of method 'wise-ft': share of the fine-tuned weights")
    averaged: Annotated[int, Field(ge=2)] | Literal["all"] = Field(
        "all", description="of method 'checkpoint-average': how many validated states of the fine-tuning, the last ones"
    )
    answered_together: int = Field(
        16, gt=0, description="of method 'fft-again': sequences decoded together, instead of runtime.eval_batch_size"
    )
    existing: str | None = Field(
        None, description="of method 'existing': directory of a mask or checkpoint, a hub name"
    )
    continued: ContinuedSpec
    lora: LoraSpec | None = None
    mask: MaskSpec
    benchmarks: tuple[BenchmarkSpec, ...] = Field(min_length=1)
    validation: tuple[BenchmarkSpec, ...] = Field(
        (), description="benchmarks of items to choose by, which no comparison has; for studies that choose by accuracy"
    )
    held_out: tuple[BenchmarkSpec, ...] = Field(
        (), description="benchmarks whose items are kept out of the training data, besides one's own"
    )

    @property
    def fine_tuning(self) -> Training:
        """How this replicate's model is fine-tuned: with a seed of its own."""
        assert self.fine_tune is not None  # there is one replicate of a model that is fine-tuned already
        return self.fine_tune.model_copy(update={"seed": self.fine_tune.seed + self.replicate})

    @property
    def draw(self) -> int:
        """Seed of the treatment's random draws, other ones in every replicate.

        Replicates with the same draws (one random mask, say) would not show how much these matter.
        """
        return self.seed + _DRAWS * self.replicate

    @property
    def answered_by(self) -> str:
        """The engine with its version, for people."""
        return " ".join(filter(None, (self.engine, self.engine_version)))

    @model_validator(mode="after")
    def _benchmarks_are_told_apart(self) -> Setup:
        for section, benchmarks in (("benchmarks", self.benchmarks), ("validation", self.validation)):
            names = [bench.name for bench in benchmarks]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{section}.name: {', '.join(twice)} is there twice; give each benchmark its own name")
        return self

    @model_validator(mode="after")
    def _only_a_tuned_model_has_a_base(self) -> Setup:
        if self.fine_tune and self.base:
            raise ValueError("base: `fine_tune` starts from `model`, which is the base; leave out one of the two")
        if self.method == "existing" and not self.existing:
            raise ValueError("method 'existing' needs `existing`: the directory of a mask or of a checkpoint")
        return self

    @model_validator(mode="after")
    def _lora_is_described(self) -> Setup:
        if "lora" in METHODS[self.method].sections and self.lora is None:
            raise ValueError(f"method '{self.method}' needs the section lora; give lora.training, as for fine_tune")
        return self

    @model_validator(mode="after")
    def _averaged_states_are_kept(self) -> Setup:
        wanted = 2 if self.averaged == "all" else self.averaged
        if METHODS[self.method].needs_fine_tuning and self.fine_tune and self.fine_tune.validations < wanted:
            raise ValueError(
                f"averaged = {self.averaged}: the fine-tuning has {self.fine_tune.validations} validated states; set "
                f"fine_tune.validations to {wanted} or more"
            )
        return self

    @model_validator(mode="after")
    def _validations_have_rows(self) -> Setup:
        for name, training in trainings(self).items():
            data = other_data(self, name) or self.data
            if training.validations and not data.validation_rows:
                raise ValueError(
                    f"{name}.validations = {training.validations}, but data.validation_rows = 0: there is nothing to "
                    "validate on; set data.validation_rows, or validations to 0 and keep to 'last'"
                )
        return self


def trainings(setup: Setup) -> dict[str, Training]:
    """Return the trainings that the setup's method uses, by key."""
    every = {
        "fine_tune": setup.fine_tune,
        "continued": setup.continued,
        "lora.training": setup.lora and setup.lora.training,
        "mask.training": setup.mask.training,
    }
    return {name: training for name, training in every.items() if training and uses(setup.method, name)}


def own_training(setup: Setup) -> Training | None:
    """Return the training whose result the variant is, or that learns its mask; None: it has none of its own."""
    method = METHODS[setup.method]
    if method.selector and not method.trained:
        return None
    found = trainings(setup)
    if method.name != "fft":
        found.pop("fine_tune", None)
    return next(reversed(found.values()), None)


def other_data(setup: Setup, key: str) -> DataSpec | None:
    """Return the data of another domain that a training, or the section of a mask, takes; None: the setup's own."""
    return {"mask": setup.mask.data, "continued": setup.continued.data}.get(key.split(".")[0])


def datas(setup: Setup) -> list[DataSpec]:
    """Return the training data that the setup's method uses."""
    own = setup.data if uses(setup.method, "data") else None
    others = [other_data(setup, name) for name in OF_ANOTHER_DOMAIN if uses(setup.method, f"{name}.data")]
    return [data for data in (own, *others) if data]


@dataclass(frozen=True)
class ResolvedModel:
    """A model and what its files say of it."""

    source: Source
    """of an adapter: the model that it was trained on"""
    adapter: Source | None
    """a saved adapter of `peft`, to be merged first"""
    tokenizer: Source
    template: Source | None
    """the chat template that replaces the tokenizer's own"""
    config: Path
    """its config.json"""
    geometry: Geometry
    precision: str
    """'float32', or 'bfloat16' of weights stored in 16 bits"""
    notes: tuple[str, ...]
    """what tables say of it"""


@dataclass(frozen=True)
class Resolved:
    """A setup with all that disk and hub say of what it names: whoever has it need not look there."""

    setup: Setup
    """the layers of a mask are in canonical form, so that '2,3' and '2-3' are one recipe"""
    model: ResolvedModel
    base: ResolvedModel | None
    """what the fine-tuned model was, or is, trained from; None: unknown"""
    existing: ResolvedModel | Source | None
    """a model, or a mask of the fine-tuned one"""
    rows: Mapping[SourceSpec, Source]
    """of all data that the method uses"""
    held_out: tuple[tuple[str, Source], ...]
    """what is kept out of these rows, each once, ordered by content: files of items, or a task and its folder"""
    long_questions: bool
    """whether any question of these is so long that `DataSpec.overlap` makes a difference"""
    benchmarks: Mapping[str, Source]
    """by name: the folder of a local benchmark, or lm-eval itself"""
    validation: Mapping[str, Source]
    """likewise"""

    @property
    def tuned_precision(self) -> str:
        """What the fine-tuned model is stored in."""
        return self.setup.fine_tune.precision if self.setup.fine_tune else self.model.precision

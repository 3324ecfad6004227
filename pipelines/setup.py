"""One variant's complete settings, as a user can write and override them (`--set a.b=c`).

A `Setup` is composed, later ones winning, from the profile, the profile's section for the domain, the study, the point
of the study's grid and `--set`. Unlike recipes it holds names and paths; `pipelines.graph` turns it into recipes and
inputs, in which nothing is left but what the results depend on.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mft_core.recipes import Modules, Recipe, Selector, Sparsity, Training

METHODS: dict[str, frozenset[str]] = {
    # method: the sections of the setup that it uses, besides model and benchmarks
    "base": frozenset(),
    "fft": frozenset({"data", "fine_tune"}),
    "continued-fft": frozenset({"data", "fine_tune", "continued", "seed"}),
    "mft": frozenset({"data", "fine_tune", "mask", "seed"}),
    "random": frozenset({"data", "fine_tune", "mask", "seed"}),
    "magnitude": frozenset({"data", "fine_tune", "mask"}),
}
OF_ALL = frozenset({"precision", "model", "benchmarks"})
"""the sections that every method uses"""
_LEARNED_ONLY = ("mask.training", "mask.score_init", "mask.fraction")
SELECTORS: dict[str, Selector] = {"mft": "learned", "random": "random", "magnitude": "magnitude"}

Method = Literal["base", "fft", "continued-fft", "mft", "random", "magnitude"]


def uses(method: str, key: str) -> bool:
    """Whether a setting, written as `section.name`, makes a difference to the variants of a method."""
    if method in ("random", "magnitude") and any(key == name or key.startswith(f"{name}.") for name in _LEARNED_ONLY):
        return False
    return key.split(".")[0] in METHODS[method] | OF_ALL


def _layers_text(value: Any) -> Any:
    """Take a single layer as the number that it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError("valid: a layer such as 2, a range such as 2-5, a list such as '0,3,8-11', last:N, middle:N, all")


class ModelSpec(Recipe):
    """The base model."""

    path: str = Field(description="a local checkpoint directory or a hub name")
    revision: str = Field("main", description="of a hub repository; pinned to its commit when planned")
    chat_template: str | None = Field(None, description="a Jinja file that replaces the tokenizer's own template")


class SourceSpec(Recipe):
    """One source of training rows, each with `messages`."""

    path: str = Field(description="a local JSONL file or a hub data set's name")
    revision: str = "main"
    rows: int | None = Field(None, gt=0, description="rows drawn; null takes all")


class DataSpec(Recipe):
    """The training mixture."""

    mixture: tuple[SourceSpec, ...] = Field(min_length=1)
    fraction: float = Field(1.0, gt=0, le=1)
    max_length: int = Field(gt=1, description="tokens")
    validation_rows: int = Field(0, ge=0)
    seed: int = Field(42, ge=0)


class MaskSpec(Recipe):
    """Where and how much is masked, and how a learned mask is trained."""

    sparsity: Sparsity = 0.1
    layers: Annotated[str, BeforeValidator(_layers_text)]
    modules: Modules = "both"
    score_init: Literal["normal", "kaiming-uniform"] = "normal"
    training: Training
    fraction: float = Field(1.0, gt=0, le=1, description="share of the training data used for the mask")


class BenchmarkSpec(Recipe):
    """One benchmark: an lm-eval task, or a local-file task in a folder."""

    name: str = Field(description="short name, used in tables and metrics")
    task: str
    path: str | None = Field(None, description="folder of a local-file task; null for lm-eval's own tasks")
    num_fewshot: int | None = Field(None, ge=0)
    metric: str = "exact_match"
    filter: str | None = None
    limit: int | None = Field(None, gt=0)
    apply_chat_template: bool = True


class Setup(Recipe):
    """Everything that one variant depends on."""

    backbone: str
    domain: str
    method: Method
    seed: int = Field(0, ge=0, description="of the treatment: initial scores, random selection, order of its data")
    model: ModelSpec
    precision: Literal["float32", "bfloat16"] = "float32"
    data: DataSpec
    fine_tune: Training
    continued: Training
    mask: MaskSpec
    benchmarks: tuple[BenchmarkSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _benchmarks_are_told_apart(self) -> Setup:
        names = [bench.name for bench in self.benchmarks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"benchmarks.name: {', '.join(twice)} is there twice; give each benchmark its own name")
        return self

    @model_validator(mode="after")
    def _validations_have_rows(self) -> Setup:
        trainings = {"fine_tune": self.fine_tune, "continued": self.continued, "mask.training": self.mask.training}
        for name, training in trainings.items():
            if uses(self.method, name) and training.validations and not self.data.validation_rows:
                raise ValueError(
                    f"{name}.validations = {training.validations}, but data.validation_rows = 0: there is nothing to "
                    "validate on; set data.validation_rows, or validations to 0 and keep to 'last'"
                )
        return self

"""What a study is, and how one is read: a question with the grid that answers it, to be composed with any profile.

A YAML file shipped in `pipelines/studies`, or the user's own. `pipelines.config.yaml_to_setups` makes variants of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mft_core.errors import ConfigError, validated
from mft_core.methods import Contrast, MethodName, TrainedMethodName
from mft_core.recipes import Recipe
from mft_core.yaml_files import read_yaml
from pipelines.config.by_name import locate
from pipelines.config.profile import Profile, given
from pipelines.config.setup import Label

Analysis = Literal["anatomy", "landscape", "predict-layers", "randomisation"]


class VariantSpec(Recipe):
    """One family of variants: a method, its domain, and the grid over which it is spread."""

    method: MethodName
    domain: str | None = Field(
        None,
        description="null takes the study's, or the profile's default; 'each domain': the profile's each_domain",
    )
    grid: dict[str, Annotated[list[Any], Field(min_length=1)] | Literal["each domain", "each layer group"]] = Field(
        default_factory=dict, description="setup key: values; a value 'x0.3' is that many times the profile's own"
    )

    def values(self, profile: Profile) -> dict[str, list[Any]]:
        """Return the grid's values by setup key."""
        return {key: profile.each(values) if isinstance(values, str) else values for key, values in self.grid.items()}

    def points(self, profile: Profile) -> Iterator[dict[str, Any]]:
        """Yield every combination of the grid's values as {setup key: value}."""
        for point in itertools.product(*self.values(profile).values()):
            yield {key: given(key, value) for key, value in zip(self.grid, point, strict=True)}


_NOT_SEARCHED = {
    "mask.training.epochs": "the rungs say how long a trial is trained",
    "mask.training.max_steps": "trials would not cost the same",
    "mask.training.batch_size": "trials would not cost the same",
    "mask.fraction": "trials would not cost the same",
    "mask.domain": "validation losses on different data cannot be compared",
    "mask.data": "validation losses on different data cannot be compared",
}


class SearchSpec(Recipe):
    """What an adaptive search looks for, and how far it goes; how it goes is told in `pipelines.search`."""

    method: TrainedMethodName = "mft"
    space: dict[str, Annotated[list[Any], Field(min_length=1)] | Literal["each layer group"]] = Field(
        min_length=1, description="setup key of the mask: values as in a grid, in their order"
    )
    trials: int = Field(ge=2, description="points of the space that a seed tries, or all of them where there are fewer")
    rungs: tuple[float, ...] = Field(
        (0.25, 1.0), min_length=1, description="shares of mask.training.epochs that trials are trained for, rising to 1"
    )
    eta: int = Field(4, ge=2, description="one of so many trials goes on to the next rung")
    batch: int = Field(2, ge=1, description="trials proposed at a time: more fill more slots, fewer learn more")

    @model_validator(mode="after")
    def _rungs_rise_to_the_whole(self) -> SearchSpec:
        shares = (0.0, *self.rungs)
        if shares[-1] != 1 or any(later <= earlier for earlier, later in itertools.pairwise(shares)):
            raise ValueError(
                f"rungs = {list(self.rungs)}: valid are rising shares of the epochs, above 0 and the last 1.0, "
                "such as [0.25, 1.0]"
            )
        return self

    @model_validator(mode="after")
    def _space_is_of_comparable_masks(self) -> SearchSpec:
        for key in self.space:
            why = next((why for name, why in _NOT_SEARCHED.items() if f"{key}.".startswith(f"{name}.")), None)
            if not key.startswith("mask.") or why:
                why = why or "a search varies the mask alone, that its trials start from one fine-tuned model"
                raise ValueError(f"space: '{key}' cannot be searched: {why}; valid: keys such as mask.layers")
        return self

    @property
    def family(self) -> VariantSpec:
        """The whole space as a grid."""
        return VariantSpec(method=self.method, grid=self.space)


class Contrasts(Recipe):
    """The contrasts that a study declares before it is run; every other comparison of it is exploratory."""

    primary: tuple[str, ...] = Field(min_length=1, description="such as 'mft - fft': treatment - control, by method")
    margin: float = Field(1.0, gt=0, le=100, description="points below which a gain or a loss is not worth having")

    @field_validator("primary")
    @classmethod
    def _are_readable(cls, primary: tuple[str, ...]) -> tuple[str, ...]:
        for text in primary:
            Contrast.parse(text)
        return primary


class Study(Recipe):
    """A question and the variants that answer it; or, in `studies`, the studies that it is made of."""

    name: Label
    question: Label
    domain: str | None = None
    seeds: tuple[int, ...] = Field((0, 1), min_length=1)
    replicates: int = Field(1, ge=1, description="fine-tunings, each with seeds, controls and masks of its own")
    benchmarks: Literal["domain", "all"] = Field("domain", description="of the variant's own domain, or of every one")
    variants: tuple[VariantSpec, ...] = ()
    checkpoints: int | None = Field(
        None, ge=2, description="states of every training that are kept and evaluated beside the one that is chosen"
    )
    contrasts: Contrasts | None = Field(None, description="what the study is there to test; null: it explores")
    search: SearchSpec | None = Field(None, description="finds a further variant for each seed")
    contest: tuple[MethodName, ...] = Field(
        (), description="methods of whose variants the best, chosen on one half of the items, is judged on the other"
    )
    choose: Literal["loss", "accuracy", "accuracy-or-loss"] | None = Field(
        None,
        description="a tuning: by the loss on validation rows, or by the accuracy on the profile's `validation` "
        "benchmarks ('accuracy-or-loss': where it has some); a choice on an edge of its grid is refused",
    )
    bounded: tuple[str, ...] = Field(
        (), description="settings that may be no greater than their grids go, e.g. a budget: a tuning may choose that"
    )
    analyses: tuple[Analysis, ...] = ()
    figure: Literal["gains", "methods", "matrix", "trajectory"] | None = Field(
        None, description="what the report's main figure shows; null fits it to what varies"
    )
    studies: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_variants_or_parts(self) -> Study:
        if bool(self.variants) == bool(self.studies):
            raise ValueError("a study has either variants or studies that it is made of; give one of the two")
        if self.search and self.studies:
            raise ValueError("search: a study that is made of studies has none; give it to a study of its own")
        if self.search and self.checkpoints:
            raise ValueError("checkpoints: a study with a search has none; give them to a study of its own")
        return self

    @model_validator(mode="after")
    def _contrasts_are_of_its_methods(self) -> Study:
        methods = {spec.method for spec in self.families}
        for text in self.contrasts.primary if self.contrasts and not self.studies else ():
            contrast = Contrast.parse(text)
            for side in (contrast.treatment, contrast.control):
                if side[0] not in methods:
                    raise ValueError(
                        f"contrasts.primary: '{text}': the study has no variant of method '{side[0]}'; it has: "
                        f"{', '.join(sorted(methods))}"
                    )
        return self

    @model_validator(mode="after")
    def _bounded_are_varied(self) -> Study:
        varied = sorted({key for spec in self.families for key in spec.grid})
        if unknown := set(self.bounded) - set(varied):
            raise ValueError(
                f"bounded: {', '.join(sorted(unknown))}: no grid varies that; they vary: {', '.join(varied)}"
            )
        return self

    @property
    def families(self) -> tuple[VariantSpec, ...]:
        """Every family that the study takes variants from: its own, and the space of its search."""
        return (*self.variants, self.search.family) if self.search else self.variants


def load_study(name: str) -> Study:
    """Read a study by its name or by the path of a YAML file."""
    path = locate("study", name)
    return validated(Study, {"name": path.stem, **read_yaml(path)}, f"study {path.name}")


def load_studies(name: str, part_of: tuple[Path, ...] = ()) -> list[Study]:
    """Read a study, or the studies that it is made of (themselves in those of `part_of`)."""
    path = locate("study", name)
    if path in part_of:
        raise ConfigError(f"{path}: studies: the study is made of itself; name others, or give it variants.")
    study = load_study(name)
    return [part for inner in study.studies for part in load_studies(inner, (*part_of, path))] or [study]

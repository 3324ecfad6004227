"""Finds and reads profiles and studies: the YAML files shipped in this package, or a path of the user's own.

A *profile* bundles model, data, training, mask and benchmarks of a backbone, with one section per domain. A *study*
is a question with the grid that answers it; it composes with any profile.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from mft_core.errors import ConfigError, explain, unknown
from mft_core.methods import Contrast, MethodName, TrainedMethodName
from mft_core.recipes import Recipe, Runtime
from mft_core.store.artifacts import ArtifactStore
from mft_core.yaml_files import read_yaml
from pipelines.config.setup import Label, Layers

_HERE = Path(__file__).resolve().parents[1]
_PATH_KEYS = {"path", "chat_template", "existing"}
_FILES = (".jsonl", ".json", ".gz", ".parquet", ".jinja")
FETCHED = "$MFT_HOME/models/"
"""how a profile's path begins where `mft fetch` has put the model"""
Model = TypeVar("Model", bound=Recipe)
FOLDERS = {"profile": _HERE / "profiles", "study": _HERE / "studies"}


EACH_DOMAIN, EACH_LAYER_GROUP = "each domain", "each layer group"
"""what a study writes for the values that only the profile knows"""
MIXED = "mixed"
"""the domain that is a mixture of the others, and so none of `each domain`"""
Analysis = Literal["anatomy", "landscape", "predict-layers"]


class VariantSpec(Recipe):
    """One family of variants: a method, its domain, and the grid over which it is spread."""

    method: MethodName
    domain: str | None = Field(
        None, description="null takes the study's, or the profile's default; 'each domain' is all but 'mixed'"
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

    @property
    def families(self) -> tuple[VariantSpec, ...]:
        """Every family that the study takes variants from: its own, and the space of its search."""
        return (*self.variants, self.search.family) if self.search else self.variants


class Profile(Recipe):
    """A backbone with its domains. `defaults` and each domain are partial setups."""

    name: Label
    default_domain: str
    defaults: dict[str, Any]
    domains: dict[Label, dict[str, Any]] = Field(min_length=1)
    layer_groups: tuple[Layers, ...] = Field((), description="what 'each layer group' of a study means for this model")
    max_replicates: int = Field(1, ge=1, description="most fine-tunings of a study, unless --replicates says otherwise")
    runtime: Runtime = Runtime.model_validate({})

    @functools.cached_property
    def partial_setups(self) -> dict[str, dict[str, Any]]:
        """By domain what its variants share: the defaults, and the domain's own values over them."""
        found: dict[str, dict[str, Any]] = {name: {} for name in self.domains}
        for name, values in found.items():
            merge(values, self.defaults)
            merge(values, self.domains[name])
        return found

    def each(self, what: str) -> list[str]:
        """Return the values of `each domain` or `each layer group`.

        Raises:
            ConfigError: the profile has none.
        """
        values = [name for name in self.domains if name != MIXED] if what == EACH_DOMAIN else list(self.layer_groups)
        if not values:
            key = "domains" if what == EACH_DOMAIN else "layer_groups"
            raise ConfigError(f"profile {self.name}: the study asks for {what}; list some under {key}.")
        return values


def names(kind: str) -> list[str]:
    """List the profiles or studies shipped with the package."""
    return sorted(path.stem for path in FOLDERS[kind].glob("*.yaml"))


def load_study(name: str) -> Study:
    """Read a study by its name or by the path of a YAML file."""
    path = _locate("study", name)
    return _validate(Study, {"name": path.stem, **read_yaml(path)}, f"study {path.name}")


def load_studies(name: str, part_of: tuple[Path, ...] = ()) -> list[Study]:
    """Read a study, or the studies that it is made of (themselves in those of `part_of`)."""
    path = _locate("study", name)
    if path in part_of:
        raise ConfigError(f"{path}: studies: the study is made of itself; name others, or give it variants.")
    study = load_study(name)
    return [part for inner in study.studies for part in load_studies(inner, (*part_of, path))] or [study]


def load_profile(name: str) -> Profile:
    """Read a profile by its name or by the path of a YAML file."""
    path = _locate("profile", name)
    values = _anchored_profile(path)
    return _validate(Profile, {"name": path.stem, **values}, f"profile {path.name}")


def _anchored_profile(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a profile over the one that it extends, with relative paths made absolute."""
    if path in extended_by:
        raise ConfigError(f"{path}: extends: the profile extends itself; name another one, or leave the key out.")
    values: dict[str, Any] = anchored(read_yaml(path), path.parent)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {parent!r}: give one profile's name or YAML file.")
    beside = path.parent / parent if parent.endswith((".yaml", ".yml")) else parent
    merged = _anchored_profile(_locate("profile", str(beside)), (*extended_by, path))
    merge(merged, values)
    return merged


def merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Lay the values of `layer` over `into`, mapping by mapping; lists are replaced whole."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def anchored(layer: Any, folder: Path) -> Any:
    """Make relative local paths absolute; what is neither there nor written as a path stays a hub name."""
    if isinstance(layer, Mapping):
        return {
            key: _anchor(value, folder) if key in _PATH_KEYS and isinstance(value, str) else anchored(value, folder)
            for key, value in layer.items()
        }
    if isinstance(layer, list):
        return [anchored(item, folder) for item in layer]
    return layer


def _anchor(text: str, folder: Path) -> str:
    if text.startswith(FETCHED):
        return str(ArtifactStore.from_environment().models / text.removeprefix(FETCHED))
    path = Path(text).expanduser()
    local = (folder / path).exists() or text.startswith((".", "~")) or path.suffix in _FILES
    return str((folder / path).resolve()) if local or path.is_absolute() else text


def given(key: str, value: Any) -> Any:
    """Return the value that a user gives a setup key; a relative path in it starts from the working directory."""
    last = key.split(".")[-1]
    return anchored({last: value}, Path.cwd())[last]


def _locate(kind: str, name: str) -> Path:
    own = Path(name)
    if own.suffix in (".yaml", ".yml"):
        if not own.is_file():
            raise ConfigError(f"{kind} = {name}: no such file; give a YAML file or one of: {', '.join(names(kind))}.")
        return own.resolve()
    if name not in names(kind):
        raise unknown(kind, name, names(kind))
    return FOLDERS[kind] / f"{name}.yaml"


def _validate(model: type[Model], values: dict[str, Any], where: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model, where) from error

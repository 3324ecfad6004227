"""What a profile is, and how one is read: model, data, training, mask and benchmarks of a backbone, a section a domain.

A YAML file shipped in `pipelines/profiles`, or the user's own; it may extend another. Relative paths in it start at its
folder. `pipelines.config.yaml_to_setups` lays a study's and the user's settings over it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from mft_core.errors import ConfigError, unknown, validated
from mft_core.recipes import Recipe, Runtime
from mft_core.store.artifacts import ArtifactStore
from mft_core.yaml_files import read_yaml
from pipelines.config.by_name import locate
from pipelines.config.setup import Label, Layers

_PATH_KEYS = {"path", "chat_template", "existing"}
_FILES = (".jsonl", ".json", ".gz", ".parquet", ".jinja")
FETCHED = "$MFT_HOME/models/"
"""how a profile's path begins where `mft fetch` has put the model"""
EACH_DOMAIN = "each domain"
"""what a study writes for the domains that only the profile knows"""


class Profile(Recipe):
    """A backbone with its domains. `defaults` and each domain are partial setups."""

    name: Label
    default_domain: str
    defaults: dict[str, Any]
    domains: dict[Label, dict[str, Any]] = Field(min_length=1)
    each_domain: tuple[Label, ...] = Field((), description="what 'each domain' of a study means; empty: all of them")
    layer_groups: tuple[Layers, ...] = Field((), description="what 'each layer group' of a study means for this model")
    max_replicates: int = Field(1, ge=1, description="most fine-tunings of a study, unless --replicates says otherwise")
    runtime: Runtime = Runtime.model_validate({})

    @field_validator("each_domain")
    @classmethod
    def _are_domains(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = info.data.get("domains", {})
        for name in names if known else ():
            if name not in known:
                raise ValueError(str(unknown("domain", name, list(known))))
        return tuple(dict.fromkeys(names))

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
        values: Sequence[str] = self.layer_groups
        if what == EACH_DOMAIN:
            values = self.each_domain or list(self.domains)
        if not values:
            raise ConfigError(f"profile {self.name}: the study asks for {what}; list some under layer_groups.")
        return list(values)


def load_profile(name: str) -> Profile:
    """Read a profile by its name or by the path of a YAML file."""
    path = locate("profile", name)
    values = _anchored_profile(path)
    return validated(Profile, {"name": path.stem, **values}, f"profile {path.name}")


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
    merged = _anchored_profile(locate("profile", str(beside)), (*extended_by, path))
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
    try:
        path = Path(text).expanduser()
        local = (folder / path).exists() or text.startswith((".", "~")) or path.suffix in _FILES
        return str((folder / path).resolve()) if local or path.is_absolute() else text
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links, nobody's home
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{text!r:.80}: no path here ({reason}); correct it.") from error


def given(key: str, value: Any) -> Any:
    """Return the value that a user gives a setup key; a relative path in it starts from the working directory."""
    last = key.split(".")[-1]
    return anchored({last: value}, Path.cwd())[last]

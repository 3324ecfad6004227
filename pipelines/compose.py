"""From study × profile × `--set` to the list of variants' setups; every mistake is found here, before any compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mft_core.errors import ConfigError, did_you_mean, explain
from mft_core.recipes import Runtime
from pipelines.catalogue import Profile, Study, VariantSpec, anchored, domain_of, merge
from pipelines.setup import METHODS, Setup

_OF_ALL = {"precision", "model", "benchmarks"}
_SETTABLE = ("precision", "model", "data", "fine_tune", "continued", "mask", "benchmarks")


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Parse `a.b=c` texts; values are read as YAML, so numbers are numbers and lists are lists."""
    overrides: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text}: give it as KEY=VALUE, for example --set mask.sparsity=0.2.")
        try:
            overrides[key.strip()] = _number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: the value is not YAML: {error}") from error
    return overrides


def _number(value: Any) -> Any:
    """Read '2e-5' as the number people mean; YAML 1.1 takes it for a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def runtime_of(profile: Profile, overrides: Mapping[str, Any]) -> Runtime:
    """Return the profile's runtime with the `runtime.*` overrides applied."""
    values = profile.runtime.model_dump()
    for key, value in overrides.items():
        if key.startswith("runtime."):
            _put(values, key.removeprefix("runtime."), value, where=f"--set {key}")
    try:
        return Runtime.model_validate(values)
    except ValidationError as error:
        raise explain(error, Runtime, "runtime") from error


def setups(
    study: Study, profile: Profile, overrides: Mapping[str, Any], seeds: Sequence[int] | None = None
) -> list[tuple[Setup, dict[str, Any]]]:
    """Expand the study into the setups of its variants, in the study's order, without repeats.

    Returns:
        each setup with its point of the grid, {setup key: value}.

    Raises:
        ConfigError: an unknown key, an invalid value, or an override that no variant of the study uses.
    """
    settings = {key: value for key, value in overrides.items() if not key.startswith("runtime.")}
    found: list[tuple[Setup, dict[str, Any]]] = []
    for spec in study.variants:
        for point in spec.points():
            for seed in _seeds(spec, point, seeds or study.seeds):
                setup = _compose(study, profile, spec, {**settings, **point}, seed)
                if all(setup != other for other, _ in found):
                    found.append((setup, point))
    _refuse_unused(settings, study, [setup for setup, _ in found])
    return found


def _seeds(spec: VariantSpec, point: Mapping[str, Any], seeds: Sequence[int]) -> Sequence[int]:
    if "seed" in point:
        return [point["seed"]]
    return seeds if "seed" in METHODS[spec.method] else [0]


def _compose(study: Study, profile: Profile, spec: VariantSpec, settings: Mapping[str, Any], seed: int) -> Setup:
    domain = domain_of(profile, spec.domain or study.domain)
    values: dict[str, Any] = {}
    for layer in (profile.defaults, profile.domains[domain]):
        merge(values, layer)
    for key, value in settings.items():
        last = key.split(".")[-1]
        _put(values, key, anchored({last: value}, Path.cwd())[last], f"--set {key}")
    values |= {"backbone": profile.name, "domain": domain, "method": spec.method, "seed": seed}
    try:
        return Setup.model_validate(values)
    except ValidationError as error:
        raise explain(error, Setup, f"study {study.name} on profile {profile.name}") from error


def _put(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    *parents, last = key.split(".")
    target = values
    for name in parents:
        inner = target.get(name)
        if not isinstance(inner, dict):
            raise ConfigError(f"{where}: unknown key '{key}'.{_hint(name, target)}")
        target = inner
    target[last] = value


def _hint(name: str, target: Mapping[str, Any]) -> str:
    valid = sorted(set(target) & set(_SETTABLE)) or sorted(target)
    return f"{did_you_mean(name, valid)} Valid keys here: {', '.join(valid)}."


def _refuse_unused(settings: Mapping[str, Any], study: Study, found: Sequence[Setup]) -> None:
    for key, value in settings.items():
        section = key.split(".")[0]
        if not any(section in METHODS[setup.method] | _OF_ALL for setup in found):
            raise ConfigError(f"--set {key}={value}: no variant of study '{study.name}' uses '{section}'.")
        if any(key in spec.grid for spec in study.variants):
            raise ConfigError(
                f"--set {key}={value}: study '{study.name}' varies {key} itself; "
                "leave the override out, or write a study of your own."
            )

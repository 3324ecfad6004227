"""From study × profile × `--set` to the list of variants' setups; every mistake is found here, before any compute."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mft_core.errors import ConfigError, did_you_mean, unknown, validated
from mft_core.evaluation import judged
from mft_core.methods import METHODS, uses
from mft_core.recipes import Runtime
from mft_core.yaml_files import parse_yaml
from pipelines.config.profile import EACH_DOMAIN, Profile, given, merge
from pipelines.config.setup import OF_ANOTHER_DOMAIN, Setup, own_training
from pipelines.config.study import Study, VariantSpec

_ELSEWHERE = {
    "backbone": "it is the profile: use --profile",
    "domain": "it is a field of the study and of its variants: write `domain:` there",
    "method": "it is a field of the study's variants: write `method:` there",
    "checkpoint": "it is a field of the study: write `checkpoints:` there",
    "replicate": "use --replicates, or `replicates:` of the study",
}
Point = tuple[Setup, dict[str, Any]]
"""a setup with its point of the grid, {setup key: value}"""
_MOST = 20_000
"""variants of a study"""
_FACTOR = re.compile(r"x(\d+\.?\d*|\.\d+)")
_SETTABLE = (
    *("precision", "engine", "engine_version", "judge"),
    *("model", "base", "data", "fine_tune", "existing", "interpolation", "averaged", "answered_together"),
    *("continued", "lora", "mask", "benchmarks"),
)


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Parse `a.b=c` texts; values are read as YAML, so numbers are numbers and lists are lists."""
    overrides: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text}: give it as KEY=VALUE, for example --set mask.sparsity=0.2.")
        found = parse_yaml(value, f"--set {text}")
        plain = found == value.strip()  # a text without quotes
        overrides[key.strip()] = given(key.strip(), _number(found) if plain else found)
    return overrides


def _number(value: Any) -> Any:
    """Read '2e-5' as the number people mean; YAML 1.1 takes it for a string."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def runtime_of(profile: Profile, overrides: Mapping[str, Any]) -> Runtime:
    """Return the profile's runtime with the `runtime.*` overrides applied."""
    values = profile.runtime.model_dump()
    for key, value in overrides.items():
        if key.startswith("runtime."):
            _put(values, key.removeprefix("runtime."), value, where=f"--set {key}")
    return validated(Runtime, values, "runtime")


def own_and_searched(
    study: Study,
    profile: Profile,
    overrides: Mapping[str, Any],
    seeds: Sequence[int] | None = None,
    replicates: int | None = None,
) -> tuple[list[Point], list[Point]]:
    """Expand the study into the setups of its own variants, and into those of its search's space, if it has one.

    Raises:
        ConfigError: as `setups`; or a search is asked for several fine-tunings.
    """
    if study.search and replicates_of(study, profile, replicates) > 1:
        raise ConfigError(f"study {study.name}: a search is that of one fine-tuned model; valid: replicates = 1.")
    own = study.model_copy(update={"search": None})

    def expanded(part: Study) -> list[Point]:
        used = {key: value for key, value in overrides.items() if concerns(part, key) or not concerns(study, key)}
        return setups(part, profile, used, seeds, replicates)

    space = expanded(own.model_copy(update={"variants": (study.search.family,)})) if study.search else []
    return expanded(own), space


def replicates_of(study: Study, profile: Profile, asked: int | None) -> int:
    """Return how many fine-tunings a study has: what is asked for, else its own number as far as the profile lets."""
    return asked or min(study.replicates, profile.max_replicates)


def setups(
    study: Study,
    profile: Profile,
    overrides: Mapping[str, Any],
    seeds: Sequence[int] | None = None,
    replicates: int | None = None,
) -> list[Point]:
    """Expand the study into the setups of its variants, in the study's order, without repeats.

    Raises:
        ConfigError: an unknown key, an invalid value, or an override that no variant of the study uses.
    """
    settings = {key: value for key, value in overrides.items() if not key.startswith("runtime.")}
    _refuse_misplaced(settings, study)
    _refuse_too_many(study, profile, seeds or study.seeds, replicates_of(study, profile, replicates))
    found: dict[Setup, dict[str, Any]] = {}
    for spec in study.variants:
        domains = profile.each(EACH_DOMAIN) if spec.domain == EACH_DOMAIN else [spec.domain]
        for domain, point in itertools.product(domains, spec.points(profile)):
            setup, meant = _compose(study, profile, spec.model_copy(update={"domain": domain}), settings, point)
            if setup.fine_tune is None and (replicates or 1) > 1:
                raise ConfigError(
                    f"--replicates {replicates}: profile {profile.name} has no fine_tune, so there is one fine-tuned "
                    "model: the user's. Leave --replicates out, or describe the fine-tuning."
                )
            for replicate in range(replicates_of(study, profile, replicates) if setup.fine_tune else 1):
                for seed in [setup.seed] if "seed" in point else _seeds(spec, seeds or study.seeds):
                    for own, details in _checkpoints(setup, meant) if study.checkpoints else [(setup, meant)]:
                        found.setdefault(own.model_copy(update={"replicate": replicate, "seed": seed}), details)
    _refuse_unused(settings, study, list(found))
    if len(engines := {(setup.engine, setup.engine_version) for setup in found}) > 1:
        names = ", ".join(sorted({engine for engine, _ in engines}))
        raise ConfigError(
            f"study {study.name}, engine: {names}: answers of two engines are no fair comparison. Give one, in the "
            "profile or by --set engine=hf."
        )
    return list(found.items())


def _refuse_too_many(study: Study, profile: Profile, seeds: Sequence[int], replicates: int) -> None:
    """Refuse a study whose variants nobody could wait for, before they are made."""
    count = 0
    for spec in study.variants:
        domains = len(profile.each(EACH_DOMAIN)) if spec.domain == EACH_DOMAIN else 1
        drawn = 1 if "seed" in spec.grid else len(_seeds(spec, seeds))
        points = math.prod(map(len, spec.values(profile).values()))
        count += domains * points * drawn * replicates * (1 + (study.checkpoints or 0))
    if count > _MOST:
        raise ConfigError(
            f"study {study.name}: its grids, seeds, replicates and checkpoints make {count:,} variants; valid: at "
            f"most {_MOST:,}. Give fewer values."
        )


def _checkpoints(setup: Setup, meant: dict[str, Any]) -> Iterator[Point]:
    """Yield the variant, and one for each state that its training keeps."""
    yield setup, meant
    training = own_training(setup)
    if training and training.keep == "all":
        for index in range(1, training.validations + 1):
            yield setup.model_copy(update={"checkpoint": index}), {**meant, "checkpoint": index}


def _seeds(spec: VariantSpec, seeds: Sequence[int]) -> Sequence[int]:
    return seeds if METHODS[spec.method].seeded else [0]


def _compose(
    study: Study,
    profile: Profile,
    spec: VariantSpec,
    settings: Mapping[str, Any],
    point: Mapping[str, Any],
) -> tuple[Setup, dict[str, Any]]:
    """Return one variant's setup (any seed's), and its point of the grid with the values that are meant."""
    asked = "domain" if not (spec.domain or study.domain) else f"domain, which study {study.name} asks for,"
    domain = _domain(profile, spec.domain or study.domain, asked)
    values = copy.deepcopy(profile.partial_setups[domain])
    meant: dict[str, Any] = {}
    if study.checkpoints:
        kept = {"validations": study.checkpoints, "keep": "all"}
        merge(values, {"continued": kept, "mask": {"training": kept}})
        if values.get("fine_tune"):
            merge(values, {"fine_tune": kept})
        if "lora" in values:
            merge(values, {"lora": {"training": kept}})
    changes = {**settings, **point}
    for key, value in changes.items():
        where = f"study {study.name}, grid of {spec.method}" if key in point else f"--set {key}"
        final = _change(values, key, value, where)
        if key in point:
            meant[key] = final
    for name in OF_ANOTHER_DOMAIN:
        section = values.get(name)
        if isinstance(section, dict) and section.get("domain"):
            if "data" in section:
                raise ConfigError(f"{name}.data and {name}.domain both say what it is learned on; give one of them.")
            other = copy.deepcopy(profile.partial_setups[_domain(profile, section["domain"], f"{name}.domain")])
            if "data" not in other:
                raise ConfigError(f"{name}.domain = {section['domain']}: that domain has no data; give it some.")
            for key, value in changes.items():
                if key.startswith("data."):  # what holds for the fine-tuning's data holds for the section's
                    _change(other, key, value, f"--set {key}")
            section["data"] = other["data"]
    everything = _every_benchmark(profile, "benchmarks")
    held_out = everything
    validation = _benchmarks(values, "validation")
    values.pop("validation", None)
    if study.choose in ("accuracy", "accuracy-or-loss"):
        if not validation and study.choose == "accuracy":
            raise ConfigError(
                f"study {study.name}: choose = accuracy: domain {domain} of profile {profile.name} has no validation "
                "items; list benchmarks of such under `validation:`, or choose by loss."
            )
        values["validation"] = validation
        held_out = everything + _every_benchmark(profile, "validation")
    if study.benchmarks == "all":
        own = _benchmarks(values, "benchmarks")
        values["benchmarks"] = own + [bench for bench in everything if bench not in own]
    values |= {"held_out": held_out, "backbone": profile.name, "domain": domain, "method": spec.method}
    if not values.get("judge"):  # `Plan.notes` says which are skipped
        for section in {"benchmarks", "validation", "held_out"} & values.keys():
            values[section] = [bench for bench in _benchmarks(values, section) if bench.get("metric") != judged.METRIC]
    return validated(Setup, values, f"study {study.name} on profile {profile.name}"), meant


def _change(values: dict[str, Any], key: str, value: Any, where: str) -> Any:
    """Set a key, and return the value that is meant."""
    final = _scaled(values, key, value, where)
    _put(values, key, final, where)
    return final


def _domain(profile: Profile, name: str | None, field: str) -> str:
    """Return the named domain, or the profile's default one; `field` is where the name stands."""
    domain = name or profile.default_domain
    if not isinstance(domain, str) or domain not in profile.domains:
        raise unknown(f"{field} of profile {profile.name}:", str(domain), profile.domains)
    return domain


def _every_benchmark(profile: Profile, section: str) -> list[Any]:
    """Return the benchmarks of all domains, each once."""
    found: list[Any] = []
    for values in profile.partial_setups.values():
        found += [bench for bench in _benchmarks(values, section) if bench not in found]
    return found


def _benchmarks(values: Mapping[str, Any], section: str) -> list[Any]:
    found = [] if values.get(section) is None else values[section]
    if not isinstance(found, list) or not all(isinstance(bench, dict) for bench in found):
        raise ConfigError(f"{section} = {found!r:.80}: give a list of benchmarks, each with name and task.")
    return found


def _scaled(values: Mapping[str, Any], key: str, value: Any, where: str) -> Any:
    """Return the number that 'x0.3' means: that many times what is there; any other value as it is."""
    found = _FACTOR.fullmatch(value) if isinstance(value, str) else None
    if not found:
        return value
    base: Any = values
    for name in key.split("."):
        base = base.get(name) if isinstance(base, Mapping) else None
    base = _number(base)
    if not isinstance(base, int | float):
        raise ConfigError(
            f"{where}: {key} = {value} is so many times the profile's own, and it has no {key}; add it to the profile."
        )
    return float(f"{base * float(found[1]):.6g}")


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


def _refuse_misplaced(settings: Mapping[str, Any], study: Study) -> None:
    """Refuse keys that have their place elsewhere, and grid keys that make no difference to their method."""
    elsewhere = {**_ELSEWHERE, "seed": "use --seeds, or `seeds:` of the study"}
    for key in settings:
        if key in elsewhere:
            raise ConfigError(f"--set {key}: {key} cannot be set; {elsewhere[key]}.")
    for spec in study.variants:
        for key in spec.grid:
            where = f"study {study.name}, grid of {spec.method}: '{key}'"
            if key in _ELSEWHERE:
                raise ConfigError(f"{where} cannot be varied; {_ELSEWHERE[key]}.")
            if key.split(".")[0] in Setup.model_fields and not uses(spec.method, key):
                raise ConfigError(
                    f"{where} makes no difference to {spec.method}: all its variants would be the same; leave it out."
                )


def concerns(study: Study, key: str) -> bool:
    """Whether an override makes a difference to some variant of the study that does not vary the setting itself."""
    if key.startswith("runtime."):
        return True
    varied = any(key in spec.grid for spec in study.families)
    return not varied and any(uses(spec.method, key) for spec in study.families)


def _refuse_unused(settings: Mapping[str, Any], study: Study, found: Sequence[Setup]) -> None:
    for key, value in settings.items():
        if not any(uses(setup.method, key) for setup in found):
            unused = key if any(uses(setup.method, key.split(".")[0]) for setup in found) else key.split(".")[0]
            raise ConfigError(f"--set {key}={value}: no variant of study '{study.name}' uses '{unused}'.")
        if any(key in spec.grid for spec in study.variants):
            raise ConfigError(
                f"--set {key}={value}: study '{study.name}' varies {key} itself; "
                "leave the override out, or write a study of your own."
            )

"""What this machine lacks for a profile, each thing in one line; nothing is computed, and no weights are fetched.

`examine` never fails itself: whatever cannot be found out becomes a finding that says so. The parts that need the hub
or lm-eval are in `doctor_hub`. Called by `mft doctor`.
"""

from __future__ import annotations

import re
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from mft_core.errors import ConfigError
from mft_core.recipes import Evaluate, FineTune, LearnMask, Recipe, Runtime
from mft_core.stage import Facts
from mft_core.stages import STAGES
from mft_core.stages.flops_and_memory import NUMBER, state_bytes
from mft_core.store.artifacts import ArtifactStore
from pipelines.commands import doctor_hub
from pipelines.commands.doctor_hub import Finding
from pipelines.config import resolve
from pipelines.config.catalogue import Profile, Study, VariantSpec, load_profile
from pipelines.config.compose import runtime_of, setups
from pipelines.config.setup import ModelSpec, Setup, datas

_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
_TRAINING_BYTES = 16
"""per trained weight: the weight, its gradient and AdamW's two moments, all float32"""
_USUAL = Runtime()
_GPU_ADVISED = 500_000_000
"""weights; training more of them on a CPU takes days"""


@dataclass(frozen=True)
class Size:
    """How many weights the base model has, and how that is known."""

    weights: int
    source: str


def examine(profile: str) -> list[Finding]:
    """Look at everything that a study on the profile needs, all of its domains.

    Raises:
        ConfigError: no such profile, or one that cannot be read.
    """
    loaded = load_profile(profile)
    domains = _setups(loaded)
    first = domains[0]
    store = ArtifactStore.from_environment()
    findings = [_python(), _packages(), _home(store)]
    findings += doctor_hub.model_and_data(domains)
    size = _size(first.model)
    findings += _space(first, size, store, runtime_of(loaded, {})) if size else [_unknown_size(first.model)]
    findings += doctor_hub.benchmarks(domains)
    findings += [_port(4200, "the Prefect server", store), _port(5000, "the MLflow server", store)]
    return findings


def _setups(profile: Profile) -> list[Setup]:
    """Return the setup of a mask in each domain of the profile."""
    specs = tuple(VariantSpec.model_validate({"method": "mft", "domain": domain}) for domain in profile.domains)
    study = Study.model_validate({"name": "doctor", "question": "What is missing?", "variants": specs, "seeds": (0,)})
    return [setup for setup, _ in setups(study, profile, {})]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= (3, 11), f"{version}; 3.11 or newer is needed")


def _packages() -> Finding:
    """Compare what is installed with what the project requires, and with the tested set where that is at hand."""
    required = [Requirement(line) for line in metadata.requires("mft-pipeline") or []]
    wrong, tested = [], _tested_versions()
    differing = []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} (needed: {requirement.specifier})")
        wanted = tested.get(_normal(requirement.name))
        if wanted and version.split("+")[0] != wanted:
            differing.append(f"{requirement.name} {version} (tested: {wanted})")
    if wrong:
        return Finding("packages", False, f"{'; '.join(wrong)}; run `make install`, or pip with -c constraints.txt")
    detail = f"not the tested versions, may work: {', '.join(differing)}" if differing else "the tested versions"
    return Finding("packages", True, detail if tested else "as required")


def _tested_versions() -> dict[str, str]:
    """Read constraints.txt; it is there in a checkout, not beside an installed wheel."""
    if not _CONSTRAINTS.is_file():
        return {}
    lines = _CONSTRAINTS.read_text().splitlines()
    pins = [line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0]]
    return {_normal(name): version for name, version in pins}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _home(store: ArtifactStore) -> Finding:
    try:
        store.check_writable()
    except ConfigError as error:
        return Finding("MFT_HOME", False, str(error))
    return Finding("MFT_HOME", True, f"{store.home} is writable")


def _size(spec: ModelSpec) -> Size | None:
    """Count the weights from config.json; where that cannot be had, take the number in the model's name."""
    try:
        return Size(resolve.geometry(resolve.configuration_file(spec)).weights, "from its config.json")
    except ConfigError:
        named = re.search(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", Path(spec.path).name, re.IGNORECASE)
    if not named:
        return None
    scale = 1e9 if named[2].lower() == "b" else 1e6
    return Size(int(float(named[1]) * scale), f"estimated from the '{named[0]}' in its name, config.json not readable")


def _unknown_size(spec: ModelSpec) -> Finding:
    return Finding("memory and disk", False, f"cannot be estimated: config.json of {spec.path} is not readable")


def _space(setup: Setup, size: Size, store: ArtifactStore, runtime: Runtime = _USUAL) -> list[Finding]:
    """Compare what fine-tuning, mask and evaluation need with the disk and the device's memory."""
    stored = NUMBER[setup.precision] * size.weights
    disk = {
        "download": 0 if Path(setup.model.path).is_absolute() else 2 * size.weights,
        "fine-tuned model": stored,
        "resumable state": state_bytes(setup.fine_tune, size.weights),
        "merged model": stored,
    }
    there = next(path for path in (store.home, *store.home.parents) if path.exists())
    free = shutil.disk_usage(there).free
    device, available = _device(setup)
    findings = [
        Finding("model size", True, f"{_amount(size.weights, 'weights')} ({size.source})"),
        _enough("disk", disk, sum(disk.values()), free),
        _memory(setup, size.weights, runtime, device, available),
    ]
    if device == "cpu" and size.weights > _GPU_ADVISED:
        findings.append(Finding("GPU", False, "torch finds none; on a CPU this model takes weeks to train"))
    return findings


def _memory(setup: Setup, weights: int, runtime: Runtime, device: str, available: int) -> Finding:
    """Compare the peaks of the heavy stages with what the device has; on a CPU, all processes share it."""
    try:
        longest = max(data.max_length for data in datas(setup))
        geometry = resolve.geometry(resolve.configuration_file(setup.model))
        facts = Facts(geometry, runtime, setup.precision, longest, device == "cpu")
        found = {name: STAGES[stage].needs(recipe, facts) for name, (stage, recipe) in _heaviest(setup).items()}
        needs = {name: sum(need.memory.values()) for name, need in found.items()}
    except ConfigError:  # no config.json: what fine-tuning takes besides activations is known all the same
        needs = {"fine-tuning": _TRAINING_BYTES * weights, "evaluation": NUMBER[setup.precision] * weights}
        return _enough(f"memory of {device}, before activations", needs, max(needs.values()), available)
    at_once = runtime.heavy_slots * (runtime.processes if device == "cpu" else 1)
    return _enough(f"memory of {device}", needs, at_once * max(needs.values()), available)


def _heaviest(setup: Setup) -> dict[str, tuple[str, Recipe]]:
    """Return the stages that take most memory of a study on the setup, with their recipes, by what they do."""
    mask = setup.mask
    shots = max(bench.num_fewshot or 0 for bench in setup.benchmarks)
    learned = LearnMask(
        sparsity=mask.sparsity,
        layers=mask.layers,
        modules=mask.modules,
        scope=mask.scope,
        min_kept=mask.min_kept,
        score_init=mask.score_init,
        training=mask.training,
    )
    evaluated = Evaluate(task=setup.benchmarks[0].task, num_fewshot=shots, precision=setup.precision)
    return {
        "fine-tuning": ("fine-tune", FineTune(training=setup.fine_tune)),
        "mask learning": ("learn-mask", learned),
        "evaluation": ("evaluate", evaluated),
    }


def _device(setup: Setup) -> tuple[str, int]:
    """Return what a heavy stage would run on here, and its memory in bytes."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return "cpu", int(psutil.virtual_memory().total)
    return torch.cuda.get_device_name(), int(torch.cuda.get_device_properties(0).total_memory)


def _enough(what: str, parts: Mapping[str, int], needed: int, available: int) -> Finding:
    listed = ", ".join(f"{name} {_amount(size, 'B')}" for name, size in parts.items() if size)
    detail = f"{_amount(needed, 'B')} needed ({listed}), {_amount(available, 'B')} there"
    return Finding(what, needed <= available, detail)


def _amount(size: float, unit: str) -> str:
    """Write a size with three digits: '13.5 GB', '6.74 billion weights'."""
    names = ("G", "M", "k") if unit == "B" else (" billion ", " million ", " thousand ")
    scale, name = next(pair for pair in zip((1e9, 1e6, 0), names, strict=True) if size >= pair[0])
    return f"{size / (scale or 1e3):.3g}{name if unit != 'B' else ' ' + name}{unit}"


def _port(port: int, whose: str, store: ArtifactStore) -> Finding:
    """Say who has a port that `mft up` would like; one that is taken is no obstacle, another is used then."""
    from pipelines.servers.services import living_server

    with socket.socket() as probe:
        probe.settimeout(1)
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if not taken:
        return Finding(f"port {port}", True, f"free for {whose}")
    own = living_server(store.home) or {}
    served = any(f":{port}" in str(address) for address in own.values())
    return Finding(f"port {port}", True, f"served by `mft up`, {whose}" if served else f"taken; {whose} gets another")

"""What this machine lacks for a profile, each thing in one line; nothing is computed, and no weights are fetched.

A study of the profile is planned, and a run's own checks (`pipelines.plan.preflight`) are made, all of them. What is on
the hub, or in lm-eval alone, is asked for by `doctor_hub`. `examine` never fails itself: whatever cannot be found out
becomes a finding that says so. Called by `mft doctor`.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mft_core.errors import ConfigError
from mft_core.store.artifacts import ArtifactStore
from pipelines.commands import doctor_hub
from pipelines.commands.doctor_hub import Finding, attempt
from pipelines.commands.gc import size
from pipelines.config.profile import Profile, load_profile
from pipelines.config.study import Study, VariantSpec
from pipelines.config.yaml_to_setups import setups
from pipelines.plan.plan import Plan, make_plans
from pipelines.plan.preflight import checks

_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
_GPU_ADVISED = 500_000_000
"""weights; training more of them on a CPU takes days"""


def examine(profile: str) -> list[Finding]:
    """Look at everything that a study on the profile needs, all of its domains.

    Raises:
        ConfigError: no such profile, or one that cannot be read.
    """
    loaded, store = load_profile(profile), ArtifactStore.from_environment()
    study = study_of(loaded)
    domains = [setup for setup, _ in setups(study, loaded, {})]
    findings = [
        _packages(),
        *doctor_hub.model_and_data(domains),
        *_planned(study, loaded, store),
        *doctor_hub.benchmarks(domains),
        Finding("size of MFT_HOME", True, f"{_gigabytes(size(store.home))} in {store.home}; `mft gc` says what may go"),
        _port(4200, "the Prefect server", store),
        _port(5000, "the MLflow server", store),
    ]
    return list(dict.fromkeys(findings))  # domains share data and benchmarks


def study_of(profile: Profile) -> Study:
    """Return the study that is planned: a mask in each domain."""
    variants = tuple(VariantSpec.model_validate({"method": "mft", "domain": domain}) for domain in profile.domains)
    return Study(name="doctor", question="What is missing?", variants=variants, seeds=(0,))


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
        wanted = tested.get(canonicalize_name(requirement.name))
        if wanted and version.split("+")[0] != wanted:
            differing.append(f"{requirement.name} {version} (tested: {wanted})")
    if wrong:
        return Finding("packages", False, f"{'; '.join(wrong)}; run `make install`, or pip with -c constraints.txt")
    detail = f"not the tested versions, may work: {', '.join(differing)}" if differing else "the tested versions"
    return Finding("packages", True, detail if tested else "as required")


def _tested_versions() -> Mapping[str, str]:
    """Read constraints.txt; it is there in a checkout, not beside an installed wheel."""
    if not _CONSTRAINTS.is_file():
        return {}
    lines = _CONSTRAINTS.read_text().splitlines()
    pins = [line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0]]
    return {canonicalize_name(name): version for name, version in pins}


def _planned(study: Study, profile: Profile, store: ArtifactStore) -> list[Finding]:
    """Plan the study; say what its stages need, and, where the model is at hand, make a run's own checks."""
    try:
        (plan,) = make_plans([study], profile, store, unpinned=True)
    except ConfigError as error:
        return [
            attempt("MFT_HOME", store.check_writable),
            Finding("memory and disk", False, f"cannot be estimated: {error}"),
        ]
    findings = _memory(plan)
    local = all(item.resolved.model.source.revision is None for item in plan.variants)
    for what, check in checks(plan, store, {}):
        if local or what in ("MFT_HOME", "disk", "processes", "device", "devices"):
            disk = f"{_gigabytes(plan.disk_needed)} needed under {store.home}"
            findings.append(attempt(what, check, disk if what == "disk" else "as a run needs it"))
    return findings


def _memory(plan: Plan) -> list[Finding]:
    """Compare the peak of the stage that takes most with what the device has; on a CPU, all processes share it."""
    weights = plan.variants[0].resolved.model.geometry.weights
    device, available = _device()
    peaks = {step.node.stage: sum(plan.needs(step.node).memory.values()) for step in plan.steps}
    stage = max(peaks, key=lambda name: peaks[name])
    runtime = plan.runtime
    needed = peaks[stage] * runtime.heavy_slots * (runtime.processes if device == "cpu" else 1)
    detail = f"{_gigabytes(needed)} needed (by {stage}), {_gigabytes(available)} there"
    findings = [
        Finding("model size", True, f"{weights / 1e6:,.4g} million weights"),
        Finding(f"memory of {device}", needed <= available, detail),
    ]
    if device == "cpu" and weights > _GPU_ADVISED:
        findings.append(Finding("GPU", False, "torch finds none; on a CPU this model takes weeks to train"))
    return findings


def _device() -> tuple[str, int]:
    """Return what a heavy stage would run on here, and its memory in bytes."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return "cpu", int(psutil.virtual_memory().total)
    return torch.cuda.get_device_name(), int(torch.cuda.get_device_properties(0).total_memory)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"


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

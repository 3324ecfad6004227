"""How long the runs of a plan take, before anything runs: for `mft plan`, and promised to each stage of `mft run`.

A stage that is there took what its manifest measured; one to come takes what it needs
(`mft_core.stages.flops_and_memory`) on the device that is here, or on another by name. Rates are those of the table
below, corrected, stage by stage, by the median of what finished stages in this store took against what was promised to
them on the same device (`Experience`).

Data sheets give peak and memory of an accelerator (dense), of which 40% is used: PaLM reports 46% (Chowdhery et al.
2022, table 3), Korthikanti et al. 2022 (table 5) 42 to 56%. A mask of layers 20-23 of LLaMA2-7B, packed rows of 1,024
tokens in batches of 8, passed 21,000 tokens/s on one H100, estimated 18,800; one sequence of 512 at a time 4,700. A CPU
core is fitted to the profile `tiny` (1.6 M weights, one thread) and within 1.6 times of SmolLM2-135M on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil

from mft_core.errors import unknown
from mft_core.recipes import Evaluate, FineTune, LearnMask, Runtime
from mft_core.stage import Facts, Needs
from mft_core.stages.flops_and_memory import PROCESS
from mft_core.store import manifests
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.usage import processor
from pipelines.graph.lookup import Step, look_up
from pipelines.graph.nodes import Edge, Node, closure
from pipelines.graph.variants import Variant, unique_nodes
from pipelines.plan.analyses import answers
from pipelines.plan.needs import accelerators_here, at_once
from pipelines.plan.plan import Plan
from pipelines.search import view

_PEAKS = {
    "h200": (989e12, 67e12, 4.8e12),
    "h100": (989e12, 67e12, 3.35e12),
    "a100": (312e12, 19.5e12, 2.04e12),
    "l40s": (362e12, 91e12, 0.86e12),
    "4090": (165e12, 83e12, 1.0e12),
}
"""operations a second in bfloat16 and float32, and bytes of memory a second, by what is in an accelerator's name"""
_UTILISATION = 0.4
_CORE, _CORE_MEMORY = 5e10, 4e9
"""operations and bytes of memory a second of a processor core"""
_TRAININGS = ("fine-tune", "learn-mask")
"""stages that `runtime.processes` share among them"""
ON = ("cpu", *_PEAKS)
"""what `mft plan --on` takes"""


@dataclass(frozen=True)
class Device:
    """What work takes on a device; rates per second."""

    name: str
    """as a manifest's provenance has it"""
    bfloat16: float
    float32: float
    memory: float
    start: float
    """seconds before a stage does anything"""
    taken_for: str = ""
    """the data sheet that is used"""

    def hours(self, stage: str, needs: Needs, runtime: Runtime) -> float:
        """Return how long a stage takes."""
        seconds = needs.flops / (self.bfloat16 if needs.precision == "bfloat16" else self.float32)
        seconds += needs.moved / self.memory
        seconds /= runtime.processes if stage in _TRAININGS else 1
        return (seconds + needs.seconds + self.start) / 3600


def device_of(runtime: Runtime, on: str | None = None) -> Device:
    """Return the device that stages run on here, or one that is named.

    Raises:
        ConfigError: no such name.
    """
    if on is not None and on not in ON:
        raise unknown("--on", on, ON)
    found = on or ("cpu" if runtime.device == "cpu" else next(iter(accelerators_here()), "cpu"))
    if found == "cpu":
        cores = runtime.threads or psutil.cpu_count() or 1
        rate = _CORE * cores
        return Device(processor(), rate, rate, _CORE_MEMORY, 0.2, f"{cores} cores" if cores > 1 else "one core")
    sheet = next((name for name in _PEAKS if name in found.lower()), "a100")
    bfloat16, float32, memory = _PEAKS[sheet]
    return Device(found, bfloat16 * _UTILISATION, float32 * _UTILISATION, memory, 10, sheet)


def likes(node: Node, facts: Facts) -> tuple[str, str]:
    """Name what a node's work is like: its kind, on one model, for a probe; and more closely, for finished stages."""
    recipe, kind, precision = node.recipe, node.stage, facts.precision
    if isinstance(recipe, FineTune | LearnMask) and recipe.training:
        kind += " lora" if isinstance(recipe, FineTune) and recipe.lora else ""
        precision = recipe.training.precision
    elif isinstance(recipe, LearnMask):
        kind += f" {recipe.selector}"
    elif isinstance(recipe, Evaluate):
        precision = recipe.precision
    kind = f"{kind} {precision} {facts.geometry.weights}"
    return kind, f"{kind} {recipe.task}" if isinstance(recipe, Evaluate) else kind


@dataclass(frozen=True)
class Experience:
    """What stages took on one device, against what the table says: those that finished, else a probe's."""

    finished: Mapping[str, float] = field(default_factory=dict)
    """measured over promised seconds, the median, by what they are like"""
    probed: Mapping[str, float] = field(default_factory=dict)
    """likewise, by kind"""
    peaks: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """most bytes measured, by stage and bytes promised: of the same kind and shape"""

    @classmethod
    def of(cls, store: ArtifactStore, device: Device, probed: Mapping[str, float] | None = None) -> Experience:
        """Read the manifests of a store."""
        ratios: dict[str, list[float]] = {}
        peaks: dict[tuple[str, int], int] = {}
        for path in (store.home / "artifacts").glob("*/*/manifest.json"):
            manifest = manifests.read(path.parent) or {}
            used = manifest.get("provenance", {})
            promised = used.get("promised")
            if promised and used.get("device") == device.name:
                if like := promised.get("like"):
                    ratios.setdefault(like, []).append(used["seconds"] / promised["seconds"])
                shape = manifest["stage"], promised["peak_memory_bytes"]
                if used["alone"]:
                    peaks[shape] = max(peaks.get(shape, 0), used["peak_memory_bytes"])
        return cls({like: median(found) for like, found in ratios.items()}, probed or {}, peaks)

    def factor(self, node: Node, facts: Facts) -> float:
        """Return what the table's seconds are to be multiplied by."""
        kind, like = likes(node, facts)
        return self.finished.get(like) or self.probed.get(kind) or 1.0


def promises(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return by node id what is promised to the stages to compute, of the table's rates alone, and what it is like."""
    device = device_of(plan.runtime)
    found = {}
    for step in plan.to_compute:
        needs, facts = plan.needs(step.node), plan.facts(step.node)
        seconds = 3600 * device.hours(step.node.stage, needs, plan.runtime)
        peak, (_, like) = sum(needs.memory.values()), likes(step.node, facts)
        found[step.node.id] = {"seconds": round(seconds, 3), "peak_memory_bytes": peak, "like": like}
    return found


@dataclass(frozen=True)
class Cost:
    """Of one stage, in hours on the clock."""

    hours: float
    """in all"""
    measured: bool
    """the stage is there, and took so long; else it is an estimate"""

    @property
    def to_come(self) -> float:
        """What is still to be paid."""
        return 0.0 if self.measured else self.hours


@dataclass(frozen=True)
class Run:
    """One variant of a study and what it costs, in hours."""

    variant: Variant
    hours: float
    """of all stages that it needs"""
    shared: float
    """of those that an earlier run, of this or an earlier study, has already been charged with"""
    shared_with: tuple[str, ...]
    """the studies whose runs those are, in the plans' order"""
    to_come: float
    """of the others, what is not cached"""


@dataclass(frozen=True)
class Bill:
    """What a study costs; its stages by node id."""

    plan: Plan
    device: Device
    runs: list[Run]
    costs: Mapping[str, Cost]
    """of all stages, its answers included"""
    answers: list[Step]
    """the comparison and the analyses"""
    charged: Mapping[str, str]
    """the study that is charged with a stage: this one, or an earlier one"""
    open: float = 0.0
    """hours of what a search has still to ask for: trainings, and what follows its choices; they are nobody else's"""
    experience: Experience = Experience()

    @property
    def hours(self) -> float:
        """Of all stages, each counted once."""
        return sum(cost.hours for cost in self.costs.values()) + self.open

    @property
    def shared(self) -> float:
        """Of the stages that an earlier study is charged with."""
        return sum(cost.hours for node_id, cost in self.costs.items() if self.charged[node_id] != self.plan.study.name)

    @property
    def to_come(self) -> float:
        """Of the other stages, what is not cached."""
        own = (cost for node_id, cost in self.costs.items() if self.charged[node_id] == self.plan.study.name)
        return sum(cost.to_come for cost in own) + self.open

    def peak(self, node: Node) -> int:
        """Return the most bytes that a process of the stage holds: measured of its kind and shape, else estimated."""
        promised = sum(self.plan.needs(node).memory.values())
        measured = self.experience.peaks.get((node.stage, promised))
        return promised if measured is None else PROCESS + measured

    @property
    def wall(self) -> float:
        """Hours until all is there: as many heavy stages at a time as there are slots, each after what it needs."""
        ends: dict[str, float] = {}
        for step in (*self.plan.steps, *self.answers):
            before = [given.node.id for given in step.node.inputs.values() if isinstance(given, Edge)]
            ends[step.node.id] = self.costs[step.node.id].to_come + max((ends.get(key, 0) for key in before), default=0)
        return max(self.to_come / at_once(self.plan.runtime), *ends.values())


def bills(
    plans: Sequence[Plan], store: ArtifactStore, on: str | None = None, probed: Mapping[str, float] | None = None
) -> list[Bill]:
    """Price plans of one profile that run one after the other; what two of them need is charged to the first.

    Args:
        on: a device of `ON`; None is the one that is here.
        probed: what this device was measured to take, by kind of work (`pipelines.cost.probe`).
    """
    charged: dict[str, str] = {}
    estimates: dict[str, Cost] = {}
    device = device_of(plans[0].runtime, on)
    experience = Experience.of(store, device, probed)
    return [_bill(plan, store, device, experience, charged, estimates) for plan in plans]


def _bill(
    plan: Plan,
    store: ArtifactStore,
    device: Device,
    experience: Experience,
    charged: dict[str, str],
    known: dict[str, Cost],
) -> Bill:
    steps = {step.node.id: step for step in plan.steps}
    asked = [node for node in closure(answers(plan)) if node.id not in steps]
    further = look_up(asked, store, plan.steps)
    every = {**steps, **{step.node.id: step for step in further}}
    for node_id, step in every.items():
        if node_id not in known:
            known[node_id] = _cost(plan, device, experience, step)
    costs = {node_id: known[node_id] for node_id in every}
    runs = [_run(item, costs, charged, plan.study.name) for item in plan.variants]
    for node_id in every:
        charged.setdefault(node_id, plan.study.name)
    mine = {node_id: charged[node_id] for node_id in every}
    still_open = _open(plan, device, experience, every, costs)
    return Bill(plan, device, runs, costs, further, mine, still_open, experience)


def _cost(plan: Plan, device: Device, experience: Experience, step: Step) -> Cost:
    """Return what a stage has taken, or is going to."""
    if step.manifest is not None:
        return Cost(float(step.manifest["provenance"].get("seconds") or 0) / 3600, True)
    hours = device.hours(step.node.stage, plan.needs(step.node), plan.runtime)
    return Cost(hours * experience.factor(step.node, plan.facts(step.node)), False)


def _open(
    plan: Plan, device: Device, experience: Experience, every: Mapping[str, Step], costs: Mapping[str, Cost]
) -> float:
    """Return the hours of what the plan's search will ask for, as those of its like."""
    if plan.search is None or plan.search.finished:
        return 0.0
    known = {node_id: cost.hours for node_id, cost in costs.items()}
    trainings = view.hours(plan.search, known) - sum(known[node.id] for node in plan.search.nodes)
    following = [Step(node, None) for node in closure(plan.search.to_come) if node.id not in every]
    asked = {node.id for node in plan.search.to_come if node.stage != "learn-mask"}
    priced = (_cost(plan, device, experience, step) for step in following if step.node.id in asked)
    return trainings + sum(cost.hours for cost in priced)


def _run(item: Variant, costs: Mapping[str, Cost], charged: dict[str, str], study: str) -> Run:
    """Charge a variant with what no run before it needs."""
    needed = [node.id for node in unique_nodes([item])]
    shared = [node_id for node_id in needed if node_id in charged]
    own = [node_id for node_id in needed if node_id not in charged]
    with_studies = tuple(dict.fromkeys(charged[node_id] for node_id in shared))
    charged.update(dict.fromkeys(own, study))
    return Run(
        variant=item,
        hours=sum(costs[node_id].hours for node_id in needed),
        shared=sum(costs[node_id].hours for node_id in shared),
        shared_with=with_studies,
        to_come=sum(costs[node_id].to_come for node_id in own),
    )


def stages(bill: Bill) -> Iterator[tuple[Step, Cost]]:
    """Yield every stage of a study with its cost: those of the variants, then its answers."""
    for step in (*bill.plan.steps, *bill.answers):
        yield step, bill.costs[step.node.id]

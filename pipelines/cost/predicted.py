"""What the runs of a plan cost, in hours of a device, before anything runs; for `mft plan`.

A stage that is there costs what its manifest measured, and nothing more; one that is to come costs what
`pipelines.cost.flops` counts, on an assumed device. Where `runtime.device` is a CUDA device, or it is 'auto' and the
fine-tuning is in bfloat16, that is `ACCELERATOR`, else `CORE`. Hours are those of all devices together: several
processes make a training shorter, not cheaper.

`ACCELERATOR` has the peak and the memory of the data sheet of an 80 GB H100 (dense), and uses 40% of the peak: PaLM
reports 46% (Chowdhery et al. 2022, table 3), Korthikanti et al. 2022 ("Reducing Activation Recomputation", table 5)
42 to 56%, so small batches and padding are allowed for. One measurement to hold it against: masks of layers 20-23 of
LLaMA2-7B, packed rows of 1,024 tokens in batches of 8 on one H100: 21,000 tokens/s, estimated 18,800. One sequence of
512 at a time, as published, gave 4,700: unpacked data in small micro-batches cost four times as much as told here.
That starting a layer takes 0.8 ms and the disk passes 1 GB a second is assumed, not measured.
`CORE` is fitted to stages of the profile `tiny` (one thread): fine-tuning 51 s, masks of four layers 14 to 16 s, and
evaluation of 600 items 1 to 4 s are met within a third. Adapters took 1.7 times, `landscape` three times what is told,
on a machine that was not quiet; a core of another make, or a larger model, will differ.

Not counted: waiting for memory that is not there, writing resumable states, downloads, and comparisons.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mft_core.layers import parse_layers
from mft_core.recipes import Anatomy, Evaluate, FineTune, Landscape, LearnMask, MergeMask, PredictLayers, PrepareData
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.geometry import Geometry
from pipelines.config.setup import Resolved, Setup
from pipelines.cost import flops, workload
from pipelines.cost.flops import Work
from pipelines.graph.lookup import Step, look_up
from pipelines.graph.nodes import Edge, Node, closure
from pipelines.graph.variants import Variant, unique_nodes
from pipelines.plan.analyses import answers
from pipelines.plan.plan import Plan
from pipelines.search import view

_TRAININGS = ("fine-tune", "learn-mask")
"""stages that `runtime.processes` share among them"""


@dataclass(frozen=True)
class Device:
    """What work takes on a device; rates per second."""

    name: str
    unit: str
    """what its time is told in"""
    units_an_hour: int
    peak: Mapping[str, float]
    """flops in a second, by precision"""
    utilisation: float
    """share of the peak that is reached"""
    memory: float
    """bytes of its memory"""
    disk: float
    """bytes of the disk beside it"""
    launch: float
    """seconds to start a decoder layer's kernels in the eager mode of transformers"""
    start: float
    """seconds before a stage does anything"""
    processor: bool
    """it is a processor core itself, and does what needs no accelerator too"""

    def hours(self, work: Work, precision: str) -> float:
        """Return the hours that the work takes."""
        seconds = work.flops / (self.peak[precision] * self.utilisation) + work.moved / self.memory
        seconds += work.stored / self.disk + work.launches * self.launch
        if self.processor:
            return (seconds + work.processor + self.start) / 3600
        return (seconds + self.start) / 3600 if seconds else 0.0


ACCELERATOR = Device(
    name="an 80 GB accelerator of H100 class",
    unit="GPU-hours",
    units_an_hour=1,
    peak={"bfloat16": 989e12, "float32": 67e12},
    utilisation=0.4,
    memory=3.35e12,
    disk=1e9,
    launch=0.8e-3,
    start=10,
    processor=False,
)
CORE = Device(
    name="one CPU core",
    unit="core-min",
    units_an_hour=60,
    peak={"bfloat16": 5e10, "float32": 5e10},
    utilisation=1.0,
    memory=4e9,
    disk=1e9,
    launch=0.2e-3,
    start=0.2,
    processor=True,
)


@dataclass(frozen=True)
class Cost:
    """Of one stage, in hours of the device."""

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


def bills(plans: Sequence[Plan], store: ArtifactStore) -> list[Bill]:
    """Price plans of one profile that run one after the other; what two of them need is charged to the first."""
    charged: dict[str, str] = {}
    estimates: dict[str, Cost] = {}
    return [_bill(plan, store, charged, estimates) for plan in plans]


def device_of(plan: Plan) -> Device:
    """Return the device that the plan's stages are priced on."""
    if plan.runtime.device != "auto":
        return CORE if plan.runtime.device == "cpu" else ACCELERATOR
    precisions = {item.setup.fine_tune.precision for item in plan.variants}
    return ACCELERATOR if "bfloat16" in precisions else CORE


def _bill(plan: Plan, store: ArtifactStore, charged: dict[str, str], known: dict[str, Cost]) -> Bill:
    steps = {step.node.id: step for step in plan.steps}
    asked = [node for node in closure(answers(plan)) if node.id not in steps]
    further = look_up(asked, store, plan.steps)
    every = {**steps, **{step.node.id: step for step in further}}
    device = device_of(plan)
    pricing = _Pricing(plan, device, every)
    for node_id, step in every.items():
        if node_id not in known:
            known[node_id] = pricing.cost(step)
    costs = {node_id: known[node_id] for node_id in every}
    runs = [_run(item, costs, charged, plan.study.name) for item in plan.variants]
    for node_id in every:
        charged.setdefault(node_id, plan.study.name)
    mine = {node_id: charged[node_id] for node_id in every}
    return Bill(plan, device, runs, costs, further, mine, _open(plan, device, every, costs))


def _open(plan: Plan, device: Device, every: Mapping[str, Step], costs: Mapping[str, Cost]) -> float:
    """Return the hours of what the plan's search will ask for, as those of its like."""
    if plan.search is None or plan.search.finished:
        return 0.0
    known = {node_id: cost.hours for node_id, cost in costs.items()}
    trainings = view.hours(plan.search, known) - sum(known[node.id] for node in plan.search.nodes)
    following = [Step(node, None) for node in closure(plan.search.to_come) if node.id not in every]
    pricing = _Pricing(plan, device, {**every, **{step.node.id: step for step in following}})
    asked = {node.id for node in plan.search.to_come if node.stage != "learn-mask"}
    return trainings + sum(pricing.cost(step).hours for step in following if step.node.id in asked)


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


class _Pricing:
    """Prices the stages of one plan."""

    def __init__(self, plan: Plan, device: Device, steps: Mapping[str, Step]) -> None:
        self._plan, self._device, self._steps = plan, device, steps

    def cost(self, step: Step) -> Cost:
        """Return what a stage has cost, or is going to."""
        if step.manifest is not None:
            return Cost(_measured(step.node, step.manifest["provenance"], self._device), True)
        resolved = self._resolved(step.node)
        precision = _precision(step.node, resolved.setup)
        return Cost(self._device.hours(self._work(step.node, resolved, precision), precision), False)

    def _resolved(self, node: Node) -> Resolved:
        """Return the settings of a variant that the stage belongs to; of an analysis, of the model that it looks at."""
        while node.id not in self._plan.resolved:
            node = next(given.node for given in node.inputs.values() if isinstance(given, Edge))
        return self._plan.resolved[node.id]

    def _work(self, node: Node, resolved: Resolved, precision: str) -> Work:
        setup, geometry, runtime, recipe = resolved.setup, resolved.model.geometry, self._plan.runtime, node.recipe
        if isinstance(recipe, PrepareData):
            found = workload.sequences(node, geometry.vocabulary, None)
            return Work(processor=flops.PREPARED * (found.train + found.validation))
        if isinstance(recipe, MergeMask):
            return flops.merge(geometry, precision)
        if isinstance(recipe, Evaluate):
            return flops.evaluate(recipe, geometry, workload.items(node, geometry.vocabulary), runtime)
        data = self._data(node, geometry)
        if isinstance(recipe, LearnMask):
            return flops.learn_mask(recipe, geometry, data, setup.fine_tune.precision, runtime)
        if data is None:  # a comparison
            return Work()
        if isinstance(recipe, FineTune):
            return flops.fine_tune(recipe, geometry, data, runtime)
        if isinstance(recipe, Anatomy):
            return flops.anatomy(recipe, geometry, data, precision)
        if isinstance(recipe, PredictLayers):
            return flops.predict_layers(recipe.calibration_rows, geometry, data, precision)
        if isinstance(recipe, Landscape):
            mask = _mask_of(node)
            layers = parse_layers(mask.layers, len(geometry.layers))
            masked = sum(matrix.weights for matrix in geometry.masked(layers, mask.modules))
            return flops.landscape(recipe, geometry, data, min(layers), masked, precision)
        raise TypeError(f"no estimate for the stage {node.stage}")

    def _data(self, node: Node, geometry: Geometry) -> workload.Sequences | None:
        given = node.inputs.get("data")
        if not isinstance(given, Edge):
            return None
        step = self._steps.get(given.node.id)
        return workload.sequences(given.node, geometry.vocabulary, step.manifest if step else None)


def _mask_of(landscape: Node) -> LearnMask:
    merged = landscape.inputs["masked"]
    assert isinstance(merged, Edge)
    mask = merged.node.inputs["mask"]
    assert isinstance(mask, Edge)
    assert isinstance(mask.node.recipe, LearnMask)
    return mask.node.recipe


def _precision(node: Node, setup: Setup) -> str:
    """Return what the stage computes in."""
    recipe = node.recipe
    if isinstance(recipe, FineTune | LearnMask) and recipe.training is not None:
        return recipe.training.precision
    return recipe.precision if isinstance(recipe, Evaluate) else setup.fine_tune.precision


def _measured(node: Node, used: Mapping[str, Any], device: Device) -> float:
    """Return the hours of all devices that a finished stage took; of cores that torch chose, all of the machine's."""
    runtime = used.get("runtime") or {}
    devices = runtime.get("processes") or 1 if node.stage in _TRAININGS else 1
    if device.processor:
        devices *= runtime.get("threads") or _cores(str(used.get("device")))
    return float(used.get("seconds") or 0.0) * devices / 3600


def _cores(machine: str) -> int:
    found = re.search(r"(\d+) cores$", machine)
    return int(found[1]) if found else 1


def stages(bill: Bill) -> Iterator[tuple[Step, Cost]]:
    """Yield every stage of a study with its cost: those of the variants, then its answers."""
    for step in (*bill.plan.steps, *bill.answers):
        yield step, bill.costs[step.node.id]

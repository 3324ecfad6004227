"""What planning knows of a node besides its recipe, from which the stage says what it needs.

`Stage.needs` (`mft_core.stages.flops_and_memory`) does the counting; the plan, its cost and `mft doctor` read it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from mft_core.errors import ConfigError
from mft_core.recipes import LearnMask, Runtime
from mft_core.stage import Facts
from pipelines.config.setup import Resolved, datas
from pipelines.graph.nodes import Edge, Node
from pipelines.plan import workload
from tasks.cluster import described


def facts_of(
    node: Node, resolved: Mapping[str, Resolved], runtime: Runtime, manifests: Mapping[str, Mapping[str, Any]]
) -> Facts:
    """Return what is known of a node's work besides its recipe.

    Args:
        resolved: by node id, of a variant that the node belongs to; an analysis belongs to the model that it looks at.
        manifests: by node id, of stages that are there: prepared data are counted, not estimated.
    """
    of = node
    while of.id not in resolved:
        of = next(given.node for given in of.inputs.values() if isinstance(given, Edge))
    owner = resolved[of.id]
    geometry = owner.model.geometry
    amounts: dict[str, float] = {}
    given = node.inputs.get("data")
    prepares = given.node if isinstance(given, Edge) else node
    if prepares.stage == "prepare-data":
        amounts = workload.sequences(prepares, owner.model, manifests.get(prepares.id))
    elif node.stage == "evaluate":
        amounts = workload.items(node, owner.model)
    longest = max((data.max_length for data in datas(owner.setup)), default=0)
    cpu = runtime.device == "cpu" or not accelerators_here()
    return Facts(geometry, runtime, owner.tuned_precision, longest, cpu, mask=_mask(node), **amounts)


def _mask(node: Node) -> LearnMask | None:
    """Return the recipe of the mask that a stage, or the masked model that it looks at, is made with."""
    for given in node.inputs.values():
        if isinstance(given, Edge):
            recipe = given.node.recipe if isinstance(given.node.recipe, LearnMask) else None
            if recipe or (given.node.stage in ("merge-mask", "pick-checkpoint") and (recipe := _mask(given.node))):
                return recipe
    return None


@functools.cache
def accelerators_here() -> tuple[str, ...]:
    """Return the names of this machine's CUDA devices, as torch has them, without torch."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    asked = [command, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    return tuple(map(str.strip, done.stdout.splitlines())) if done.returncode == 0 else ()


def at_once(runtime: Runtime) -> int:
    """Return how many heavy stages run at one time; on a scheduler that runs already, which is not asked, one."""
    if runtime.cluster:
        file = None
        with contextlib.suppress(ConfigError):  # who computes is told
            file = described(runtime)
        return max(1, file.workers) if file else 1
    devices = len(accelerators_here()) if runtime.device in ("auto", "cuda") else 0
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        devices = min(devices, len(list(filter(None, visible.split(",")))))
    if runtime.devices != "auto":
        devices = len(runtime.devices.split(","))
    return runtime.heavy_slots * max(1, devices // runtime.processes)

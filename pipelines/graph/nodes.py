"""A node: a stage with its recipe and where its inputs come from, outside sources or other nodes.

Its `id` is the hash of that structure, known before anything runs; the artifact's key needs the inputs' contents and is
known when they are there. Used by the plan, the flows and the report.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mft_core.cache_key import digest
from mft_core.recipes import Recipe
from mft_core.stages import STAGES
from mft_core.store.sources import Source


@dataclass(frozen=True)
class Edge:
    """An input that another node makes; `part` is the path inside its payload."""

    node: Node
    part: str = ""


@dataclass(frozen=True, eq=False)
class Node:
    """One stage to run: what it is called, its recipe, its inputs."""

    stage: str
    recipe: Recipe
    inputs: Mapping[str, Source | Edge]
    label: str

    @functools.cached_property
    def id(self) -> str:
        """Hash of the structure; equal for equal work."""
        inputs = {
            name: {"node": given.node.id, "part": given.part} if isinstance(given, Edge) else given.digest
            for name, given in self.inputs.items()
        }
        version = STAGES[self.stage].version
        return digest({"stage": self.stage, "version": version, "recipe": self.recipe, "inputs": inputs})


def closure(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes and all that they need, each once and after the ones that it needs."""
    ordered: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.id not in ordered:
            for given in node.inputs.values():
                if isinstance(given, Edge):
                    visit(given.node)
            ordered[node.id] = node

    for node in nodes:
        visit(node)
    return list(ordered.values())

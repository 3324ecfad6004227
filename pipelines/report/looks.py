"""Reading a study more than once: declared beforehand (`--until decided`), or with trainings added, as the page tells.

Whoever adds trainings until the answer pleases finds false gains more often than the intervals say. Declared looks
share what may be false among them (`mft_core.statistics.verdicts`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mft_core.errors import ConfigError
from mft_core.statistics.tables import without_seed
from mft_core.statistics.verdicts import LOOKS
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.study import load_studies
from pipelines.report.asked import Asked

Row = Mapping[str, Any]
_APART = ("seed", "replicate", "baseline")


def declared(asked: Asked) -> Iterator[Asked]:
    """Yield what is asked for at each look, from the fewest replicates; `asked.replicates` is the most.

    Raises:
        ConfigError: the study declares no contrasts, or the most is too few for a claim about the recipe.
    """
    if not any(study.contrasts for study in load_studies(asked.study)):
        raise ConfigError(
            f"--until decided: study {asked.study} declares no contrasts that could be; declare "
            "some (`contrasts:`), or leave the option out."
        )
    most = asked.replicates or LOOKS[-1]
    if most < LOOKS[0]:
        raise ConfigError(f"--until decided --replicates {most}: valid are {LOOKS[0]} or more, the most to be trained.")
    looks = (*(look for look in LOOKS if look < most), most)
    for look in looks:
        yield replace(asked, replicates=look, looks=looks)


def undecided(contrasts: Sequence[Row]) -> list[str]:
    """Return those of a study's declared contrasts that are not decided."""
    return [str(row["contrast"]) for row in contrasts if row["family"] == "primary" and row["verdict"] == "undecided"]


def earlier_looks(manifest: Mapping[str, Any], store: ArtifactStore) -> list[str]:
    """Return how many fine-tunings and seeds each earlier comparison had, from the fewest.

    Args:
        manifest: of the comparison; what was read as one of the looks that it declares is none that was added.
    """
    looks, own, evaluations = manifest["recipe"].get("looks"), _variants(manifest), set(manifest["inputs"].values())
    found = set()
    for other in store.manifests("compare"):
        if looks and other["recipe"].get("looks") == looks:
            continue
        if set(other["inputs"].values()) < evaluations and _variants(other) == own:
            found.add(_design(other))
    return [f"{_count(replicates, 'fine-tuning')} and {_count(seeds, 'seed')}" for replicates, seeds in sorted(found)]


def _variants(manifest: Mapping[str, Any]) -> tuple[str, set[str]]:
    """Return the study's question and what it compares, whatever the seeds."""
    recipe = manifest["recipe"]
    told = [{key: value for key, value in item.items() if key not in _APART} for item in recipe["variants"]]
    named = {json.dumps({**item, "variant": without_seed(str(item["variant"]))}, sort_keys=True) for item in told}
    return recipe["question"], named


def _design(manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of fine-tunings and of seeds."""
    variants = manifest["recipe"]["variants"]
    seeds = {item["seed"] for item in variants if item.get("seed") is not None}
    return len({item.get("replicate", 0) for item in variants}), max(1, len(seeds))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)

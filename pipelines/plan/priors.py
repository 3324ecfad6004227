"""What earlier studies of a profile have measured of how much trainings differ: priors of a comparison.

Every comparison says in its manifest's summary how much the trainings of each method differed (`unit_variance`). A new
one takes this up from all that are in the store: of the same profile, of another question, and of other trainings than
its own. Once computed, a comparison keeps the priors that it had, whatever has been run since, and so its key. Used by
`pipelines.plan.plan`.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from mft_core.methods import REFERENCES
from mft_core.recipes import Compare
from mft_core.stages import STAGES
from mft_core.store.artifacts import ArtifactStore


def with_priors(recipe: Compare, own: Set[str], store: ArtifactStore) -> Compare:
    """Return the recipe with what earlier studies measured.

    Args:
        recipe: of the comparison, without priors.
        own: digests of its evaluations of treatments, as far as they are there: what was measured on these is no prior.
    """
    measured: dict[str, list[Any]] = {}
    for other in store.manifests("compare"):
        if other["version"] != STAGES["compare"].version:
            continue
        past = Compare.model_validate(other["recipe"])
        if past.model_copy(update={"priors": {}}) == recipe:
            return past
        treated = {other["inputs"][f"eval-{index}"] for index, item in enumerate(past.variants)
                   if item["method"] not in REFERENCES}  # fmt: skip
        if (past.profile == recipe.profile and past.question != recipe.question) and own.isdisjoint(treated):
            for name, values in other["summary"]["unit_variance"].items():
                measured.setdefault(name, []).append(values)
    if not measured:
        return recipe
    from mft_core.statistics.effects import UnitVariance  # takes a while

    pooled = {name: UnitVariance.pooled([UnitVariance(*one) for one in values]) for name, values in measured.items()}
    return recipe.model_copy(update={"priors": {name: one for name, one in pooled.items() if one}})

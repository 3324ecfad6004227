"""What earlier studies of a profile have measured of how much trainings differ: priors of a comparison.

Every comparison says in its manifest's summary how much the trainings of each method, and those of each declared
contrast, differed on a domain (`unit_variance`). A new one takes this up, for each of its variants and contrasts by
itself, from those in the store of the same profile and of another question that measured it on other units: on other
fine-tunings where the claim is about the recipe, on other trainings of the treatment where it is about a checkpoint.
Of several that share units one counts. Units are told by their evaluations: models that an earlier study evaluated on
other benchmarks are taken for others. So what else a study compares changes none of its priors. Once computed, a
comparison keeps the priors that it had, whatever has been run since, and so its key. Used by `pipelines.plan.plan`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mft_core.errors import ConfigError, told, validated
from mft_core.methods import REFERENCES, Contrast
from mft_core.recipes import Compare
from mft_core.stages import STAGES
from mft_core.statistics.tables import without_seed
from mft_core.store.artifacts import ArtifactStore

_OF_ONE_EVALUATION = ("seed", "replicate", "baseline", "benchmark")
Units = dict[str, frozenset[str]]
"""by claim, digests of the evaluations that tell which units it rests on"""


class _Earlier(NamedTuple):
    measured: Mapping[str, Sequence[float]]
    units: Units


def with_priors(recipe: Compare, evaluated: Sequence[str | None], store: ArtifactStore) -> Compare:
    """Return the recipe with what earlier studies measured.

    Args:
        recipe: of the comparison, without priors.
        evaluated: the digest of each evaluation in `recipe.variants`; None: it is not there yet.
    """
    earlier = []
    for other in store.manifests("compare"):
        if other["version"] != STAGES["compare"].version:
            continue
        name = f"compare {other['key'][:12]}"
        try:
            past = validated(Compare, other["recipe"], name)
            digests = [other["inputs"][f"eval-{index}"] for index in range(len(past.variants))]
            variances = other["summary"]["unit_variance"]
        except (ConfigError, KeyError, TypeError) as error:
            text = "%s is no prior, since other code has written it: %s"  # newer code, into a store that is shared
            logging.getLogger("mft").warning(text, name, told(error))
            continue
        treated = _units(recipe, evaluated)["checkpoint"]
        if past.model_copy(update={"priors": {}}) == recipe and treated and treated <= set(digests):
            return past
        if past.profile == recipe.profile and past.question != recipe.question:
            earlier.append(_Earlier(variances, _units(past, digests)))
    if not earlier:
        return recipe
    from mft_core.statistics.effects import UnitVariance  # takes a while

    known = {}
    for name, measured_as, domain, variants in _asked(recipe):
        own = _units(recipe, evaluated, variants)
        for claim in own:
            key, used, measured = f"{measured_as} over {claim} on {domain}", own[claim], []
            for one in sorted(earlier, key=lambda one: one.measured.get(key, (0.0, 0.0))[1], reverse=True):
                if key in one.measured and used.isdisjoint(one.units[claim]):
                    used |= one.units[claim]
                    measured.append(UnitVariance(*one.measured[key]))
            if pooled := UnitVariance.pooled(measured):
                known[f"{name} over {claim} on {domain}"] = pooled
    return recipe.model_copy(update={"priors": known})


def _asked(recipe: Compare) -> Iterator[tuple[str, str, Any, set[str]]]:
    """Yield of each treatment and contrast its name, what earlier studies call it, its domain, and its variants."""
    columns: dict[tuple[str, Any], dict[str, Any]] = {}
    for item in recipe.variants:
        name = without_seed(str(item["variant"]))
        shared = {key: value for key, value in item.items() if key not in _OF_ONE_EVALUATION}
        columns[name, item["domain"]] = {**shared, "variant": name}
    for (name, domain), item in columns.items():
        if item["method"] not in REFERENCES:
            yield name, str(item["method"]), domain, {name}
    for contrast in map(Contrast.parse, recipe.contrasts):
        found = [(treated, control, domain, f"{ours['method']} - {theirs['method']}")
                 for (treated, domain), ours in columns.items() if ours["method"] not in REFERENCES
                 for (control, _), theirs in columns.items() if contrast.pairs(ours, theirs)]  # fmt: skip
        for treated, control, domain, measured_as in found:
            if not measured_as.endswith(" - fft") and len({one[2] for one in found}) == 1:
                yield f"{treated} - {control}", measured_as, domain, {treated, control}


def _units(recipe: Compare, evaluated: Sequence[str | None], variants: set[str] | None = None) -> Units:
    """Return the digests of the fine-tuned models' evaluations, and of those of all or some treatments."""
    treated, baselines = set(), set()
    for item, digest in zip(recipe.variants, evaluated, strict=True):
        if item["method"] in REFERENCES or (variants and without_seed(str(item["variant"])) not in variants):
            continue
        treated.add(digest)
        if item["baseline"] is not None:
            baselines.add(evaluated[int(item["baseline"])])
    return {
        claim: frozenset(one for one in found if one)
        for claim, found in (("recipe", baselines), ("checkpoint", treated))
    }

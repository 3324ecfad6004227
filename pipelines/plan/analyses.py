"""Which further stages a study asks for (`analyses:`), and which models, masks and data of its variants go into them.

An analysis is an ordinary stage whose payload is a section of the report: `section.md`, figures, and every number in
`rows.json`. Used by the flows and the report. A further analysis is a further function and a further row of
`_ANALYSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mft_core.errors import ConfigError
from mft_core.methods import METHODS
from mft_core.recipes import Anatomy, Evaluate, Landscape, LearnMask, PredictLayers, Randomisation, Recipe
from mft_core.store.sources import Source
from pipelines.graph.nodes import Edge, Node
from pipelines.graph.variants import Variant, training_data, whole
from pipelines.plan.plan import Plan, comparison_node

RANDOMISED_ITEMS = 200
"""of each benchmark, that every random mask answers"""
Inputs = dict[str, Source | Edge]


def answers(plan: Plan) -> list[Node]:
    """Return the nodes that answer the study: its comparison, then its analyses, and what it chooses by."""
    chosen_by = [node for item in plan.variants for node in item.validations.values()]
    return [comparison_node(plan), *analysis_nodes(plan).values(), *chosen_by]


def analysis_nodes(plan: Plan) -> dict[str, Node]:
    """Return the study's analyses by name; one of several fine-tuned models is named with its domain.

    Raises:
        ConfigError: the study has not the variants, or the data not the validation rows, that an analysis needs.
    """
    found: dict[str, Node] = {}
    for name in plan.study.analyses:
        _check_validation_rows(name, plan)
        nodes = list(_ANALYSES[name](plan))
        if not nodes:
            raise ConfigError(
                f"study {plan.study.name}: analysis '{name}' needs {_NEEDS[name]}; add them to its variants."
            )
        several = len(nodes) > 1
        found |= {f"{name} {label}" if several else name: node for label, node in nodes}
    return found


def _check_validation_rows(analysis: str, plan: Plan) -> None:
    """Refuse here what the stage would find out only after everything else has run."""
    lacking = [item.setup.domain for item in plan.variants if not item.setup.data.validation_rows]
    if analysis in _MEASURE_LOSSES and lacking:
        raise ConfigError(
            f"study {plan.study.name}: analysis '{analysis}' measures losses on validation rows, and "
            f"data.validation_rows = 0 in domain {lacking[0]}; set it, e.g. --set data.validation_rows=500."
        )


def _by_base(plan: Plan) -> dict[str, list[Variant]]:
    """Return the masked variants by the fine-tuning that they start from, in the study's order.

    Of replicates, those of the first: an analysis looks at one fine-tuned model.
    """
    groups: dict[str, list[Variant]] = {}
    for item in plan.variants:
        if item.setup.replicate or METHODS[item.setup.method].starts_from == "base":
            continue
        if item.baseline and item.trained and isinstance(item.trained.recipe, LearnMask):
            model = item.baseline.model
            groups.setdefault(model.node.id if isinstance(model, Edge) else model.digest, []).append(item)
    return groups


def _base(masks: Sequence[Variant]) -> tuple[Inputs, str]:
    """Return the fine-tuned model and its data as inputs, and what the base is called."""
    baseline = masks[0].baseline
    assert baseline is not None  # they come from `_by_base`
    return {"model": baseline.model, "data": Edge(training_data(baseline.resolved))}, baseline.setup.domain


def _anatomy(plan: Plan) -> Iterator[tuple[str, Node]]:
    for found in _by_base(plan).values():
        masks = [item for item in found if not METHODS[item.setup.method].rewinds]  # they remove nothing
        if not masks:
            continue
        inputs, domain = _base(masks)
        inputs |= {f"mask-{index}": Edge(item.trained, "mask") for index, item in enumerate(masks) if item.trained}
        recipe = Anatomy(masks=tuple(item.columns for item in masks))
        yield domain, Node("anatomy", recipe, inputs, f"anatomy {plan.study.name} {domain}")


def _landscape(plan: Plan) -> Iterator[tuple[str, Node]]:
    bases = _by_base(plan)
    for masks in bases.values():
        for item in masks:
            inputs, domain = _base(masks)
            recipe = Landscape(variant=item.name)
            node = Node("landscape", recipe, inputs | {"masked": item.model}, f"landscape {item.name}")
            yield item.name if len(bases) == 1 else f"{domain} {item.name}", node


def _predict_layers(plan: Plan) -> Iterator[tuple[str, Node]]:
    for masks in _by_base(plan).values():
        recipes = [item.trained.recipe for item in masks if item.setup.method == "mft" and item.trained]
        sweep = [recipe for recipe in recipes if isinstance(recipe, LearnMask)]
        groups = tuple(dict.fromkeys(recipe.layers for recipe in sweep))
        if len(groups) < 3 or len({(recipe.modules, recipe.sparsity) for recipe in sweep}) > 1:
            continue
        inputs, domain = _base(masks)
        first = sweep[0]
        recipe = PredictLayers(groups=groups, modules=first.modules, sparsity=first.sparsity, domain=domain)
        inputs["comparison"] = Edge(comparison_node(plan))
        yield domain, Node("predict-layers", recipe, inputs, f"predict-layers {plan.study.name} {domain}")


def _randomisation(plan: Plan) -> Iterator[tuple[str, Node]]:
    bases = _by_base(plan)
    for masks in bases.values():
        inputs, domain = _base(masks)
        for item in masks:
            trained, base, asked = item.trained, item.resolved.base, list(item.evaluations.values())
            if item.setup.method != "mft" or item.setup.engine != "hf" or base is None or trained is None:
                continue
            recipe = Randomisation(
                variant=item.name,
                benchmarks=tuple(item.evaluations),
                evaluations=tuple(_shortened(node.recipe) for node in asked),
            )
            given: Inputs = {"model": inputs["model"], "base": whole(base), "mask": Edge(trained, "mask")}
            for index, node in enumerate(asked):
                others = {name: source for name, source in node.inputs.items() if name != "model"}
                given |= {f"{name}-{index}" if name != "chat_template" else name: one for name, one in others.items()}
            node = Node("randomisation", recipe, given, f"randomisation {item.name}")
            yield item.name if len(bases) == 1 else f"{domain} {item.name}", node


def _shortened(asked: Recipe) -> Evaluate:
    """Return an evaluation of so few items that hundreds of masks can answer them."""
    assert isinstance(asked, Evaluate)
    return asked.model_copy(update={"limit": min(asked.limit or RANDOMISED_ITEMS, RANDOMISED_ITEMS)})


_ANALYSES: dict[str, Callable[[Plan], Iterator[tuple[str, Node]]]] = {
    "anatomy": _anatomy,
    "landscape": _landscape,
    "predict-layers": _predict_layers,
    "randomisation": _randomisation,
}
_MEASURE_LOSSES = {"anatomy", "landscape"}
_NEEDS = {
    "anatomy": "masks that set weights to zero",
    "landscape": "masked variants",
    "randomisation": "mft variants answered by engine hf, and a model that the fine-tuning started from",
    "predict-layers": "mft variants of three layer groups or more, alike in modules and sparsity",
}

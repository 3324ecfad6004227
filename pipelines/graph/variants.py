"""From a resolved setup to the chain of stages that answers it; variants share the nodes that they have in common.

Looks at nothing but its arguments: what disk and hub say is in them (`pipelines.config.setup.Resolved`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from mft_core.errors import validated
from mft_core.evaluation import judged
from mft_core.methods import CALIBRATED, METHODS, REFERENCES, TRAINED, uses
from mft_core.recipes import (
    Evaluate,
    FineTune,
    Interpolate,
    LearnMask,
    Lora,
    MergeAdapter,
    MergeMask,
    PickCheckpoint,
    PrepareData,
    Training,
)
from mft_core.store.sources import Source
from pipelines.config.setup import BenchmarkSpec, DataSpec, Resolved, ResolvedModel, Setup, own_training
from pipelines.graph.nodes import Edge, Node, closure

_COLUMNS = {"mask.sparsity", "mask.layers", "mask.modules", "seed"}
_IN_NAMES = {"sparsity", "layers", "modules", "seed", "replicate", "domain"}
_OF_FINE_TUNING = ("model", "data", "fine_tune")


@dataclass(frozen=True)
class Variant:
    """One row of a study: its setup, the node that holds its model's training (if any), one evaluation a benchmark."""

    resolved: Resolved
    name: str
    trained: Node | None
    evaluations: Mapping[str, Node]
    validations: Mapping[str, Node]
    """evaluations to choose by, of studies that choose by accuracy; no part of what is compared"""
    details: Mapping[str, Any]
    """what the study varies besides sparsity, layers, modules and seed: {setup key: value}"""
    baseline: Variant | None
    """the full fine-tuning that this variant's own training starts from, as a variant; None for `base` and `fft`"""

    @property
    def setup(self) -> Setup:
        """Its settings."""
        return self.resolved.setup

    @property
    def model(self) -> Source | Edge:
        """The checkpoint that is evaluated."""
        return next(iter(self.evaluations.values())).inputs["model"]

    @functools.cached_property
    def columns(self) -> dict[str, str | int | float | None]:
        """What identifies the variant in tables and in MLflow."""
        setup = self.setup
        masked = METHODS[setup.method].selector is not None
        seeded = METHODS[setup.method].seeded
        return {
            "variant": self.name,
            "method": setup.method,
            "domain": setup.domain,
            "layers": setup.mask.layers if masked else None,
            "modules": setup.mask.modules if masked else None,
            "sparsity": setup.mask.sparsity if masked else None,
            "seed": setup.seed if seeded else None,
            **({"replicate": setup.replicate} if setup.replicate else {}),  # the first has the keys that it always had
            **{key: value if isinstance(value, int | float) else str(value) for key, value in self.details.items()},
        }


def variant(resolved: Resolved, point: Mapping[str, Any], grid: Iterable[str] = ()) -> Variant:
    """Build the chain of one variant.

    Args:
        point: the variant's point of the study's grid; its settings tell it apart in names and tables.
        grid: every key that the study varies; where the last part of one does not name it, the whole key does.

    Raises:
        ConfigError: a mask that cannot be.
    """
    setup = resolved.setup
    details = {key: _shown(key, value) for key, value in point.items() if key not in _COLUMNS}
    names = _short_names({*grid, *point})
    suffix = _suffix(setup, {key: value for key, value in details.items() if key != "checkpoint"}, names)
    of_checkpoint = f" checkpoint={setup.checkpoint}" if setup.checkpoint else ""
    refers = setup.method in REFERENCES and not setup.checkpoint
    baseline = None if refers else _baseline(resolved, point, grid)
    method = METHODS[setup.method]
    of = resolved.model
    trained = None
    if baseline:
        model, trained = baseline.model, baseline.trained
    elif method.name == "base":
        of = _base(resolved)
        model = whole(of)
    elif setup.fine_tune:
        trained = _fine_tuned(resolved, _of_fine_tuning(details), names)
        model = Edge(trained, "model")
    else:
        model = whole(of)
    if method.starts_from == "base" and method.name not in REFERENCES:
        of = _base(resolved)
        model = whole(of)
    if "continued" in method.sections:
        trained = _continued(resolved, model, suffix)
    elif "lora" in method.sections:
        trained = _adapted(resolved, of, model, suffix)
    elif "interpolation" in method.sections:
        inputs = {"model": model, "base": whole(_base(resolved))}
        trained = Node("interpolate", Interpolate(alpha=setup.interpolation), inputs, f"interpolate{suffix}")
    elif "averaged" in method.sections:
        trained = _averaged(resolved, _of_fine_tuning(details), names, suffix)
    elif method.selector:
        trained = _mask(resolved, model, suffix)
    elif "existing" in method.sections:
        assert resolved.existing is not None  # the setup's validator sees to it
        trained = None
        if isinstance(resolved.existing, ResolvedModel):
            of = resolved.existing
            model = whole(of)
        else:
            model = _merged(model, resolved.existing, f"merge-mask{suffix}", resolved)
    if trained:
        result = _result(setup, trained, of_checkpoint)
        label = trained.label.replace("learn-mask", "merge-mask") + of_checkpoint
        model = _merged(model, Edge(result, "mask"), label, resolved) if method.selector else Edge(result, "model")
    name = _name(setup) + suffix + of_checkpoint
    evaluations, validations = (
        {bench.name: _evaluation(resolved, bench, sources[bench.name], of, model, name) for bench in asked}
        for asked, sources in ((setup.benchmarks, resolved.benchmarks), (setup.validation, resolved.validation))
    )
    return Variant(resolved, name, trained, evaluations, validations, details, baseline)


def _base(resolved: Resolved) -> ResolvedModel:
    assert resolved.base is not None  # planning leaves out what cannot be had without
    return resolved.base


def whole(model: ResolvedModel) -> Source | Edge:
    """Return the model as a checkpoint: an adapter is merged first."""
    if model.adapter is None:
        return model.source
    return Edge(
        Node("merge-adapter", MergeAdapter(), {"model": model.source, "adapter": model.adapter}, "merge-adapter"),
        "model",
    )


def _merged(model: Source | Edge, mask: Source | Edge, label: str, resolved: Resolved) -> Edge:
    inputs = {"model": model, "mask": mask}
    if METHODS[resolved.setup.method].rewinds:
        inputs["base"] = whole(_base(resolved))
    return Edge(Node("merge-mask", MergeMask(), inputs, label), "model")


def _baseline(resolved: Resolved, point: Mapping[str, Any], grid: Iterable[str]) -> Variant:
    """Return the fine-tuning that the setup starts from as a variant of its own, evaluated in the same way."""
    own = {key: value for key, value in point.items() if uses("fft", key)}
    changed = {"method": "fft", "seed": 0, "checkpoint": None}
    return variant(replace(resolved, setup=resolved.setup.model_copy(update=changed)), own, grid)


def _result(setup: Setup, trained: Node, of_checkpoint: str) -> Node:
    """Return the node that has what the variant is: the training, or one of the states that it has kept."""
    training = own_training(setup)
    if setup.checkpoint is None or training is None:
        return trained
    recipe = PickCheckpoint(point=setup.checkpoint, of=training.validations)
    label = f"pick-checkpoint {trained.label}{of_checkpoint}"
    return Node("pick-checkpoint", recipe, {"training": Edge(trained)}, label)


def _short_names(keys: set[str]) -> dict[str, str]:
    """Return for each setup key the last part, where no other key and no column of the tables is called so."""
    last = {key: key.split(".")[-1] for key in keys}
    taken = [*last.values(), *_IN_NAMES]
    return {key: name if taken.count(name) == 1 else key for key, name in last.items()}


def _of_fine_tuning(details: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in details.items() if key.split(".")[0] in _OF_FINE_TUNING}


def _shown(key: str, value: Any) -> Any:
    """Return a setting as names and tables have it: of a place its last part."""
    return PurePath(value).name if key == "existing" else value


def _suffix(setup: Setup, details: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Name what the study varies, and a further replicate: the first is called the same whether there are others."""
    replicate = f" replicate={setup.replicate}" if setup.replicate else ""
    return "".join(f" {names[key]}={value}" for key, value in details.items()) + replicate


def _name(setup: Setup) -> str:
    details: list[str] = [setup.method]
    if METHODS[setup.method].selector:
        details += _mask_words(setup)
    if METHODS[setup.method].seeded:
        details.append(f"seed={setup.seed}")
    return " ".join(details)


def _mask_words(setup: Setup) -> list[str]:
    mask = setup.mask
    words = [f"sparsity={mask.sparsity:.15g}", f"layers={mask.layers}"]
    return words + ([f"modules={mask.modules}"] if mask.modules != "both" else [])


def _data(resolved: Resolved, spec: DataSpec, fraction: float, domain: str) -> Node:
    overlap = spec.overlap if resolved.long_questions else 0.0
    mixture = tuple(source.part for source in spec.mixture)
    recipe = PrepareData(**{**dict(spec), "mixture": mixture, "fraction": fraction, "overlap": overlap})
    inputs: dict[str, Source | Edge] = {"tokenizer": resolved.model.tokenizer}
    inputs |= _template(resolved.model, resolved.model.source)
    inputs |= {f"source-{i}": resolved.rows[source] for i, source in enumerate(spec.mixture)}
    inputs |= {f"benchmark-{i}{task and '-'}{task}": source for i, (task, source) in enumerate(resolved.held_out)}
    share = f" fraction={fraction:g}" if fraction != 1 else ""
    return Node("prepare-data", recipe, inputs, f"prepare-data {domain}{share}")


def training_data(resolved: Resolved) -> Node:
    """Return what the fine-tuned model is, or was, trained on: the setup's own data."""
    setup = resolved.setup
    return _data(resolved, setup.data, setup.data.fraction, setup.domain)


def _template(model: ResolvedModel, checkpoint: Source | Edge) -> dict[str, Source | Edge]:
    """Return the template to be given with a checkpoint made of the model; one that was trained here carries it."""
    while isinstance(checkpoint, Edge):
        if checkpoint.node.stage == "fine-tune":
            return {}
        checkpoint = checkpoint.node.inputs["training" if checkpoint.node.stage == "pick-checkpoint" else "model"]
    return {"chat_template": model.template} if model.template else {}


def _fine_tuned(
    resolved: Resolved, details: Mapping[str, Any], names: Mapping[str, str], *, keep_all: bool = False
) -> Node:
    setup, model = resolved.setup, whole(resolved.model)
    training = setup.fine_tuning.model_copy(update={"keep": "all"}) if keep_all else setup.fine_tuning
    suffix = _suffix(setup, details, names) + (" keep=all" if training != setup.fine_tuning else "")
    inputs = {"model": model, "data": Edge(training_data(resolved)), **_template(resolved.model, model)}
    return Node("fine-tune", FineTune(training=training), inputs, f"fine-tune {setup.domain}{suffix}")


def _averaged(resolved: Resolved, details: Mapping[str, Any], names: Mapping[str, str], suffix: str) -> Node:
    """Average the last states of the fine-tuning, once more trained to keep them all: `fft` keeps its best alone."""
    training = _fine_tuned(resolved, details, names, keep_all=True)
    states, averaged = resolved.setup.fine_tuning.validations, resolved.setup.averaged
    recipe = PickCheckpoint(point=states, of=states, averaged=states if averaged == "all" else averaged)
    return Node("pick-checkpoint", recipe, {"training": Edge(training)}, f"average {resolved.setup.domain}{suffix}")


def _continued(resolved: Resolved, model: Source | Edge, suffix: str) -> Node:
    setup, spec = resolved.setup, resolved.setup.continued
    data = spec.data or setup.data
    inputs: dict[str, Source | Edge] = {
        "model": model,
        "data": Edge(_data(resolved, data, data.fraction, spec.domain or setup.domain)),
        **_template(resolved.model, model),
    }
    recipe = FineTune(training=_seeded(spec.training, setup))
    return Node("fine-tune", recipe, inputs, f"continue-fft {setup.domain} seed={setup.seed}{suffix}")


def _adapted(resolved: Resolved, of: ResolvedModel, model: Source | Edge, suffix: str) -> Node:
    """Fine-tune adapters of a model, the base or a fine-tuned one, which is made of `of`."""
    setup, spec = resolved.setup, resolved.setup.lora
    assert spec is not None  # the setup's validator sees to it
    sparse = setup.method == "shira"
    lora = Lora(rank=spec.rank, dropout=0) if sparse else Lora.model_validate(spec.model_dump(exclude={"training"}))
    recipe = FineTune(training=_seeded(spec.training, setup), lora=lora, sparse=sparse)
    inputs: dict[str, Source | Edge] = {"model": model, "data": Edge(training_data(resolved)), **_template(of, model)}
    return Node("fine-tune", recipe, inputs, f"{setup.method} {setup.domain} seed={setup.seed}{suffix}")


def _seeded(training: Training, setup: Setup) -> Training:
    """Give the training its variant's own order of the data."""
    return training.model_copy(update={"seed": training.seed + setup.draw})


def _mask(resolved: Resolved, model: Source | Edge, suffix: str) -> Node:
    setup = resolved.setup
    method, mask = METHODS[setup.method], setup.mask
    selector = method.selector
    assert selector is not None  # masks are made for methods that have one
    details: dict[str, Any] = {}
    inputs: dict[str, Source | Edge] = {"model": model}
    if method.sees_base:
        inputs["base"] = whole(_base(resolved))
    if method.matches:
        like = replace(resolved, setup=setup.model_copy(update={"method": method.matches}))
        inputs["mask"] = Edge(_mask(like, model, suffix), "mask")
    label = " ".join(["learn-mask", *_mask_words(setup)])
    if selector in TRAINED:
        details = {"training": _seeded(mask.training, setup), "score_init": mask.score_init}
    if selector in CALIBRATED:
        details = {"calibration_rows": mask.calibration_rows}
    if selector in TRAINED | CALIBRATED:
        data = mask.data or setup.data
        inputs["data"] = Edge(_data(resolved, data, data.fraction * mask.fraction, mask.domain or setup.domain))
    if uses(setup.method, "mask.scope"):
        details |= {"scope": mask.scope, "min_kept": mask.min_kept}
    if uses(setup.method, "mask.granularity"):
        details["granularity"] = mask.granularity
    if method.seeded:
        details["seed"] = setup.draw
        label += f" seed={setup.seed}"
    if selector != "learned":
        label += f" ({selector})"
    elif method.starts_from == "base":
        label += " (of the base)"
    label += suffix
    details |= {"selector": selector, "sparsity": mask.sparsity, "layers": mask.layers, "modules": mask.modules}
    recipe = validated(LearnMask, details, f"mask of {setup.method}")
    return Node("learn-mask", recipe, inputs, label)


def _evaluation(
    resolved: Resolved,
    bench: BenchmarkSpec,
    asked_of: Source,
    of: ResolvedModel,
    model: Source | Edge,
    variant_name: str,
) -> Node:
    asked = bench.model_dump(exclude={"name", "path"}, exclude_defaults=True)
    setup = resolved.setup
    if uses(setup.method, "answered_together"):
        asked["answered_together"] = setup.answered_together
    if bench.metric == judged.METRIC:
        asked["judge"] = setup.judge
    recipe = Evaluate(**asked, precision=setup.precision, engine=setup.engine, engine_version=setup.engine_version)
    inputs: dict[str, Source | Edge] = {"model": model, **_template(of, model)}
    inputs["benchmark" if bench.path else "harness"] = asked_of
    return Node("evaluate", recipe, inputs, f"evaluate {bench.name} of {variant_name}")


def unique_nodes(variants: Iterable[Variant]) -> list[Node]:
    """Return every node of the variants once, each after the nodes that it needs."""
    return closure(node for item in variants for node in (*item.evaluations.values(), *item.validations.values()))

"""From a setup to the chain of stages that answers it; variants share the nodes that they have in common."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mft_core.errors import explain
from mft_core.recipes import (
    CALIBRATED,
    TRAINED,
    Evaluate,
    FineTune,
    LearnMask,
    Lora,
    MergeMask,
    MixturePart,
    PrepareData,
    Training,
)
from mft_core.store.sources import Source
from pipelines.config import resolve
from pipelines.config.setup import METHODS, SELECTORS, BenchmarkSpec, DataSpec, Setup, uses
from pipelines.graph.nodes import Edge, Node, closure

_COLUMNS = {"mask.sparsity", "mask.layers", "mask.modules", "seed"}
_IN_NAMES = {"sparsity", "layers", "modules", "seed", "domain"}
_OF_FINE_TUNING = ("model", "data", "fine_tune")


@dataclass(frozen=True)
class Variant:
    """One row of a study: its setup, the node that holds its model's training (if any), one evaluation a benchmark."""

    setup: Setup
    name: str
    trained: Node | None
    evaluations: Mapping[str, Node]
    details: Mapping[str, Any]
    """what the study varies besides sparsity, layers, modules and seed: {setup key: value}"""
    baseline: Variant | None
    """the full fine-tuning that this variant's own training starts from, as a variant; None for `base` and `fft`"""

    @functools.cached_property
    def columns(self) -> dict[str, str | int | float | None]:
        """What identifies the variant in tables and in MLflow."""
        setup = self.setup
        masked = setup.method in SELECTORS
        seeded = "seed" in METHODS[setup.method]
        return {
            "variant": self.name,
            "method": setup.method,
            "domain": setup.domain,
            "layers": resolve.layers(setup) if masked else None,
            "modules": setup.mask.modules if masked else None,
            "sparsity": setup.mask.sparsity if masked else None,
            "seed": setup.seed if seeded else None,
            **{key: value if isinstance(value, int | float) else str(value) for key, value in self.details.items()},
        }


def variant(setup: Setup, point: Mapping[str, Any], grid: Iterable[str] = ()) -> Variant:
    """Build the chain of one variant.

    Args:
        point: the variant's point of the study's grid; its settings tell it apart in names and tables.
        grid: every key that the study varies; where the last part of one does not name it, the whole key does.

    Raises:
        ConfigError: a model, data file, benchmark or layer that is not there.
    """
    details = {key: value for key, value in point.items() if key not in _COLUMNS}
    names = _short_names({*grid, *point})
    suffix = _suffix(details, names)
    baseline = _baseline(setup, point, grid) if setup.method not in ("base", "fft") else None
    if setup.method == "base":
        model: Source | Edge = resolve.model(setup.model)
        trained = None
    else:
        trained = baseline.trained if baseline else _fine_tuned(setup, _of_fine_tuning(details, names))
        assert trained is not None
        model = Edge(trained, "model")
        if setup.method == "continued-fft":
            trained = _continued(setup, model, suffix)
            model = Edge(trained, "model")
        elif setup.method in ("lora", "continued-lora"):
            trained = _adapted(setup, model if setup.method == "continued-lora" else resolve.model(setup.model), suffix)
            model = Edge(trained, "model")
        elif setup.method in SELECTORS:
            trained = _mask(setup, model, suffix)
            merged = Node("merge-mask", MergeMask(), {"model": model, "mask": Edge(trained, "mask")},
                          trained.label.replace("learn-mask", "merge-mask"))  # fmt: skip
            model = Edge(merged, "model")
    name = _name(setup) + suffix
    evaluations = {bench.name: _evaluation(setup, bench, model, name) for bench in setup.benchmarks}
    return Variant(setup, name, trained, evaluations, details, baseline)


def _baseline(setup: Setup, point: Mapping[str, Any], grid: Iterable[str]) -> Variant:
    """Return the fine-tuning that the setup starts from as a variant of its own, evaluated in the same way."""
    own = {key: value for key, value in point.items() if uses("fft", key)}
    return variant(setup.model_copy(update={"method": "fft", "seed": 0}), own, grid)


def _short_names(keys: set[str]) -> dict[str, str]:
    """Return for each setup key the last part, where no other key and no column of the tables is called so."""
    last = {key: key.split(".")[-1] for key in keys}
    taken = [*last.values(), *_IN_NAMES]
    return {key: name if taken.count(name) == 1 else key for key, name in last.items()}


def _of_fine_tuning(details: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return _suffix({key: value for key, value in details.items() if key.split(".")[0] in _OF_FINE_TUNING}, names)


def _suffix(details: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return "".join(f" {names[key]}={value}" for key, value in details.items())


def _name(setup: Setup) -> str:
    details: list[str] = [setup.method]
    if setup.method in SELECTORS:
        details += _mask_words(setup)
    if "seed" in METHODS[setup.method]:
        details.append(f"seed={setup.seed}")
    return " ".join(details)


def _mask_words(setup: Setup) -> list[str]:
    mask = setup.mask
    words = [f"sparsity={mask.sparsity:.15g}", f"layers={resolve.layers(setup)}"]
    return words + ([f"modules={mask.modules}"] if mask.modules != "both" else [])


def _data(setup: Setup, spec: DataSpec, fraction: float, domain: str) -> Node:
    recipe = PrepareData(
        mixture=tuple(MixturePart(rows=source.rows) for source in spec.mixture),
        fraction=fraction,
        max_length=spec.max_length,
        validation_rows=spec.validation_rows,
        seed=spec.seed,
    )
    inputs: dict[str, Source | Edge] = {"tokenizer": resolve.tokenizer(setup.model), **_template(setup)}
    inputs |= {f"source-{i}": resolve.rows(source) for i, source in enumerate(spec.mixture)}
    found = [resolve.benchmark_items(bench) for bench in (*setup.benchmarks, *setup.held_out) if bench.path]
    items = sorted({source.digest: source for source in found}.values(), key=lambda source: source.digest)
    inputs |= {f"benchmark-{i}": source for i, source in enumerate(items)}
    share = f" fraction={fraction:g}" if fraction != 1 else ""
    return Node("prepare-data", recipe, inputs, f"prepare-data {domain}{share}")


def _training_data(setup: Setup) -> Node:
    return _data(setup, setup.data, setup.data.fraction, setup.domain)


def _template(setup: Setup) -> dict[str, Source | Edge]:
    return {"chat_template": resolve.template(setup.model)} if setup.model.chat_template else {}


def _fine_tuned(setup: Setup, suffix: str) -> Node:
    inputs = {
        "model": resolve.model(setup.model),
        "data": Edge(_training_data(setup)),
        **_template(setup),
    }
    return Node("fine-tune", FineTune(training=setup.fine_tune), inputs, f"fine-tune {setup.domain}{suffix}")


def _continued(setup: Setup, model: Edge, suffix: str) -> Node:
    spec = setup.continued
    data = spec.data or setup.data
    inputs: dict[str, Source | Edge] = {
        "model": model,
        "data": Edge(_data(setup, data, data.fraction, spec.domain or setup.domain)),
    }
    recipe = FineTune(training=_seeded(spec.training, setup.seed))
    return Node("fine-tune", recipe, inputs, f"continue-fft {setup.domain} seed={setup.seed}{suffix}")


def _adapted(setup: Setup, model: Source | Edge, suffix: str) -> Node:
    """Fine-tune low-rank adapters of a model, the base or a fine-tuned one."""
    spec = setup.lora
    assert spec is not None  # the setup's validator sees to it
    lora = Lora.model_validate(spec.model_dump(exclude={"training"}))
    recipe = FineTune(training=_seeded(spec.training, setup.seed), lora=lora)
    inputs: dict[str, Source | Edge] = {"model": model, "data": Edge(_training_data(setup))}
    if isinstance(model, Source):  # checkpoints that a stage has made carry the template
        inputs |= _template(setup)
    return Node("fine-tune", recipe, inputs, f"{setup.method} {setup.domain} seed={setup.seed}{suffix}")


def _seeded(training: Training, seed: int) -> Training:
    """Give the training its variant's own order of the data."""
    return training.model_copy(update={"seed": training.seed + seed})


def _mask(setup: Setup, model: Edge, suffix: str) -> Node:
    selector, mask, layers = SELECTORS[setup.method], setup.mask, resolve.layers(setup)
    details: dict[str, Any] = {}
    inputs: dict[str, Source | Edge] = {"model": model}
    label = " ".join(["learn-mask", *_mask_words(setup)])
    if selector in TRAINED:
        details = {"training": _seeded(mask.training, setup.seed), "score_init": mask.score_init}
    if selector in CALIBRATED:
        details = {"calibration_rows": mask.calibration_rows}
    if selector in TRAINED | CALIBRATED:
        data = mask.data or setup.data
        inputs["data"] = Edge(_data(setup, data, data.fraction * mask.fraction, mask.domain or setup.domain))
    if uses(setup.method, "mask.scope"):
        details |= {"scope": mask.scope, "min_kept": mask.min_kept}
    if "seed" in METHODS[setup.method]:
        details["seed"] = setup.seed
        label += f" seed={setup.seed}"
    if selector != "learned":
        label += f" ({selector})"
    label += suffix
    try:
        recipe = LearnMask(selector=selector, sparsity=mask.sparsity, layers=layers, modules=mask.modules, **details)
    except ValidationError as error:
        raise explain(error, LearnMask, f"mask of {setup.method}") from error
    return Node("learn-mask", recipe, inputs, label)


def _evaluation(setup: Setup, bench: BenchmarkSpec, model: Source | Edge, variant_name: str) -> Node:
    recipe = Evaluate(**bench.model_dump(exclude={"name", "path"}, exclude_defaults=True), precision=setup.precision)
    inputs: dict[str, Source | Edge] = {"model": model}
    if bench.path:
        inputs["benchmark"] = resolve.benchmark(bench)
    else:
        inputs["harness"] = resolve.harness()
    if isinstance(model, Source):  # checkpoints that a stage has made carry the template
        inputs |= _template(setup)
    return Node("evaluate", recipe, inputs, f"evaluate {bench.name} of {variant_name}")


def unique_nodes(variants: Iterable[Variant]) -> list[Node]:
    """Return every node of the variants once, each after the nodes that it needs."""
    return closure(node for item in variants for node in item.evaluations.values())

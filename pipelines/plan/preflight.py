"""The last look before compute: what only the model's class, the tokenizer or the data files can tell.

Looks only at what is going to be computed, so that a cached study imports neither torch nor lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mft_core.errors import ConfigError
from mft_core.methods import METHODS, uses
from mft_core.recipes import Evaluate, PrepareData, Runtime
from mft_core.stages import get_stage
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.sources import Source
from pipelines.config.catalogue import Profile, Study
from pipelines.config.setup import ModelSpec, Resolved, Setup, datas, trainings
from pipelines.graph.nodes import Edge, Node
from pipelines.plan.plan import Plan, check_disk, make_plans


def checked_plans(
    studies: Sequence[Study],
    profile: Profile,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    rerun: Sequence[str] = (),
) -> tuple[list[Plan], ArtifactStore]:
    """Plan studies, and refuse all that can be known to fail before a server or a model is started.

    Args:
        rerun: names of stages that are going to be computed again.

    Raises:
        ConfigError: from planning or `check`; or there is no such stage.
    """
    store = ArtifactStore.from_environment()
    for name in rerun:
        get_stage(name)
    plans = make_plans(studies, profile, store, overrides, seeds)
    for plan in plans:
        check(plan, store)
    return plans, store


def check(plan: Plan, store: ArtifactStore) -> None:
    """Raise a ConfigError for anything in the plan that is bound to fail.

    Checks disk, processes and devices, that the model is a whole decoder with maskable weights, chat template, training
    rows and their lengths, and the benchmarks.
    """
    store.check_writable()
    check_disk(plan, store.home)
    nodes = [step.node for step in plan.to_compute]
    stages = {node.stage for node in nodes}
    _check_processes(nodes, plan.runtime)
    if stages - {"compare"}:
        _check_models(plan.asked)
    if "prepare-data" in stages:
        _check_rows(resolved.setup for resolved in plan.asked)
        prepared = [node for node in nodes if node.stage == "prepare-data"]
        _check_end_of_turn(prepared)
        _check_held_out(prepared)
        _check_lengths(prepared)
    _check_benchmarks(node for node in nodes if node.stage == "evaluate")


def _check_processes(nodes: Iterable[Node], runtime: Runtime) -> None:
    if runtime.processes > 1 or runtime.shard:
        from mft_core.training import launch

        for node in nodes:
            launch.check(node.recipe, runtime)


def _check_rows(setups: Iterable[Setup]) -> None:
    from mft_core.data.rows import check_rows_file

    held: dict[str, int] = {}
    for source in dict.fromkeys(source for setup in setups for data in datas(setup) for source in data.mixture):
        if not Path(source.path).is_absolute():
            continue
        if source.path not in held:
            held[source.path] = check_rows_file(Path(source.path))
        if source.rows is not None and source.rows > held[source.path]:
            raise ConfigError(
                f"data.mixture: rows = {source.rows}, but {source.path} holds only {held[source.path]}; "
                f"valid: 1 to {held[source.path]}, or null for all."
            )


def _check_lengths(nodes: Iterable[Node]) -> None:
    """Refuse a `data.max_length` that no example fits; of hub data sets, only the stage itself sees the rows."""
    from mft_core.data.assistant_tokens import check_fits

    for node in nodes:
        assert isinstance(node.recipe, PrepareData)
        given = {name: source for name, source in node.inputs.items() if isinstance(source, Source)}
        sources = [given[f"source-{index}"] for index in range(len(node.recipe.mixture))]
        if all(source.revision is None for source in sources):
            template = given.get("chat_template")
            check_fits(
                [source.local_path() for source in sources],
                given["tokenizer"].local_path(),
                node.recipe.max_length,
                template.local_path() if template else None,
            )


def _check_models(asked: Iterable[Resolved]) -> None:
    from mft_core.checkpoints.files import WeightFiles, check_dropout, read_config, skeleton
    from mft_core.layers import parse_layers
    from mft_core.masks.sites import choose_sites, find_sites
    from mft_core.selectors import wanda
    from mft_core.training.lora import check_lora

    sites: dict[ModelSpec, list] = {}
    for resolved in asked:
        setup, spec = resolved.setup, resolved.setup.model
        directory = resolved.model.config.parent
        config = read_config(directory)
        for training in trainings(setup).values():
            check_dropout(config, training.dropout)
        _check_weights(spec)
        _check_chat_template(resolved)
        method = METHODS[setup.method]
        if method.selector or uses(setup.method, "lora"):
            if spec not in sites:
                sites[spec] = find_sites(skeleton(directory))
            if setup.lora and uses(setup.method, "lora"):
                check_lora(sites[spec], setup.lora)
        if method.selector:
            layers = parse_layers(setup.mask.layers, len(resolved.model.geometry.layers))
            chosen = choose_sites(sites[spec], layers, setup.mask.modules)
            if method.observes == "inputs":
                wanda.check_inputs(chosen)
            if method.rewinds and Path(spec.path).is_absolute():
                WeightFiles(directory).check([site.name for site in chosen])


def _check_weights(spec: ModelSpec) -> None:
    """Refuse a local checkpoint without weights, or with a part of them; the hub's are fetched whole."""
    directory = Path(spec.path)
    if not directory.is_absolute():
        return
    indices = sorted(directory.glob("*.safetensors.index.json")) or sorted(directory.glob("*.bin.index.json"))
    wanted = {name for index in indices for name in _shards(index)}
    missing = sorted(name for name in wanted if not (directory / name).is_file())
    if missing:
        raise ConfigError(
            f"model.path = {directory}: {len(missing)} weight files of its index are missing, first {missing[0]}; "
            "copy or download the checkpoint again."
        )
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
        raise ConfigError(f"model.path = {directory}: no weight files there (*.safetensors); give a whole checkpoint.")


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"model: {index} is no index of weight files ({error!r}).") from error


def _check_chat_template(resolved: Resolved) -> None:
    setup, spec = resolved.setup, resolved.setup.model
    chats = setup.method != "base" or any(bench.apply_chat_template for bench in setup.benchmarks)
    if spec.chat_template or not chats:
        return
    directory = resolved.model.tokenizer.local_path()
    settings = directory / "tokenizer_config.json"
    in_settings = settings.is_file() and json.loads(settings.read_text()).get("chat_template")
    if not in_settings and not (directory / "chat_template.jinja").is_file():
        raise ConfigError(
            f"model.path = {spec.path}: its tokenizer has no chat template; set model.chat_template to a Jinja file "
            "(the tulu format is shipped as mft_core/data/templates/tulu.jinja)."
        )


def _check_end_of_turn(nodes: Iterable[Node]) -> None:
    """Refuse a chat template from which no model learns to stop."""
    from mft_core.data.assistant_tokens import check_end_of_turn, load_tokenizer

    asked = {(given["tokenizer"], given.get("chat_template")) for given in (node.inputs for node in nodes)}
    for tokenizer, template in asked:
        assert isinstance(tokenizer, Source)
        found = template.local_path() if isinstance(template, Source) else None
        check_end_of_turn(load_tokenizer(tokenizer.local_path(), found))


def _check_held_out(nodes: Iterable[Node]) -> None:
    """Refuse benchmarks whose questions cannot be told, so that they could not be kept out of the training rows."""
    from mft_core.stages.prepare_data import questions

    given = [item for node in nodes for item in node.inputs.items() if item[0].startswith("benchmark-")]
    for name, source in {(*name.split("-", 2)[2:], source): (name, source) for name, source in given}.values():
        assert isinstance(source, Source)
        questions(name, source.local_path())


def _check_benchmarks(nodes: Iterable[Node]) -> None:
    """Try each evaluation, without its model."""
    tried: set[tuple[Any, ...]] = set()
    for node in nodes:
        assert isinstance(node.recipe, Evaluate)
        first = node  # of the chain of models: it has the base model, and the template
        while isinstance(made := first.inputs["model"], Edge):
            first = made.node
        folder, template = node.inputs.get("benchmark"), first.inputs.get("chat_template")
        key = node.recipe, *(getattr(source, "location", "") for source in (folder, made, template))
        if key not in tried:
            from mft_core.evaluation.rehearsal import rehearse

            tokenizer = made.model_copy(update={"kind": "tokenizer"}).local_path()
            paths = (source.local_path() if isinstance(source, Source) else None for source in (folder, template))
            rehearse(node.recipe, tokenizer, *paths)
            tried.add(key)

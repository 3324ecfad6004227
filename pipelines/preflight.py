"""The last look before compute: what only the model's class, the tokenizer or the data files can tell.

Looks only at what is going to be computed, so that a cached study imports neither torch nor lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mft_core.artifacts import ArtifactStore
from mft_core.errors import ConfigError
from mft_core.recipes import Evaluate
from pipelines import resolve
from pipelines.graph import Node
from pipelines.plan import Plan, check_disk
from pipelines.setup import SELECTORS, ModelSpec, Setup


def check(plan: Plan, store: ArtifactStore) -> None:
    """Raise a ConfigError for anything in the plan that is bound to fail.

    Checks disk, training rows, chat template, that the model is a decoder with maskable weights, and the benchmarks.
    """
    store.check_writable()
    check_disk(plan, store.home)
    nodes = [step.node for step in plan.to_compute]
    stages = {node.stage for node in nodes}
    setups = [item.setup for item in plan.variants]
    if "prepare-data" in stages:
        _check_rows(setup for setup in setups if setup.method != "base")
    if stages - {"compare"}:
        _check_models(setups)
    _check_benchmarks(node for node in nodes if node.stage == "evaluate")


def _check_rows(setups: Iterable[Setup]) -> None:
    from mft_core.data.rows import check_rows_file

    for path in sorted({source.path for setup in setups for source in setup.data.mixture}):
        if Path(path).is_absolute():
            check_rows_file(Path(path))


def _check_models(setups: Iterable[Setup]) -> None:
    from mft_core.checkpoint_io import read_config, skeleton
    from mft_core.layers import parse_layers
    from mft_core.sites import choose_sites, find_sites

    sites: dict[ModelSpec, list] = {}
    for setup in setups:
        spec = setup.model
        directory = resolve.configuration_file(spec).parent
        read_config(directory)
        _check_chat_template(setup)
        if setup.method in SELECTORS:
            if spec not in sites:
                sites[spec] = find_sites(skeleton(directory))
            layers = parse_layers(setup.mask.layers, resolve.decoder_layers(spec))
            choose_sites(sites[spec], layers, setup.mask.modules)


def _check_chat_template(setup: Setup) -> None:
    spec = setup.model
    chats = setup.method != "base" or any(bench.apply_chat_template for bench in setup.benchmarks)
    if spec.chat_template or not chats:
        return
    directory = resolve.tokenizer(spec).local_path()
    settings = directory / "tokenizer_config.json"
    in_settings = settings.is_file() and json.loads(settings.read_text()).get("chat_template")
    if not in_settings and not (directory / "chat_template.jinja").is_file():
        raise ConfigError(
            f"model.path = {spec.path}: its tokenizer has no chat template; set model.chat_template to a Jinja file "
            "(the tulu format is shipped as mft_core/data/templates/tulu.jinja)."
        )


def _check_benchmarks(nodes: Iterable[Node]) -> None:
    checked: set[tuple[Evaluate, str]] = set()
    for node in nodes:
        assert isinstance(node.recipe, Evaluate)
        folder = node.inputs.get("benchmark")
        where = getattr(folder, "location", "")
        if (node.recipe, where) not in checked:
            from mft_core.evaluation import check_task

            check_task(node.recipe, Path(where) if where else None)
            checked.add((node.recipe, where))

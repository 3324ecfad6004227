"""From a setup to a `Resolved`: names and paths become sources known by content. Alone looks at disk or hub to plan.

A plan resolves each of its setups once, before the graph is built, and hands on what was found (`Resolver`); the other
functions are for those who ask after one thing (`mft doctor`).
A hub repository is pinned to the commit that its revision names: asked of the hub, or, offline, of the local hub cache.
"""

from __future__ import annotations

import functools
import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from mft_core.cache_key import digest
from mft_core.errors import ConfigError
from mft_core.evaluation.benchmarks import data_files
from mft_core.layers import format_layers, parse_layers
from mft_core.methods import uses
from mft_core.names import inside
from mft_core.store.sources import Source, first_line, local_checkpoint, local_file, local_files, pinned
from mft_core.yaml_files import read_yaml
from pipelines.config.geometry import read_geometry
from pipelines.config.setup import BenchmarkSpec, ModelSpec, Resolved, ResolvedModel, Setup, SourceSpec, datas

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Resolver:
    """Resolves setups, and looks at each thing once for as long as it lives: variants share models, data, benchmarks.

    Made anew for every planning, so that what was changed since is seen.
    """

    def __init__(self) -> None:
        self._model, self._layers = functools.cache(resolved_model), functools.cache(layers)
        self._rows, self._items = functools.cache(rows), functools.cache(benchmark_items)
        self._benchmark = functools.cache(benchmark)

    def resolve(self, setup: Setup) -> Resolved:
        """Look at everything that the setup's method uses.

        Raises:
            ConfigError: a model, data file, benchmark or layer that is not there.
        """
        found = self._model(setup.model)
        mixed = {source: self._rows(source) for data in datas(setup) for source in data.mixture}
        local = [bench for bench in (*setup.benchmarks, *setup.held_out) if bench.path and mixed]
        held_out = {source.digest: source for source in map(self._items, local)}
        benchmarks = {bench.name: self._benchmark(bench) for bench in setup.benchmarks}
        if uses(setup.method, "mask"):
            mask = setup.mask.model_copy(update={"layers": self._layers(setup.model, setup.mask.layers)})
            setup = setup.model_copy(update={"mask": mask})
        return Resolved(setup, found, mixed, tuple(held_out[name] for name in sorted(held_out)), benchmarks)


def resolved_model(spec: ModelSpec) -> ResolvedModel:
    """Return the base model with what its files say of it."""
    found, tokenizer = model(spec), _checkpoint(spec, "tokenizer")
    template = local_file(Path(spec.chat_template), "model.chat_template") if spec.chat_template else None
    config = configuration_file(spec)
    return ResolvedModel(found, tokenizer, template, config, read_geometry(_read_configuration(config)))


def model(spec: ModelSpec) -> Source:
    """Return the base model as a source."""
    return _checkpoint(spec, "model")


def _checkpoint(spec: ModelSpec, kind: Literal["model", "tokenizer"]) -> Source:
    """Return the base model, or its tokenizer: the same place, but only that one's files count."""
    if Path(spec.path).is_absolute():
        return local_checkpoint(kind, Path(spec.path))
    return pinned(spec.path, _commit(spec.path, spec.revision, "model"), kind)


def rows(spec: SourceSpec) -> Source:
    """Return one source of training rows."""
    if Path(spec.path).is_absolute():
        return local_file(Path(spec.path), "data.mixture.path")
    return pinned(spec.path, _commit(spec.path, spec.revision, "dataset"), "dataset")


def benchmark(spec: BenchmarkSpec) -> Source:
    """Return a benchmark: lm-eval itself, whose version says how its own tasks are defined, or a local-file one.

    That is the folder, known by the task's definition and all its data files alone.
    """
    if not spec.path:
        return _harness()
    folder, definition, loaded = _task_definition(spec)
    files = data_files(folder, loaded)
    for split, path in files.items():
        if not path.is_file():
            raise ConfigError(
                f"benchmarks.{spec.name}: data_files.{split} = {path}: no such file; {definition} names it."
            )
    names = {os.path.relpath(path, folder) for path in files.values()}
    return local_files(folder, [definition, *sorted(names)])


@functools.cache
def _harness() -> Source:
    return Source(location="lm-eval", digest=digest({"lm-eval": metadata.version("lm-eval")}))


def benchmark_items(spec: BenchmarkSpec) -> Source:
    """Return the items of a local-file benchmark, for keeping them out of the training data."""
    folder, definition, loaded = _task_definition(spec)
    files = (loaded.get("dataset_kwargs") or {}).get("data_files", {})
    items = files.get(loaded.get("test_split", "test")) if isinstance(files, dict) else files
    if not isinstance(items, str):
        raise ConfigError(
            f"{folder / definition}: dataset_kwargs.data_files.test must name the JSONL file of the items."
        )
    return local_file(inside(folder, items, f"{definition}: data_files.test"), f"benchmarks.{spec.name}.path")


def _task_definition(spec: BenchmarkSpec) -> tuple[Path, str, dict[str, Any]]:
    """Return the benchmark's folder, the name of the file that defines its task, and what that says."""
    folder = Path(spec.path or "")
    tasks = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            stat = path.stat()
            loaded = _read_yaml(path, stat.st_mtime_ns, stat.st_size)
        except ConfigError as error:
            raise ConfigError(
                f"benchmarks.{spec.name}.path: {path} is not plain YAML (lm-eval's !function needs an installed "
                f"task); put it elsewhere, or leave that tag out: {error}"
            ) from error
        if isinstance(loaded, dict) and isinstance(loaded.get("task"), str):
            tasks[loaded["task"]] = (path.name, loaded)
    if spec.task not in tasks:
        raise ConfigError(
            f"benchmarks.{spec.name}.task = {spec.task}: no such task in {folder}. Valid: {', '.join(tasks) or 'none'}."
        )
    return folder, *tasks[spec.task]


@functools.lru_cache(maxsize=1024)
def _read_yaml(path: Path, modified: int, size: int) -> Any:
    """Read a file that every variant of a study asks for; `modified` and `size` make it read again when it changes."""
    return read_yaml(path)


def layers(spec: ModelSpec, text: str) -> str:
    """Return layers of the model in canonical form; its configuration says how many there are."""
    config = configuration(spec)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(config.get(name), int):
            return format_layers(parse_layers(text, config[name]))
    raise ConfigError(f"model = {spec.path}: its config.json names no number of decoder layers; is it a decoder?")


def configuration(spec: ModelSpec) -> dict[str, Any]:
    """Return the model's config.json (its text part, for multimodal ones)."""
    return _read_configuration(configuration_file(spec))


def configuration_file(spec: ModelSpec) -> Path:
    """Return the local path of the model's config.json; of a hub repository, that file alone is fetched."""
    local = Path(spec.path) / "config.json"
    if local.is_absolute() and local.is_file():
        return local
    source = model(spec)  # which says what is wrong with a local path
    if source.revision is None:
        return Path(source.location) / "config.json"
    return _hub_file(source.location, source.revision)


@functools.cache
def _read_configuration(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {path} cannot be read ({error}); copy or download the checkpoint again.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"model: {path}: an object is expected, found {type(config).__name__}.")
    inner = config.get("text_config", config)
    return inner if isinstance(inner, dict) else config


@functools.cache
def _hub_file(name: str, commit: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import httpx

    try:
        return Path(hf_hub_download(name, "config.json", revision=commit))
    except (OSError, httpx.HTTPError) as error:
        raise _not_to_be_had("model", name, commit, first_line(error)) from error


@functools.cache
def _commit(name: str, revision: str, kind: str) -> str:
    """Pin a revision of a hub repository to its commit: the hub's word, else that of the local cache."""
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

    try:
        api = HfApi()
        info = api.model_info if kind == "model" else api.dataset_info
        return str(info(name, revision=revision, timeout=10).sha)
    except (OSError, httpx.HTTPError) as error:  # no network, or no access: the cache may still know the revision
        commit = cached_commit(name, revision, kind)
        if commit is None:
            raise _not_to_be_had(kind, name, revision, first_line(error)) from error
        return commit


def cached_commit(name: str, revision: str, kind: str) -> str | None:
    """Return the commit that a revision had when it was fetched into the local hub cache, or None."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    reference = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else None


def _not_to_be_had(kind: str, name: str, revision: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{kind} = {name}: no such local path, and revision {revision} is to be had neither from the hub nor from its "
        f"local cache ({reason}). Check the name, network and access rights (`mft doctor --profile NAME` does), or "
        "give a local path."
    )

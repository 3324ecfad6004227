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
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from mft_core import data
from mft_core.cache_key import digest, digest_files
from mft_core.checkpoints.gguf import dequantised
from mft_core.data.overlap import has_runs, question_of
from mft_core.data.row_files import read_json_lines
from mft_core.errors import ConfigError, first_line
from mft_core.evaluation import judged, vllm_server
from mft_core.evaluation.benchmarks import TASKS, Definition, definitions, questions
from mft_core.geometry import Geometry, read_geometry
from mft_core.layers import format_layers, parse_layers
from mft_core.methods import SELECTORS, uses
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.sources import Source, local_checkpoint, local_file, local_files, parts, pinned
from pipelines.config.by_name import FOLDERS
from pipelines.config.setup import BenchmarkSpec, ModelSpec, Resolved, ResolvedModel, Setup, SourceSpec, datas

_FIELD = re.compile(r"(?:\{\{\s*)?(\w+)(?:\s*\}\})?")
_REWINDING = {name for name, row in SELECTORS.items() if row.rewinds}
_ADAPTER = "adapter_config.json"
MASK_CONFIG, MASK_FILE = "mask_config.json", "mask.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Resolver:
    """Resolves setups, and looks at each thing once for as long as it lives: variants share models, data, benchmarks.

    Made anew for every planning, so that what was changed since is seen.
    """

    def __init__(self, unpinned: bool = False) -> None:
        """Prepare to look.

        Args:
            unpinned: go on where neither hub nor its cache says what a repository is, with the revision's name and the
                model configuration that ships with a profile; enough for a plan, not for a run.
        """
        self._model = functools.cache(functools.partial(resolved_model, unpinned=unpinned))
        self._rows = functools.cache(functools.partial(rows, unpinned=unpinned))
        self._items = functools.cache(benchmark_items)
        self._asks_long = functools.cache(_asks_long)
        self._benchmark = functools.cache(benchmark)

    def resolve(self, setup: Setup) -> Resolved:
        """Look at everything that the setup's method uses.

        Raises:
            ConfigError: a model, data file, benchmark or layer that is not there.
        """
        found = self._model(setup.model, setup.base)
        mixed = {source: self._rows(source) for data in datas(setup) for source in data.mixture}
        local = [bench for bench in (*setup.benchmarks, *setup.held_out) if bench.path and mixed]
        held_out = {(source.digest, task): (task, source) for task, source in map(self._items, local)}
        benchmarks, validation = (
            {bench.name: self._benchmark(bench) for bench in asked} for asked in (setup.benchmarks, setup.validation)
        )
        if uses(setup.method, "mask"):
            chosen = format_layers(parse_layers(setup.mask.layers, len(found.geometry.layers)))
            mask = setup.mask.model_copy(update={"layers": chosen})
            setup = setup.model_copy(update={"mask": mask})
        if setup.engine == "vllm":
            setup = setup.model_copy(update={"engine_version": vllm_server.version()})
        base = self._base(setup, found)
        existing = self._existing(setup, found) if uses(setup.method, "existing") else None
        kept_out = tuple(held_out[name] for name in sorted(held_out))
        long = any(self._asks_long(*one) for one in kept_out)
        return Resolved(setup, found, base, existing, mixed, kept_out, long, benchmarks, validation)

    def _base(self, setup: Setup, found: ResolvedModel) -> ResolvedModel | None:
        """Return what the fine-tuned model is trained from, where that is known."""
        if setup.fine_tune:
            return found
        if found.adapter:
            return replace(found, adapter=None)
        if setup.base is None:
            return None
        base = self._model(_asked_alike(setup.base, found), None)
        if base.source.digest == found.source.digest:
            raise ConfigError(f"base = {setup.base.path}: that is the model itself; name what it was fine-tuned from.")
        return base

    def _existing(self, setup: Setup, found: ResolvedModel) -> ResolvedModel | Source:
        """Return a model that is there already, or a mask of the fine-tuned one."""
        place = Path(setup.existing or "")
        mask = next((folder for folder in (place / "mask", place) if (folder / MASK_CONFIG).is_file()), None)
        if mask is None or (place / "config.json").is_file():  # a merged checkpoint may keep its mask
            return self._model(_asked_alike(ModelSpec(path=str(place)), found), None)
        try:
            selector = json.loads((mask / MASK_CONFIG).read_text(encoding="utf-8"))["selector"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"existing = {place}: {MASK_CONFIG} cannot be read ({error!r}); copy it again."
            ) from error
        if isinstance(selector, str) and selector in _REWINDING:
            raise ConfigError(
                f"existing = {place}: the mask sets weights back to those of another model; merge it first "
                "(mft mask apply BASE MASK OUT --rewind-to MODEL), and give OUT."
            )
        return local_files(mask, [MASK_CONFIG, MASK_FILE])


def _asked_alike(spec: ModelSpec, model: ResolvedModel) -> ModelSpec:
    """Give another model the chat template of the fine-tuned one, if it has none of its own in the profile."""
    own = model.config.parent / "chat_template.jinja"
    template = model.template.location if model.template else str(own) if own.is_file() else None
    return spec.model_copy(update={"chat_template": spec.chat_template or template})


def resolved_model(spec: ModelSpec, base: ModelSpec | None = None, unpinned: bool = False) -> ResolvedModel:
    """Return a model with what its files say of it.

    Args:
        base: of an adapter, in place of the model that it names itself.
    """
    if (adapted := _adapted(spec, base)) is not None:
        return _with_adapter(spec, resolved_model(adapted, unpinned=unpinned))
    found, tokenizer = _checkpoint(spec, "model", unpinned), _checkpoint(spec, "tokenizer", unpinned)
    template = _template(spec.chat_template) if spec.chat_template else None
    try:
        config = configuration_file(spec)
    except ConfigError:
        shipped = [path for path in FOLDERS["profile"].glob("*/config.json") if _shipped_for(path) == spec.path]
        if not (unpinned and shipped):
            raise
        config = shipped[0]
    content = _read_configuration(config)
    precision = "float32" if content.get("dtype", content.get("torch_dtype")) in (None, "float32") else "bfloat16"
    note = dequantised(content)
    return ResolvedModel(
        found, None, tokenizer, template, config, geometry(config), precision, (f"{note}.",) if note else ()
    )


def _adapted(spec: ModelSpec, base: ModelSpec | None) -> ModelSpec | None:
    """Return the model that a saved adapter belongs to; None where the directory holds no adapter, or a whole model."""
    place = Path(spec.path)
    weights = [path.name for path in place.glob("*.safetensors")] + [path.name for path in place.glob("*.bin")]
    if not (place / _ADAPTER).is_file() or any(not name.startswith("adapter_model.") for name in weights):
        return None
    if base is not None:
        return base
    try:
        config = json.loads((place / _ADAPTER).read_text(encoding="utf-8"))
        name, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"model = {place}: {_ADAPTER} cannot be read ({error!r}); save the adapter again.") from error
    if not name:
        raise ConfigError(f"model = {place}: the adapter does not say which model it belongs to; name it as `base:`.")
    path = str(Path(name).resolve()) if Path(name).is_dir() else str(name)
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ConfigError(
            f"model = {place}: the adapter belongs to {path}, which is not there; say where it is as `base:`."
        )
    return ModelSpec(path=path, revision=revision or "main")


def _with_adapter(spec: ModelSpec, base: ResolvedModel) -> ResolvedModel:
    """Return the model that an adapter makes of its base; its own tokenizer and template win."""
    place = Path(spec.path)
    tokens = parts("tokenizer", place)
    weights = sorted(path.name for path in place.glob("adapter_model.*"))
    adapter = local_files(place, [_ADAPTER, *weights, *tokens])
    template = spec.chat_template or str(place / "chat_template.jinja")
    return replace(
        base,
        adapter=adapter,
        tokenizer=local_files(place, tokens, "tokenizer") if "tokenizer.json" in tokens else base.tokenizer,
        template=_template(template) if spec.chat_template or Path(template).is_file() else None,
        notes=(*base.notes, "The fine-tuned model is an adapter that was merged into its base first."),
    )


def _template(name: str) -> Source:
    """Return a chat template: a Jinja file, or one of ours by its name, which means the same on every machine."""
    shipped = {path.stem: path for path in Path(data.__file__).with_name("templates").glob("*.jinja")}
    if name not in shipped and not Path(name).is_absolute():
        raise ConfigError(
            f"model.chat_template = {name}: no such file; give a Jinja file, or one that is shipped: "
            f"{', '.join(sorted(shipped))}."
        )
    return local_file(shipped.get(name, Path(name)), "model.chat_template")


def _shipped_for(config: Path) -> object:
    return json.loads(config.read_text(encoding="utf-8")).get("_name_or_path")


def model(spec: ModelSpec) -> Source:
    """Return the base model as a source."""
    return _checkpoint(spec, "model")


def _checkpoint(spec: ModelSpec, kind: Literal["model", "tokenizer"], unpinned: bool = False) -> Source:
    """Return the base model, or its tokenizer: the same place, but only that one's files count."""
    if spec.path.endswith(".gguf"):
        raise ConfigError(f"model = {spec.path}: make a checkpoint of it first: mft model import {spec.path} OUT.")
    path = Path(spec.path)
    _refuse_unfetched("model", path)
    if path.is_absolute():
        return local_checkpoint(kind, path)
    return pinned(spec.path, _commit(spec.path, spec.revision, "model", unpinned), kind)


def _refuse_unfetched(field: str, path: Path) -> None:
    if path.parent == ArtifactStore.from_environment().models and not path.is_dir():
        raise ConfigError(
            f"{field} = {path}: not there yet. Fetch it once, while there is a network: mft fetch {path.name}"
        )


def rows(spec: SourceSpec, unpinned: bool = False) -> Source:
    """Return one source of training rows: a file, a folder with all its files, or a hub data set."""
    path = Path(spec.path)
    if path.is_absolute() and path.is_dir():
        every = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        return local_files(path, sorted(str(name) for name in every if not str(name).startswith(".")))
    if path.is_absolute():
        return local_file(path, "data.mixture.path")
    return pinned(spec.path, _commit(spec.path, spec.revision, "dataset", unpinned), "dataset")


def benchmark(spec: BenchmarkSpec) -> Source:
    """Return a benchmark: lm-eval itself, whose version says how its own tasks are defined, or a local-file one.

    That is the folder, known by its tasks' definitions and all their data files alone.
    """
    if not spec.path:
        return _harness(spec.task)
    names: set[str] = set()
    for one in _definitions(spec):
        for split, paths in one.data_files.items():
            for path in paths:
                if not path.is_file():
                    raise ConfigError(
                        f"benchmarks.{spec.name}: data_files.{split} = {path}: no such file; {one.files[0]} names it."
                    )
        names.update(one.files, *(_names(one, split) for split in one.data_files))
    if spec.metric == judged.METRIC:
        names.add(judged.GAMED)
    return local_files(Path(spec.path or ""), sorted(names))


def _definitions(spec: BenchmarkSpec) -> list[Definition]:
    _refuse_unfetched(f"benchmarks.{spec.name}.path", Path(spec.path or ""))
    try:
        return definitions(Path(spec.path or ""), spec.task)
    except ConfigError as error:
        raise ConfigError(f"benchmarks.{spec.name}.task = {spec.task}: {error}") from error


def _names(one: Definition, split: str) -> list[str]:
    return [os.path.relpath(path, one.folder) for path in one.data_files[split]]


@functools.cache
def _harness(task: str) -> Source:
    """Return lm-eval by its version; with it, where the task is one that we define, the files that do."""
    known: dict[str, str] = {"lm-eval": metadata.version("lm-eval")}
    if own := next((path for path in TASKS.rglob("*.yaml") if path.stem.startswith(task)), None):  # a group's begin so
        known["tasks"] = digest_files(own.parent, sorted(path.name for path in own.parent.glob("*.[yp]*")))
    return Source(location="lm-eval", digest=digest(known))


def benchmark_items(spec: BenchmarkSpec) -> tuple[str, Source]:
    """Return the items of a local-file benchmark, to be kept out of the training data, and the task that asks them.

    Where the prompts are the very questions that `question_of` finds in the items, these alone say it, and no task's
    name is needed.
    """
    found = _definitions(spec)
    paths = [path for one in found for path in one.data_files[one.split]]
    if len(paths) == 1 and _is_bare(found[0], paths[0]):
        return "", local_file(paths[0], f"benchmarks.{spec.name}.path")
    for path in paths:
        local_file(path, f"benchmarks.{spec.name}.path")
    names = {name for one in found for name in (*one.files, *_names(one, one.split))}
    return spec.task, local_files(Path(spec.path or ""), sorted(names))


def _asks_long(task: str, items: Source) -> bool:
    return has_runs(questions(task, Path(items.location)))


def _is_bare(one: Definition, items: Path) -> bool:
    """Whether a prompt is the question of its item and nothing else, or what it is can be told by code alone."""
    shown = one.config.get("doc_to_text")
    if not isinstance(shown, str):
        return True
    try:
        _, row = next(read_json_lines(items))
    except (ConfigError, StopIteration):
        return True  # which the preflight tells
    bare = _FIELD.fullmatch(shown.strip())
    return isinstance(row, dict) and bare is not None and question_of(row) == row.get(bare[1])


def geometry(config: Path) -> Geometry:
    """Return a model's sizes from its config.json, and from its weights where they are beside it."""
    found = read_geometry(_read_configuration(config), config.parent)
    if not found.layers:
        raise ConfigError(
            f"model = {config.parent}: its config.json names no number of decoder layers; is it a decoder?"
        )
    return found


def configuration_file(spec: ModelSpec) -> Path:
    """Return the local path of the model's config.json; of a hub repository, that file alone is fetched."""
    spec = _adapted(spec, None) or spec
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
    except (OSError, ValueError, RecursionError) as error:
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
def hub_files(name: str, commit: str) -> tuple[Path, frozenset[str]]:
    """Return where the local cache has a model's repository (or would), and which files it has: by the hub's word,
    else by that of the cache.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import httpx

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots" / commit
    try:
        siblings = HfApi().model_info(name, revision=commit, timeout=10).siblings or []
        return folder, frozenset(file.rfilename for file in siblings)
    except (OSError, httpx.HTTPError):
        return folder, frozenset(path.name for path in folder.glob("*"))


@functools.cache
def _commit(name: str, revision: str, kind: str, unpinned: bool = False) -> str:
    """Pin a revision of a hub repository to its commit: the hub's word, else that of the local cache."""
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, httpx

    try:
        api = HfApi()
        info = api.model_info if kind == "model" else api.dataset_info
        return str(info(name, revision=revision, timeout=10).sha)
    except HFValidationError as error:
        raise _not_to_be_had(kind, name, revision, first_line(error)) from error
    except (OSError, httpx.HTTPError) as error:  # no network, or no access: the cache may still know the revision
        silent = getattr(error, "response", None) is None  # a hub that answers has said that there is no such thing
        commit = cached_commit(name, revision, kind) or (revision if unpinned and silent else None)
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

"""The last look before compute: what only the model's class, the tokenizer or the data files can tell.

Looks only at what is going to be computed, so that a cached study imports neither torch nor lm-eval. A run stops at the
first of the `checks` that fails, `mft doctor` makes all of them.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft_core.errors import ConfigError
from mft_core.evaluation import vllm_server
from mft_core.methods import METHODS, uses
from mft_core.recipes import Evaluate, MixturePart, PrepareData, Runtime
from mft_core.stages import get_stage
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.sources import Source
from pipelines.config import resolve
from pipelines.config.profile import Profile
from pipelines.config.setup import ModelSpec, Resolved, trainings
from pipelines.config.study import Study
from pipelines.graph.nodes import Edge, Node
from pipelines.plan.plan import Plan, check_disk, make_plans
from tasks.cluster import described, devices

if TYPE_CHECKING:
    from mft_core.data.rows import Look

Looks = dict[tuple[Source, MixturePart], "Look"]


def checked_plans(
    studies: Sequence[Study],
    profile: Profile,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    rerun: Sequence[str] = (),
    replicates: int | None = None,
    looks: Sequence[int] = (),
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
    plans = make_plans(studies, profile, store, overrides, seeds, replicates, looks)
    seen: Looks = {}
    for plan in plans:
        check(plan, store, seen, rerun)
    return plans, store


def check(plan: Plan, store: ArtifactStore, looks: Looks, rerun: Sequence[str] = ()) -> None:
    """Raise a ConfigError for anything in the plan that is bound to fail.

    Args:
        looks: what has been seen of data files before; is added to.
        rerun: as in `checked_plans`.
    """
    for _, look in checks(plan, store, looks, rerun):
        look()


def checks(
    plan: Plan, store: ArtifactStore, looks: Looks, rerun: Sequence[str] = ()
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield, by what they look at, the checks of a plan; each raises a ConfigError for what is bound to fail."""
    yield "MFT_HOME", store.check_writable
    yield "disk", partial(check_disk, plan, store.home)
    nodes = [step.node for step in plan.steps if step.artifact is None or step.node.stage in rerun]
    stages = {node.stage for node in nodes}
    if any(get_stage(stage).heavy for stage in stages):
        if plan.runtime.cluster:
            yield "cluster", partial(described, plan.runtime)
        else:
            from mft_core import compute

            yield "device", partial(compute.find_device, plan.runtime)
            yield "devices", partial(devices, plan.runtime)
            yield "processes", partial(_check_processes, nodes, plan.runtime)
    if stages - {"compare"}:
        for spec in dict.fromkeys(resolved.setup.model for resolved in plan.asked):
            asked = [resolved for resolved in plan.asked if resolved.setup.model == spec]
            yield "tokenizer", partial(_check_tokenizer, asked)
        for source in _models(nodes):
            yield "weights", partial(_check_weights, source)
        yield "layers and trainings", partial(_check_models, plan.asked)
    if prepared := [node for node in nodes if node.stage == "prepare-data"]:  # else nothing heavy is imported
        yield "end of turn", partial(_check_end_of_turn, prepared)
        yield "training rows", partial(_check_data, plan, prepared, looks)
    yield "engine", partial(_check_engine, plan, nodes)
    tried: set[tuple[Any, ...]] = set()
    for node in nodes:
        if isinstance(node.recipe, Evaluate):
            yield f"benchmark {node.recipe.task}", partial(_check_benchmark, node, tried)


def check_weights_named(plan: Plan) -> None:
    """Refuse what a run would for lack of files of weights; where neither hub nor cache can say, nothing is."""
    for source in _models(step.node for step in plan.to_compute):
        if source.revision is None or resolve.hub_files(source.location, source.revision)[1]:
            _whole(source)


def _models(nodes: Iterable[Node]) -> Iterator[Source]:
    found = dict.fromkeys(node.inputs.get("model") for node in nodes)
    return (source for source in found if isinstance(source, Source))


def _check_processes(nodes: Iterable[Node], runtime: Runtime) -> None:
    if runtime.processes > 1 or runtime.shard:
        from mft_core.training import launch

        for node in nodes:
            launch.check(node.recipe, runtime)


def _check_data(plan: Plan, nodes: Iterable[Node], looks: Looks) -> None:
    """Look through the rows of local sources, and encode those at even distances as the stage will.

    Of hub data sets, only the stage itself sees the rows.
    """
    from mft_core.checkpoints.files import read_config
    from mft_core.data.assistant_tokens import Drawn, check_fits
    from mft_core.data.chat_template import load_tokenizer
    from mft_core.data.tokens import Limits

    seen = set()
    for node in nodes:
        recipe, model = node.recipe, plan.resolved[node.id].model
        assert isinstance(recipe, PrepareData)
        given = {name: source for name, source in node.inputs.items() if isinstance(source, Source)}
        sources = [given[f"source-{index}"] for index in range(len(recipe.mixture))]
        template = given.get("chat_template")
        same = (
            *recipe.mixture,
            *sources,
            recipe.max_length,
            recipe.validation_rows,
            given["tokenizer"],
            template,
            model.config,
        )
        if same in seen or any(source.revision for source in sources):
            continue
        seen.add(same)
        tokenizer = load_tokenizer(given["tokenizer"].local_path(), template.local_path() if template else None)
        drawn = []
        for source, part in zip(sources, recipe.mixture, strict=True):
            found = looks.get((source, part)) or _look(Path(source.location), part)
            looks[source, part] = found
            if part.rows is not None and part.rows > found.rows:
                raise ConfigError(
                    f"data.mixture: rows = {part.rows}, but {source.location} holds only {found.rows}; "
                    f"valid: 1 to {found.rows}, or null for all."
                )
            whole = part.rows in (None, found.rows) and len(found.sample) == found.rows
            drawn.append(Drawn(found.sample, part.rows or found.rows, whole))
        if (rows := sum(part.rows for part in drawn)) <= recipe.validation_rows:
            raise ConfigError(
                f"data.validation_rows = {recipe.validation_rows}: there are {rows} rows, and one at least is to be "
                "trained on; set a smaller number, or add data."
            )
        limits = Limits.of(read_config(model.config.parent))
        check_fits(drawn, tokenizer, recipe.max_length, plan.runtime.max_dropped, limits)


def _look(path: Path, part: MixturePart) -> Look:
    """Read a source, and say so where that takes a while."""
    from mft_core.data.rows import look

    def tell(rows: int) -> None:
        if rows % 100_000 == 0:
            print(f"checking {path.name}: {rows:,} rows", file=sys.stderr, flush=True)

    return look(path, part, tell)


def _check_models(asked: Sequence[Resolved]) -> None:
    from mft_core.checkpoints.files import WeightFiles, check_dropout, read_config, skeleton
    from mft_core.layers import parse_layers
    from mft_core.masks.sites import choose_sites, find_sites
    from mft_core.selectors import wanda
    from mft_core.training.lora import check_lora, check_sparse

    sites: dict[ModelSpec, list] = {}
    for resolved in asked:
        setup, spec = resolved.setup, resolved.setup.model
        directory = resolved.model.config.parent
        config = read_config(directory)
        for training in trainings(setup).values():
            check_dropout(config, training.dropout)
        method = METHODS[setup.method]
        if method.selector or uses(setup.method, "lora"):
            if spec not in sites:
                sites[spec] = find_sites(skeleton(directory))
            if method.name == "shira" and setup.lora:
                every = [matrix for layer in resolved.model.geometry.layers for matrix in layer]
                check_sparse(sites[spec], setup.lora.rank, [(matrix.outputs, matrix.inputs) for matrix in every])
            elif setup.lora and uses(setup.method, "lora"):
                check_lora(sites[spec], setup.lora)
        if method.selector:
            layers = parse_layers(setup.mask.layers, len(resolved.model.geometry.layers))
            chosen = choose_sites(sites[spec], layers, setup.mask.modules)
            if method.observes == "inputs":
                wanda.check_inputs(chosen)
            # weights that a stage writes are as they should be
            given = None if setup.fine_tune or resolved.model.adapter else resolved.model
            for found in (given, resolved.base if method.needs_base else None):
                if found and Path(found.source.location).is_absolute():
                    WeightFiles(found.config.parent).check([site.name for site in chosen])


def _check_weights(source: Source) -> None:
    """Refuse a checkpoint whose weights cannot be loaded; of the hub's, those that were fetched before."""
    from mft_core.checkpoints.files import check_weights

    if (directory := _whole(source)) is not None:
        check_weights(directory)


def _whole(source: Source) -> Path | None:
    """Return a checkpoint's directory; None where weights of it are still to be fetched from the hub.

    A repository may have nothing but pickled weights; those are read as plain tensors.
    """
    directory, names = Path(source.location), None
    if source.revision is not None:
        directory, names = resolve.hub_files(source.location, source.revision)
    files = {path.name for path in directory.glob("*")} if names is None else set(names)
    kinds = ("model.safetensors", "pytorch_model.bin")  # as transformers prefers them
    taken = next((name for name in kinds if files & {name, f"{name}.index.json"}), None)
    if taken is None:
        where = "there" if names is None else "in the hub's repository, or, if it cannot be asked, its local cache"
        raise ConfigError(
            f"model.path = {source.location}: no weight files {where} (model*.safetensors with an index if they are "
            "several, or pytorch_model*.bin); give a whole checkpoint."
        )
    index = directory / f"{taken}.index.json"
    wanted = files & {taken, index.name}
    try:
        if index.is_file():
            wanted |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in wanted if not (directory / name).is_file())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"model.path = {directory}: {index.name} cannot be read ({error!r}); copy or download the checkpoint again."
        ) from error
    if missing and names is None:
        raise ConfigError(
            f"model.path = {directory}: {len(missing)} weight files of its index are missing, first {missing[0]}; "
            "copy or download the checkpoint again."
        )
    return None if missing else directory


def _check_tokenizer(asked: Sequence[Resolved]) -> None:
    """Refuse a model's tokenizer that cannot be read, or that lacks the chat template that one of the setups needs."""
    from mft_core.checkpoints.files import read_config
    from mft_core.data.chat_template import read_tokenizer

    model, setups = asked[0].model, [resolved.setup for resolved in asked]
    read_config(model.config.parent)  # which says first what is wrong with the whole
    tokenizer = read_tokenizer(model.tokenizer.local_path(), model.template.local_path() if model.template else None)
    chats = any(setup.method != "base" or any(b.apply_chat_template for b in setup.benchmarks) for setup in setups)
    if chats and not tokenizer.chat_template:
        raise ConfigError(
            f"model.path = {setups[0].model.path}: its tokenizer has no chat template; set model.chat_template to a "
            "Jinja file, or to tulu, which is shipped."
        )


def _check_end_of_turn(nodes: Iterable[Node]) -> None:
    """Refuse a chat template from which no model learns to stop."""
    from mft_core.data.chat_template import check_end_of_turn, load_tokenizer

    asked = {(given["tokenizer"], given.get("chat_template")) for given in (node.inputs for node in nodes)}
    for tokenizer, template in asked:
        assert isinstance(tokenizer, Source)
        found = template.local_path() if isinstance(template, Source) else None
        check_end_of_turn(load_tokenizer(tokenizer.local_path(), found))


def _check_engine(plan: Plan, nodes: Iterable[Node]) -> None:
    """Refuse an engine that is not there, or not for these models."""
    engines = {node.recipe.engine for node in nodes if isinstance(node.recipe, Evaluate)}
    if "vllm" in engines:
        from mft_core.compute import find_device

        cpu = plan.runtime.cluster is None and find_device(plan.runtime).type == "cpu"
        for folder in dict.fromkeys(resolved.model.config.parent for resolved in plan.asked):
            vllm_server.check(folder, cpu)
    if "openai" in engines:
        url = plan.runtime.engine_url
        if not (url or "").startswith(("http://", "https://")):
            raise ConfigError(
                f"engine = openai: runtime.engine_url = {url}; give the server's address, e.g. "
                "--set runtime.engine_url=http://127.0.0.1:8000/v1."
            )
        try:
            urllib.request.urlopen(f"{url}/models", timeout=10).close()
        except urllib.error.HTTPError:
            pass  # it answers; what it lets be seen of its models is its own affair
        except OSError as error:
            raise ConfigError(f"engine = openai: no server answers at runtime.engine_url = {url} ({error}).") from error


def _check_benchmark(node: Node, tried: set[tuple[Any, ...]]) -> None:
    """Try an evaluation without its model, unless it was tried before."""
    assert isinstance(node.recipe, Evaluate)
    first = node  # of the chain of models: it has the base model, and the template
    while isinstance(made := first.inputs["training" if first.stage == "pick-checkpoint" else "model"], Edge):
        first = made.node
    folder = node.inputs.get("benchmark")
    template = node.inputs.get("chat_template") or first.inputs.get("chat_template")
    key = node.recipe, *(getattr(source, "location", "") for source in (folder, made, template))
    if key not in tried:
        from mft_core.evaluation.rehearsal import rehearse

        tokenizer = made.model_copy(update={"kind": "tokenizer"}).local_path()
        paths = (source.local_path() if isinstance(source, Source) else None for source in (folder, template))
        rehearse(node.recipe, tokenizer, *paths)
        tried.add(key)

"""Local-file benchmarks: a folder of task definitions in lm-eval's own YAML format, and JSONL files of their items.

    task: tiny_gcd
    dataset_path: json
    dataset_kwargs: {data_files: {test: tiny_gcd.jsonl}}    # relative to the folder
    test_split: test

The same folder works with stock `lm_eval --include_path FOLDER`, run from within it: `include:`, groups, tags and lists
of files are read as there. Read here by plain YAML and JSON, fast enough for planning, and without running any code
that a definition names; `mft_core.evaluation.lm_eval_harness` runs them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment
from pydantic import BaseModel, Field, InstanceOf

from mft_core.data.overlap import question_of, read_questions
from mft_core.data.row_files import read_json_lines
from mft_core.errors import ConfigError, unknown, validated
from mft_core.names import inside
from mft_core.sandbox import FAULTS, environment, limited, render
from mft_core.yaml_files import read_yaml

TASKS = Path(__file__).parent / "tasks"
"""definitions of ours beside lm-eval's own: benchmarks as the paper measured them, where lm-eval's differ"""
_DEEPEST = 12
"""levels of an item; `datasets` takes twice as long for each"""
_OF_GROUPS = frozenset({"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "task_list"})
"""what a group's definition says of itself; the rest holds for its tasks"""
_NO_TASK = "benchmark folder {}: no task there; lm-eval's definitions are files *.yaml."
_TEMPLATES = ("description", "doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix")


class Function(NamedTuple):
    """Code that a definition names: `!function module.name`, the module beside the definition."""

    name: str
    folder: Path


class _Metric(BaseModel):
    metric: str | InstanceOf[Function]
    aggregation: str | InstanceOf[Function] | None = None


class _Filter(BaseModel):
    name: str


class _Generation(BaseModel):
    max_gen_toks: int | None = Field(None, ge=1)


class _Shape(BaseModel):
    """What is read here of a definition; lm-eval, which is asked before anything is computed, checks the rest."""

    group: str | None = None
    task: str | list[str | dict[str, Any]] | None = None
    tag: str | list[str] | None = None
    dataset_path: str | None = None
    dataset_kwargs: dict[str, Any] | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    output_type: str | None = None
    metric_list: list[_Metric] | None = None
    filter_list: list[_Filter] | None = None
    generation_kwargs: _Generation | None = None
    num_fewshot: int | None = Field(None, ge=0)
    repeats: int | None = Field(None, ge=1)


class Item(NamedTuple):
    """One item, and file and line where it stands."""

    where: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Definition:
    """One task, with what it includes and what its groups say of it."""

    folder: Path
    task: str
    config: dict[str, Any]
    """as lm-eval takes it; a `Function` where it names code"""
    files: tuple[str, ...]
    """the YAML files in which it stands, relative to the folder, and the modules of its functions"""

    @property
    def split(self) -> str:
        """Return the name of the split whose items are asked.

        Raises:
            ConfigError: the definition names none.
        """
        split = self.config.get("test_split") or self.config.get("validation_split")
        if not isinstance(split, str) or split not in self.data_files:
            raise ConfigError(
                f"task '{self.task}' in {self.folder}: test_split or validation_split must name a split of its "
                f"data_files; it is {split!r}. Valid: {', '.join(self.data_files)}."
            )
        return split

    @functools.cached_property
    def data_files(self) -> dict[str, tuple[Path, ...]]:
        """The JSONL files of each split; as in `datasets`, files without one are the split 'train'.

        Raises:
            ConfigError: the definition names none, or others than JSONL files within the folder.
        """
        if self.config.get("dataset_path", "json") != "json":
            raise ConfigError(
                f"task '{self.task}' in {self.folder}: dataset_path = {self.config['dataset_path']!r:.80}: the items "
                "of a local benchmark are JSONL files; write dataset_path: json, and dataset_kwargs.data_files."
            )
        files = (self.config.get("dataset_kwargs") or {}).get("data_files")
        splits = files if isinstance(files, dict) else {"train": files}
        found = {}
        for split, named in splits.items():
            names = [named] if isinstance(named, str) else named
            if not (isinstance(names, list) and names and all(isinstance(word, str) for word in (split, *names))):
                raise ConfigError(
                    f"task '{self.task}' in {self.folder}: dataset_kwargs.data_files must name the JSONL files of a "
                    f"split, for example {{test: {self.task}.jsonl}}; it is {files!r}."
                )
            said_by = f"task '{self.task}' in {self.folder}: dataset_kwargs.data_files"
            found[split] = tuple(inside(self.folder, name, said_by) for name in names)
        return found

    def items(self, split: str) -> list[Item]:
        """Return the items of a split.

        Raises:
            ConfigError: no such file, no items, or a line (named by its number) that is not a JSON object.
        """
        return [item for path in self.data_files[split] for item in read_items(path)]

    def refuse_code(self, allowed: bool) -> None:
        """Raise a ConfigError where the definition is code and the user has not allowed it.

        Code is functions, and what lm-eval loads from elsewhere to run it.
        """
        code = [f"{key}: !function {value.name}" for key, value in _leaves(self.config) if isinstance(value, Function)]
        code += [f"{key}: {value}" for key, value in _leaves(self.config) if key == "hf_evaluate" and value]
        code += [f"use_prompt: {prompt}"] if (prompt := self.config.get("use_prompt")) else []
        if code and not allowed:
            raise ConfigError(
                f"task '{self.task}' in {self.folder} runs code of that folder ({'; '.join(code)}). Read it, and if "
                "you trust it, allow it for this benchmark in your profile: allow_code: true."
            )

    def check_items(self) -> None:
        """Check that every item has what the prompt and the target show; `lm_eval_harness.check_task` says when.

        Raises:
            ConfigError: naming file and line of the first that has not.
        """
        limited(f"task '{self.task}'", self._check_items)

    def _check_items(self) -> None:
        fewshot = self.config.get("fewshot_split")
        for split in dict.fromkeys([self.split, *([fewshot] if fewshot in self.data_files else [])]):
            items, sandbox = self.items(split), environment()
            fields = {key for item in items for key in item.row}
            for where, row in items:
                shown = {name: self.config.get(name) for name in _TEMPLATES}
                for name, template in shown.items():
                    if isinstance(template, str) and template:
                        shown[name] = _shown(sandbox, where, name, template, fields, row)
                self._check_target(where, row, shown["doc_to_target"])
                if self.config.get("output_type") == "multiple_choice":
                    _check_choices(where, shown)

    def _check_target(self, where: str, row: Mapping[str, Any], target: Any) -> None:
        empty = target == [] or (isinstance(target, str) and not target.strip())
        from_null = target in (None, "None") and None in row.values()
        if empty or from_null:
            template = self.config["doc_to_target"]
            raise ConfigError(f"{where}: the item has no answer: doc_to_target = {template!r:.80} shows {target!r}.")

    def prompts(self) -> list[str]:
        """Return the items' questions: as `doc_to_text` shows them, and bare.

        Raises:
            ConfigError: an item that the template cannot show, or one that shows no question at all.
        """
        return limited(f"task '{self.task}'", self._prompts)

    def _prompts(self) -> list[str]:
        template, items, sandbox = self.config.get("doc_to_text"), self.items(self.split), environment()
        fields = dict.fromkeys(key for item in items for key in item.row)
        found = []
        for where, row in items:
            shown = None
            if isinstance(template, str):
                shown = _shown(sandbox, where, "doc_to_text", template, fields, {**fields, **row})
            bare = question_of(row)
            if not isinstance(shown, str) and bare is None:
                raise ConfigError(f"{where}: doc_to_text shows no text, so training rows cannot be compared with it.")
            found += [text for text in (shown, bare) if isinstance(text, str) and text.strip()]
        return list(dict.fromkeys(found))


def _shown(
    sandbox: Environment, where: str, name: str, template: str, fields: Collection[str], row: Mapping[str, Any]
) -> Any:
    """Return what lm-eval makes of an item by one of the definition's templates: a field of that name, or the text."""
    try:
        return row[template] if template in fields else render(sandbox, template, row)
    except FAULTS as error:
        raise ConfigError(f"{where}: {name} = {template!r:.80} cannot show this item: {error}.") from error


def _check_choices(where: str, shown: Mapping[str, Any]) -> None:
    """Check that the target of an item is one of its choices, as lm-eval reads both."""
    choices, prompt, target = (_literal(shown[name]) for name in ("doc_to_choice", "doc_to_text", "doc_to_target"))
    if any(isinstance(value, Function) for value in (choices, prompt, target)):
        return
    choices = list(choices.values()) if isinstance(choices, dict) else choices
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise ConfigError(f"{where}: doc_to_choice shows {choices!r:.80}; valid: a list of texts.")
    gold = prompt if isinstance(prompt, int) else target  # the choices then are prompts, and this says which is right
    for one in gold if isinstance(gold, list) else [gold]:
        if not (0 <= one < len(choices) if isinstance(one, int) else one in choices):
            raise ConfigError(
                f"{where}: the right choice is {one!r:.80}, but the item has {len(choices)} choices; valid: 0 to "
                f"{len(choices) - 1}, or one of the texts."
            )


def _literal(shown: Any) -> Any:
    """Return what lm-eval takes a text for: a number, a list, or the text."""
    if isinstance(shown, str) and (shown.isdigit() or (shown[:1], shown[-1:]) == ("[", "]")):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(shown)
    return shown


def definitions(folder: Path, name: str) -> list[Definition]:
    """Return the tasks in `folder` that a name means: one, or those of a group or tag.

    Raises:
        ConfigError: no such name there, or what it means cannot be read.
    """
    index = _read_folder(folder)
    if not index.known:
        raise index.refused(_NO_TASK.format(folder))
    if name not in index.known:
        raise index.refused(str(unknown(f"task in benchmark folder {folder}", name, index.known)))
    found = list(index.expand(name, {}, (), ()))
    if not found:
        raise ConfigError(f"group '{name}' in {folder}: no task belongs to it; list some under `task:`.")
    return found


def questions(task: str, benchmark: Path) -> list[str]:
    """Return what is asked by a task of a folder; or, without a task, by the items of a file.

    Raises:
        ConfigError: an item that shows no question.
    """
    if not task:
        return read_questions(benchmark)
    return [prompt for one in definitions(benchmark, task) for prompt in one.prompts()]


def tasks_in(folder: Path) -> list[str]:
    """Return the names of all single tasks that a folder defines.

    Raises:
        ConfigError: it defines none.
    """
    index = _read_folder(folder)
    found = [name for name, (config, _) in index.known.items() if config.get("group") is None]
    if not found:
        raise index.refused(_NO_TASK.format(folder))
    return found


@dataclass(frozen=True)
class Index:
    """Tasks, groups and tags of a folder by name, each a configuration and the files in which it stands."""

    folder: Path
    known: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = field(default_factory=dict)
    """tags too: as groups of their tasks"""
    broken: list[str] = field(default_factory=list)
    """files that cannot be read, and why; they matter only to who asks for what stands in them"""

    def add(self, config: dict[str, Any], files: tuple[str, ...]) -> None:
        """Take in what one file defines."""
        name = config.get("group") or config.get("task")
        if not isinstance(name, str):  # a part that others include
            return
        if name in self.known and "tag:" not in self.known[name][1]:
            raise ConfigError(f"'{name}' is defined by {self.known[name][1][0]} too; give each its own name")
        self.known[name] = config, files
        tags = config.get("tag") or []
        for tag in [tags] if isinstance(tags, str) else tags:
            group, _ = self.known.setdefault(tag, ({"group": tag, "task": []}, ("tag:",)))
            if "tag:" in self.known[tag][1]:
                group["task"].append(name)

    def refused(self, error: str) -> ConfigError:
        """Return an error for what is not among the known, with the files that may have it and cannot be read."""
        return ConfigError("\n".join([error, *self.broken]))

    def expand(
        self, member: Any, overrides: Mapping[str, Any], files: tuple[str, ...], parents: tuple[str, ...]
    ) -> Iterator[Definition]:
        """Yield the tasks that a name means, or a group's member, with what the groups around it say of them."""
        member = {"task": member} if isinstance(member, str) else member
        name = (member.get("group") or member.get("task")) if isinstance(member, dict) else None
        if not isinstance(name, str) or name in parents:
            raise ConfigError(
                f"group {' > '.join(parents)}: its member {member!r:.80} is no task, or the group itself."
            )
        own = {key: value for key, value in member.items() if key not in ("group", "task")}
        known, places = self.known.get(name, (member, ()))
        files = (*(place for place in places if place != "tag:"), *files)
        if known.get("group") is None:
            inline = name not in self.known
            task = f"{parents[-1]}::{name}" if inline and parents else name
            config = {**known, **overrides, **own, "task": task}
            validated(_Shape, config, f"task '{task}' in {', '.join(files)}")
            modules = _modules(self.folder, config)
            yield Definition(self.folder, task, config, tuple(dict.fromkeys([*files, *modules])))
            return
        for_tasks = {key: value for key, value in {**known, **own}.items() if key not in _OF_GROUPS}
        children = known.get("task") or []
        for child in [children] if isinstance(children, str) else children:
            yield from self.expand(child, {**for_tasks, **overrides}, files, (*parents, name))


def _read_folder(folder: Path) -> Index:
    if not folder.is_dir():
        raise ConfigError(f"benchmark folder {folder.absolute()}: no such folder; correct the path.")
    index = Index(folder)
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: path.as_posix()):
        if {"__pycache__", ".ipynb_checkpoints"} & set(path.parts):
            continue
        try:
            config, files = _read(folder, path, ())
            if "class" in config:
                raise ConfigError("a task in Python (class:) is none of a local benchmark")
            validated(_Shape, config, str(path))
            index.add(config, files)
        except (ConfigError, OSError) as error:
            index.broken.append(f"{path} cannot be read as YAML of lm-eval: {error}")
    return index


def _read(folder: Path, path: Path, parents: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what a file says, with what it includes, and the names of all these files."""
    if path in parents:
        raise ConfigError(f"{path} includes itself")
    stat = path.stat()
    config = dict(_parse(path, stat.st_mtime_ns, stat.st_size))
    files: tuple[str, ...] = (os.path.relpath(path, folder),)
    included: dict[str, Any] = {}
    named = config.pop("include", [])
    for name in named if isinstance(named, list) else [named]:
        own = os.path.normpath(Path(files[0]).parent / str(name))
        other, its_files = _read(folder, inside(folder, own, f"{path}: include"), (*parents, path))
        other.pop("task_list", None)
        included |= other
        files += its_files
    return {**included, **config}, files


@functools.lru_cache(maxsize=1024)
def _parse(path: Path, modified: int, size: int) -> dict[str, Any]:
    """Read a file that every variant of a study asks for; `modified` and `size` make it read again when it changes."""
    return read_yaml(path, {"!function": lambda name: Function(name, path.parent)})


def _modules(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the modules that a definition's functions stand in, where they are files of the folder."""
    for _, value in _leaves(config):
        if isinstance(value, Function):
            module = value.folder / f"{value.name.rpartition('.')[0].replace('.', '/')}.py"
            if module.is_file():
                yield os.path.relpath(module, folder)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no mapping and no list, with the key that it stands under."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


def _deep(value: Any, left: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_deep(each, left - 1) for each in inner)


def read_items(path: Path) -> list[Item]:
    """Return the items of a JSONL file; see `Definition.items`."""
    items = []
    for number, row in read_json_lines(path):
        if not isinstance(row, dict):
            raise ConfigError(f"{path} line {number}: an object is expected, found {type(row).__name__}.")
        if _deep(row, _DEEPEST):
            raise ConfigError(f"{path} line {number}: nested too deeply; valid: {_DEEPEST} levels.")
        items.append(Item(f"{path} line {number}", row))
    return items

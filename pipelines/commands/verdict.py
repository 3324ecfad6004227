"""The profile that `mft verdict` writes: a user's checkpoint, rows and benchmarks, and settings that fit them.

What is not the user's to say is chosen here once, in `draft`; how many rows and items there is time for, the run finds
(`pipelines.cost.budget`). The file is an ordinary profile that the user keeps and may change.
"""

from __future__ import annotations

import itertools
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mft_core.data.rows import look
from mft_core.errors import ConfigError
from mft_core.evaluation.benchmarks import tasks_in
from mft_core.evaluation.lm_eval_harness import usual_metric
from mft_core.layers import format_layers
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.outputs import check_apart
from mft_core.yaml_files import read_yaml
from pipelines.config.profile import Profile, anchored, given
from pipelines.config.resolve import resolved_model
from pipelines.config.setup import ModelSpec, ResolvedModel
from pipelines.config.study import load_study
from pipelines.plan.preflight import checked_plans

DOMAIN = "own"
_GROUPS = 3
"""parts of the depth that a mask is learned in, one at a time"""
_BATCH, _STEPS, _PASSES = 16, 200, 3
"""sequences of a step; steps that few rows are passed through for, at most so many times"""
_LONGEST = 1_024
"""tokens of a training sequence at most"""
_SECONDS = {"h": 3600, "m": 60, "s": 1}
_LEAST_SECONDS, _MOST_SECONDS = 120, 366 * 86400
_ANSWER, _SHARE = 30.0, 0.04
"""seconds, and share of the budget, that are kept for statistics and report"""


class Clock:
    """The time of a run, from its first moment."""

    def __init__(self, budget: float) -> None:
        """Start."""
        self.budget = budget
        self._end = time.monotonic() + budget - max(_ANSWER, _SHARE * budget)

    @property
    def left(self) -> float:
        """Seconds until the answer has to be made; below zero when that is late."""
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Question:
    """What `mft verdict` is asked."""

    values: Mapping[str, Any]
    """the profile: a draft with all rows and items, or the one that an earlier run has left"""
    path: Path
    """where it lies, or is going to"""
    kept: bool
    """an earlier run has left it"""
    clock: Clock
    command: str


def seconds_of(budget: str) -> float:
    """Read a time such as 2h, 90m, 1h30m.

    Raises:
        ConfigError: it is none, or too short for anything.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", budget)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != budget or not _LEAST_SECONDS <= seconds <= _MOST_SECONDS:
        raise ConfigError(f"--budget {budget}: give a time from two minutes to a year, e.g. 2h, 90m or 1h30m.")
    return seconds


def draft(checkpoint: str, rows: Sequence[Path], benchmarks: Sequence[str], base: str | None) -> dict[str, Any]:
    """Return the profile with all rows and items.

    Args:
        checkpoint, base: local directories, or hub names.
        benchmarks: folders of local tasks, or names of lm-eval's.

    Raises:
        ConfigError: one of them cannot be read.
    """
    spec = _model(checkpoint)
    found = resolved_model(ModelSpec(**spec), ModelSpec(**_model(base)) if base else None)
    asked = {}
    if plain := _plain(found):
        spec["chat_template"], asked = plain, {"apply_chat_template": False}
    depth, context = len(found.geometry.layers), found.geometry.context or _LONGEST
    counts = {path.resolve(): look(path).rows for path in rows}
    validation = min(200, sum(counts.values()) // 10)
    training: dict[str, Any] = {
        "batch_size": _BATCH,
        "epochs": passes(sum(counts.values())),
        "precision": found.precision,
        **({"validations": 2, "keep": "best"} if validation else {}),
    }
    mask: dict[str, Any] = {"layers": "all", "score_init": "magnitude", "training": {**training, "learning_rate": 5e-4}}
    defaults: dict[str, Any] = {
        "precision": found.precision,
        "model": spec,
        **({"base": _model(base)} if base else {}),
        "data": {
            "mixture": [{"path": str(path), "rows": count} for path, count in counts.items()],
            "max_length": min(context, _LONGEST),
            "validation_rows": validation,
        },
        "continued": {**training, "learning_rate": 1e-5},
        "mask": {**mask, "calibration_rows": min(64, max(1, sum(counts.values()) // 4))},
        "benchmarks": [{**bench, **asked} for text in benchmarks for bench in _benchmarks(text)],
    }
    return {
        "default_domain": DOMAIN,
        "layer_groups": _groups(depth),
        "defaults": defaults,
        "domains": {DOMAIN: {}},
    }


def passes(rows: int) -> int:
    """Return the passes over so many rows."""
    return max(1, min(_PASSES, round(_STEPS * _BATCH / max(rows, 1))))


def _model(name: str) -> dict[str, str]:
    return {"path": str(given("path", name))}


def _plain(model: ResolvedModel) -> str | None:
    """Name the shipped template that shows turns as they are, one after another, if the tokenizer has none of its own.

    A row then begins as a prompt of evaluation does: with the token that the tokenizer puts there, or with none, since
    one that a model has never seen there ruins what it says.
    """
    from mft_core.checkpoints.files import read_config
    from mft_core.data.chat_template import read_tokenizer

    read_config(model.config.parent)  # which says first what is wrong with the whole
    tokenizer = read_tokenizer(model.tokenizer.local_path(), model.template.local_path() if model.template else None)
    if tokenizer.chat_template:
        return None
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "plain_bos" if begins else "plain"


def _groups(depth: int) -> list[str]:
    count = min(_GROUPS, depth)
    edges = [depth * part // count for part in range(count + 1)]
    return [format_layers(tuple(range(*pair))) for pair in itertools.pairwise(edges)]


def _benchmarks(text: str) -> list[dict[str, Any]]:
    folder = Path(str(given("path", text)))
    if folder.is_dir():
        names = tasks_in(folder)
        return [
            {"name": name, "task": name, "path": str(folder.resolve()), "metric": usual_metric(name, folder)}
            for name in names
        ]
    if folder.is_file():
        raise ConfigError(
            f"--benchmark {text}: a file says neither how its items are asked nor how answers are judged; give a "
            "folder with it and a task in lm-eval's YAML format, or a task of lm-eval's."
        )
    if "/" in text or text.startswith("."):
        raise ConfigError(f"--benchmark {text}: no such folder; give one with a task in lm-eval's format, or a task.")
    return [{"name": text, "task": text, "metric": usual_metric(text, None)}]


def profile_of(values: Mapping[str, Any], name: str) -> Profile:
    """Return the profile as reading its file would."""
    return Profile.model_validate({"name": name, **values})


def same_question(kept: Mapping[str, Any], drafted: Mapping[str, Any]) -> bool:
    """Whether a profile is one that was drafted of the same checkpoint, data and benchmarks, whatever was cut."""

    def asked(values: Mapping[str, Any]) -> Any:
        own = values["defaults"]
        named = [source.get("path") for source in own["data"]["mixture"]]
        tasks = [(bench.get("task"), bench.get("path")) for bench in own["benchmarks"]]
        return own["model"], own.get("base"), named, tasks

    try:
        return bool(asked(kept) == asked(drafted))
    except (AttributeError, LookupError, TypeError):  # it is no such profile
        return False


def write(values: Mapping[str, Any], path: Path, told: Sequence[str]) -> None:
    """Write the profile, with what was cut as its first lines; it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = "".join(f"# {line}\n" for line in ("Made by `mft verdict`; change what you like.", *told))
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(comment + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), "utf-8")
    unfinished.replace(path)


def asked_for(
    checkpoint: str, rows: Sequence[Path], benchmarks: Sequence[str], base: str | None, budget: str, out: Path | None
) -> tuple[Question, ArtifactStore]:
    """Return the question of a command line, with everything refused that can be known to fail.

    Raises:
        ConfigError: anything about checkpoint, rows, benchmarks or budget that is wrong; or another profile lies there.
    """
    clock = Clock(seconds_of(budget))
    values = draft(checkpoint, rows, benchmarks, base)
    path = out or Path(f"verdict-{Path(values['defaults']['model']['path']).name}.yaml")
    asked = values["defaults"]
    read = [asked["model"], asked.get("base") or {}, *asked["benchmarks"], *asked["data"]["mixture"]]
    path = check_apart(path, *(Path(one["path"]) for one in read if "path" in one and Path(one["path"]).exists()))
    if path.is_dir():
        raise ConfigError(f"--out {path}: a folder lies there; give the file of the profile that is to be written.")
    kept = path.is_file()
    if kept:
        found = anchored(read_yaml(path), path.parent)
        if not same_question(found, values):
            raise ConfigError(f"--out {path}: the profile of another question lies there; give another file.")
        values = found
    _, store = checked_plans([load_study("verdict")], profile_of(values, path.stem))
    words = ["mft", "verdict", checkpoint, *(word for path in rows for word in ("--data", str(path)))]
    words += [word for text in benchmarks for word in ("--benchmark", text)]
    words += [*(("--base", base) if base else ()), "--budget", budget, *(("--out", str(out)) if out else ())]
    return Question(values, path, kept, clock, shlex.join(words)), store

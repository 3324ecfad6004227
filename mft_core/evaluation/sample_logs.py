"""Reads what a model answered, item by item, from files of others and of ours: for `mft compare`.

lm-eval's sample logs (`samples_TASK_TIME.jsonl` of `--log_samples`, one line per item *and filter*), folders of them,
this project's evaluations (`items.jsonl`), or JSONL with `id` and `score`; gzipped or not. Items are paired by id; that
both models got the same question, prompt and target is checked by the log's hashes, where it has them. Scores beyond 1
(per cents, ratings) are taken as points. Imports neither torch nor lm-eval.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mft_core.errors import ConfigError, unknown
from mft_core.statistics.comparison import Grouping
from mft_core.statistics.effects import Stratum

_NAME = re.compile(r"samples_(?P<task>.+)_(?P<time>\d{4}-\d\d-\d\dT.+)\.jsonl(\.gz)?")
_LINES = "Give the items' outcomes, one JSON object a line; results of whole tasks have none (lm_eval --log_samples)."
_MOST = 1e100
"""of a score: squares and sums of larger ones are no numbers any more"""
_PAIRS = ("f1", "mcc", "brier_score", "word_perplexity", "byte_perplexity", "bits_per_byte")
"""lm-eval's metrics of a whole task: what it logs of an item is a pair that these are made of, and no outcome"""
_LESS = {"loss", "nll", "perplexity", "ppl", "ter", "wer", "cer", "mse", "rmse", "mae", "error", *_PAIRS[2:]}
"""metrics that are better where they are less, unless lm-eval's results beside a log say otherwise"""
_OTHER_SCALE = 10
"""times by which scores of one model exceed those of the other, which stay within 1, if one of them has per cents"""
_HASHES = {"doc_hash": "question", "prompt_hash": "prompt", "target_hash": "target"}


class _Item(NamedTuple):
    """What a log says of one item."""

    scores: tuple[float, ...]
    """several where a metric has several (the instructions of an IFEval prompt)"""
    hashes: tuple[Any, ...]
    """of question, prompt, target"""
    cluster: str | None
    subject: str | None
    """in an evaluation of ours whose accuracy is a mean over subjects"""


class _Log(NamedTuple):
    """One model's answers to one task."""

    items: dict[str, _Item]
    """by id"""
    filter: str | None
    """the one that was read"""
    filters: list[str]
    """all that it has"""


@dataclass(frozen=True)
class Paired:
    """Two models on the same items of one task."""

    task: str
    metric: str
    """with the filter, as lm-eval writes it: exact_match,strict-match"""
    higher_is_better: bool
    baseline: float
    treatment: float
    stratum: Stratum
    ids: tuple[str, ...]


def read_pairs(a: Path, b: Path, metric: str | None = None, cluster: str | None = None) -> list[Paired]:
    """Read and pair two models' answers, task by task.

    Args:
        a: the baseline: a file or a folder.
        b: the other one.
        metric: as lm-eval writes it, `exact_match` or `exact_match,strict-match`; None takes the first that both have.
        cluster: field of the items, or of their `doc`, that names what belongs together.

    Raises:
        ConfigError: a file that is no log, other items, prompts or metrics, an item that is there twice, no number.
    """
    ours, theirs = _files(a), _files(b)
    if len(ours) == len(theirs) == 1:  # two files are one task, whatever they are called
        theirs = dict(zip(ours, theirs.values(), strict=True))
    if set(ours) != set(theirs):
        odd = ", ".join(sorted(set(ours) ^ set(theirs)))
        raise ConfigError(f"{a} and {b}: these tasks are in one of the two only: {odd}. Compare what both were asked.")
    return [_paired(task, ours[task], theirs[task], metric, cluster) for task in sorted(ours)]


def _files(path: Path) -> dict[str, Path]:
    """Return the logs by task."""
    if path.is_file():
        return {_task(path): path}
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder; give a sample log, or a folder with one.")
    if (path / "items.jsonl").is_file():
        return {str(_summary(path).get("benchmark", path.name)): path / "items.jsonl"}
    found: dict[str, Path] = {}
    for file in sorted(path.rglob("samples_*.jsonl*")):
        if (task := _task(file)) in found:
            raise ConfigError(f"{path}: two logs of task {task}: {found[task]} and {file}; give one file.")
        found[task] = file
    if not found:
        raise ConfigError(f"{path}: no samples_*.jsonl and no items.jsonl there; run lm_eval with --log_samples.")
    return found


def _task(file: Path) -> str:
    named = _NAME.fullmatch(file.name)
    return named["task"] if named else file.stem


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    return next(_rows(file, whole=True), {}) if file.is_file() else {}


def _rows(path: Path, whole: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file: one a line, or one in the whole of it."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:  # splitlines cuts within responses
            for number, line in enumerate([file.read()] if whole else file, start=1):
                if line.strip():
                    yield _object(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: no JSON ({error!s:.80}). {_LINES}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: no JSON object, but {line.strip()[:40]!r}. {_LINES}")
    return row


def _paired(task: str, a: Path, b: Path, metric: str | None, cluster: str | None) -> Paired:
    names = [_metrics(path) for path in (a, b)]
    asked, _, asked_filter = (metric or "").partition(",")
    shared = [name for name in names[0] if name in names[1]]
    if not shared:
        raise ConfigError(f"{a} and {b} share no metric: {', '.join(names[0])} against {', '.join(names[1])}.")
    if asked and asked not in shared:
        raise unknown(f"metric of {a} and {b}", asked, shared)
    chosen = asked or next((name for name in shared if name not in _PAIRS), shared[0])
    if chosen in _PAIRS:
        raise ConfigError(
            f"{a} and {b}: {chosen} is a metric of the whole task; what is logged of an item is no outcome of its own. "
            f"Name another: --metric. Both have: {', '.join(shared)}."
        )
    first, second = (_read(path, chosen, asked_filter or None, cluster) for path in (a, b))
    if not asked_filter and (both := [name for name in first.filters if name in second.filters]):
        first, second = (
            log if log.filter == both[0] else _read(path, chosen, both[0], cluster)
            for log, path in ((first, a), (second, b))
        )
    if first.filter != second.filter:
        raise ConfigError(
            f"{a} and {b} share no filter: {', '.join(first.filters) or 'none'} against "
            f"{', '.join(second.filters) or 'none'}. Apply the same filters to both."
        )
    _require_same_items(a, b, first.items, second.items)
    owners = [(name, item) for name, item in first.items.items() for _ in item.scores]
    ids = tuple(f"{name}[{at}]" if len(item.scores) > 1 else name
                for name, item in first.items.items() for at in range(len(item.scores)))  # fmt: skip
    ours = np.array([score for item in first.items.values() for score in item.scores])
    theirs = np.array([score for name in first.items for score in second.items[name].scores])
    least, most = sorted(float(np.abs(scores).max()) for scores in (ours, theirs))
    if 0 < least <= 1 and most >= _OTHER_SCALE * least:
        raise ConfigError(
            f"{a} and {b}: {chosen} goes up to {np.abs(ours).max():g} in the one and to {np.abs(theirs).max():g} in "
            "the other; give both on one scale, shares or per cents."
        )
    if most > 1:
        ours, theirs = ours / 100, theirs / 100
    higher = _higher_is_better(a, chosen)
    clusters = tuple(item.cluster or name for name, item in owners)
    subjects = tuple(item.subject for _, item in owners if item.subject is not None) or None
    grouping = Grouping(clusters, subjects)
    stratum = Stratum.of(theirs - ours if higher else ours - theirs, *grouping)
    shown = f"{chosen},{first.filter}" if first.filter else chosen
    return Paired(task, shown, higher, grouping.mean(ours), grouping.mean(theirs), stratum, ids)


def _metrics(path: Path) -> list[str]:
    """Return the names of a log's metrics, by its first line."""
    row = next(_rows(path), None)
    if row is None:
        raise ConfigError(f"{path}: the file has no lines.")
    if isinstance(row.get("metrics"), list) and "doc_id" in row:
        return [str(name) for name in row["metrics"]]
    if "outcome" in row:
        return [str(_summary(path.parent).get("metric", "outcome"))]
    if "id" in row:
        found = [name for name, value in row.items() if name != "id" and isinstance(value, bool | int | float)]
        if found := ["score"] * ("score" in row) + [name for name in found if name != "score"]:
            return found
    raise ConfigError(
        f"{path}: neither a sample log of lm-eval (doc_id, metrics), nor items of this project (item, outcome), nor "
        f"JSONL with id and score; its first line has: {', '.join(row)}."
    )


def _read(path: Path, metric: str, asked_filter: str | None, cluster: str | None) -> _Log:
    items: dict[str, _Item] = {}
    filters: dict[str, None] = {}
    for row in _rows(path):
        if name := str(row.get("filter") or ""):
            filters[name] = None
            if name != (asked_filter or next(iter(filters))):
                continue
        field = next((key for key in ("item", "doc_id", "id") if key in row), None)
        if field is None:
            raise ConfigError(f"{path}: a line without id, after {len(items)} items; it has: {', '.join(row)}.")
        item = str(row[field])
        if item in items:
            raise ConfigError(f"{path}: item {item} is there twice; every item counts once. Give one run's log.")
        ours = field == "item"
        grouped_by = cluster or ("cluster" if ours and "cluster" in row else None)
        items[item] = _Item(
            scores=_scores(path, item, row, "outcome" if ours and metric not in row else metric),
            hashes=tuple(row.get(name) for name in _HASHES),
            cluster=_cluster(path, item, row, grouped_by) if grouped_by else None,
            subject=str(row["subject"]) if ours and "subject" in row else None,
        )
    if not items:
        raise unknown(f"filter of {path}", asked_filter or "", filters)
    return _Log(items, asked_filter or next(iter(filters), None), list(filters))


def _scores(path: Path, item: str, row: Mapping[str, Any], metric: str) -> tuple[float, ...]:
    value = row.get(metric)
    values = value if isinstance(value, list) and value else [value]
    if not all(isinstance(one, bool | int | float) and abs(one) <= _MOST for one in values):
        raise ConfigError(f"{path}: {metric} of item {item} is {value!r:.60}; valid: a number, or a list of them.")
    return tuple(map(float, values))


def _cluster(path: Path, item: str, row: Mapping[str, Any], field: str) -> str:
    doc = row.get("doc")
    inner = doc if isinstance(doc, dict) else {}
    if field not in row and field not in inner:
        raise ConfigError(f"{path}: --cluster: item {item} has no field {field}. Valid: {', '.join({**inner, **row})}.")
    return json.dumps(row[field] if field in row else inner[field], sort_keys=True)


def _higher_is_better(path: Path, metric: str) -> bool:
    """Read which way a metric is better from what lies beside the log: lm-eval's results, or our summary."""
    if path.name == "items.jsonl":
        return bool(_summary(path.parent).get("higher_is_better", True))
    named = _NAME.fullmatch(path.name)
    results = path.with_name(f"results_{named['time']}.json") if named else None
    if named is None or results is None or not results.is_file():
        return metric not in _LESS
    told: Any = next(_rows(results, whole=True), {})
    for key in ("higher_is_better", named["task"], metric):
        told = told.get(key) if isinstance(told, dict) else None
    return told is not False if isinstance(told, bool) else metric not in _LESS


def _require_same_items(a: Path, b: Path, ours: Mapping[str, _Item], theirs: Mapping[str, _Item]) -> None:
    odd = [name for name in (*ours, *theirs) if (name in ours) != (name in theirs)]
    if odd:
        raise ConfigError(
            f"{a} and {b} are not on the same items: {len(ours):,} against {len(theirs):,}, and "
            f"{len(odd):,} are in one of them only, first {odd[0]}. Evaluate both with the same task and limit."
        )
    pairs = {name: (item, theirs[name]) for name, item in ours.items()}
    for at, what in enumerate(_HASHES.values()):
        hashes = {name: (one.hashes[at], other.hashes[at]) for name, (one, other) in pairs.items()}
        other = [name for name, both in hashes.items() if None not in both and both[0] != both[1]]
        if other:
            raise ConfigError(
                f"{a} and {b}: item {other[0]} (and {len(other) - 1:,} more) has another {what}. Evaluate "
                "both with the same version of the task, examples and chat template."
            )
    uneven = next((name for name, (one, other) in pairs.items() if len(one.scores) != len(other.scores)), None)
    if uneven is not None:
        raise ConfigError(f"{a} and {b}: item {uneven} has another number of scores.")
    if any(one.cluster and one.cluster != other.cluster for one, other in pairs.values()):
        raise ConfigError(f"{a} and {b}: --cluster: the two put the same items into other groups.")


def flipped(pairs: Sequence[Paired]) -> tuple[list[str], list[str]]:
    """Return the ids of the items on which B is better than A, and worse; of several tasks with the task's name."""
    won: list[str] = []
    lost: list[str] = []
    for pair in pairs:
        prefix = f"{pair.task}/" if len(pairs) > 1 else ""
        for item, difference in zip(pair.ids, pair.stratum.differences.ravel(), strict=True):
            if difference:
                (won if difference > 0 else lost).append(prefix + item)
    return won, lost

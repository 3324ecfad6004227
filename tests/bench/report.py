"""The measurements of `mask_step` as ratios against the bars, as a table, and with the machine that they hold for."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import psutil
import torch

from mft_core.store import provenance

SLOWER_THAN_FLOOR = 1.08
FASTER_THAN_SORTING = 1.7
_SCORES_AND_STATES = 3 * 4
"""bytes per masked weight: the score and AdamW's two moments, float32"""
_TITLES = {
    "dense": "dense floor: the layers' weights trained, no mask",
    "mask": "mask step (`MaskTuner`)",
    "sorting": "published way: scores sorted in every forward pass",
}


def describe_machine(device: str) -> dict[str, Any]:
    """Return what the times depend on besides the configuration."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        **provenance.describe(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def summarise(measured: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Add tokens per second, the ratios with their ranges, and the bars, to what was measured.

    Args:
        measured: `config`, `machine`, and `seconds` and `peaks` as `mask_step.measure` returns them.
        tokens: of one micro-batch.
    """
    seconds = measured["seconds"]["wall"]
    speeds = {
        accumulation: {name: int(accumulation) * tokens / statistics.median(took) for name, took in of.items()}
        for accumulation, of in seconds.items()
    }
    masked = measured["config"]["masked_weights"]
    tensors = {name: peaks["tensors"] for name, peaks in measured["peaks"].items()}
    added = tensors["mask"] - tensors["dense"]
    allowed = masked * (_SCORES_AND_STATES + measured["config"]["bytes_per_weight"])
    bars = [
        _time_bar("8", measured["seconds"]),
        *(_speed_bar(accumulation, measured["seconds"]) for accumulation in seconds),
        {
            "what": "memory of mask learning on top of the floor, MB (bar: scores + states + one copy)",
            "value": added / 1e6,
            "bar": f"<= {allowed / 1e6:,.0f}",
            "held": added <= allowed,
        },
    ]
    return {**measured, "tokens_per_second": speeds, "bars": bars}


_Seconds = dict[str, dict[str, dict[str, list[float]]]]


def _time_bar(accumulation: str, seconds: _Seconds) -> dict[str, Any]:
    ratio = _ratio(seconds, accumulation, "mask", "dense")
    what = f"time of an optimizer step, mask / dense floor, accumulation {accumulation}"
    return {"what": what, **ratio, "bar": f"<= {SLOWER_THAN_FLOOR}", "held": ratio["value"] <= SLOWER_THAN_FLOOR}


def _speed_bar(accumulation: str, seconds: _Seconds) -> dict[str, Any]:
    ratio = _ratio(seconds, accumulation, "sorting", "mask")
    what = f"tokens per second, mask / sorting, accumulation {accumulation}"
    return {"what": what, **ratio, "bar": f">= {FASTER_THAN_SORTING}", "held": ratio["value"] >= FASTER_THAN_SORTING}


def _ratio(seconds: _Seconds, accumulation: str, above: str, below: str) -> dict[str, Any]:
    """Return median and range over the rounds of one variant's time divided by another's."""
    by_clock = {
        clock: [a / b for a, b in zip(of[accumulation][above], of[accumulation][below], strict=True)]
        for clock, of in seconds.items()
    }
    ratios = by_clock["wall"]
    return {
        "value": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "n": len(ratios),
        "by_processor_time": statistics.median(by_clock["processor"]),
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    config, machine = result["config"], result["machine"]
    seconds = result["seconds"]["wall"]
    head = ["", *(f"{what}, accumulation {a}" for a in seconds for what in ("tokens/s", "s per optimizer step"))]
    rows = [[*head, "peak of tensors, MB", "peak of the process, MB"]]
    for name, peaks in result["peaks"].items():
        row = [_TITLES[name]]
        for accumulation, of in seconds.items():
            row.append(f"{result['tokens_per_second'][accumulation][name]:,.0f}")
            row.append(f"{statistics.median(of[name]):.3g} [{min(of[name]):.3g}, {max(of[name]):.3g}]")
        rows.append([*row, *(f"{peaks[what] / 1e6:,.0f}" for what in ("tensors", "process"))])
    bars = [["", "median", "range of the rounds", "by processor time", "bar", ""], *map(_bar_row, result["bars"])]
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads of {machine['cores']} cores"
    commit = f"{machine['git_commit']}{' with changes' if machine['git_dirty'] else ''}"
    about = (
        f"{config['geometry']} geometry, random weights, {config['precision']}; layers {config['layers']} masked at "
        f"{config['sparsity']:.0%} ({config['masked_weights']:,} weights); micro-batch {config['micro_batch']} tokens; "
        f"{config['rounds']} rounds of {config['steps_per_round']} optimizer steps"
        f"{'' if config['together'] else ', one variant after the other, for want of memory'}. {where}; torch "
        f"{machine['packages']['torch']}, transformers {machine['packages']['transformers']}; commit {commit}."
    )
    return f"{about}\n\n{markdown(rows)}\n\n{markdown(bars)}\n"


def _bar_row(bar: dict[str, Any]) -> list[str]:
    held = "held" if bar["held"] else "MISSED"
    if "n" not in bar:
        return [bar["what"], f"{bar['value']:,.0f}", "counted exactly", "", bar["bar"], held]
    span = f"{bar['low']:.2f}-{bar['high']:.2f} (n = {bar['n']})"
    return [bar["what"], f"{bar['value']:.2f}", span, f"{bar['by_processor_time']:.2f}", bar["bar"], held]


def write(folder: Path, name: str, result: dict[str, Any], table: str) -> None:
    """Keep a measurement as `name`.json and its table as `name`.md, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nwritten: {folder / name}.json, {folder / name}.md", flush=True)


def markdown(rows: list[list[str]]) -> str:
    """Return rows, of which the first is the head, as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])

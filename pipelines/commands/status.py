"""What runs under this `MFT_HOME`, how far it is, and what became of what has run; called by `mft status`."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

from mft_core.names import printable
from pipelines.servers.runs import Entry


def text(entries: list[Entry], home: Path) -> str:
    """Return entries for people."""
    if not entries:
        return f"nothing runs or has run lately under MFT_HOME = {home.absolute()}"
    return printable("\n".join(line for entry in entries for line in _lines(entry)))


def _lines(entry: Entry) -> list[str]:
    since = _span((time.time() if entry["state"] == "running" else entry.get("ended", 0)) - entry["started"])
    lines = [f"{entry['state']:<8}  {entry['command']}"]
    if entry["state"] != "running":
        when = f"{_span(entry['silent'])} ago"
        lines += [f"    ended {when}" if "ended" in entry else f"    last heard of {when}"]
        lines += [f"    {line}" for line in entry.get("reason", "").splitlines()]
        return [*lines, f"    log {entry['log']}"]
    stages = f"{entry['done']} of {entry['total']} stages ({entry['cached']} cached)"
    lines.append(f"    process {entry['pid']} on {entry['host']}, for {since}: {stages}{_left(entry['seconds_left'])}")
    for stage in entry["stages"]:
        step = f"step {stage['step']} of {stage['total']}" if stage["total"] else "begun"
        lines.append(f"    {stage['label']}: {step}  {stage['detail']}{_left(stage['seconds_left'])}")
    if entry["latest"]:
        lines.append(f"    latest: {entry['latest'].splitlines()[0]}")
    return [*lines, f"    log {entry['log']}"]


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", about {_span(seconds)} left"


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(max(seconds, 0))))

"""Artifacts of earlier versions that are wrong by a fault mended since, or lack what is read of them now.

A key says what was asked, so it stays; what is told here is computed again under it, and since inputs count by their
content, only what was made of it gets another key. Told is only what a manifest, its payload or the inputs show; what
is right stays as it is. Asked by `mft_core.store.artifacts`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Payload = Callable[[str], bytes | None]
"""returns one file of an artifact's payload, or None where it has no such file"""

_SEVERAL = re.compile(r"^repeats:\s*([2-9]|\d{2})", re.MULTILINE)


def outdated(manifest: Mapping[str, Any], payload: Payload, given: Callable[[str], Path | None]) -> str | None:
    """Say in what a whole artifact is wrong, or None.

    Args:
        payload: that which the manifest describes.
        given: returns where an input lies, or None where there is none of that name.
    """
    if manifest["stage"] == "prepare-data":
        summary = manifest["summary"]
        if summary.get("cut") and "turns_left_out" not in summary:
            return f"an earlier version cut the last turn of {summary['cut']} rows in its middle"
    elif manifest["stage"] == "evaluate":  # versions are told by what they had not yet in their recipe
        wrong = None if "allow_code" in manifest["recipe"] else _evaluated_wrongly(manifest, payload, given)
        return wrong or (None if "answered_together" in manifest["recipe"] else _answers_dropped(payload, given))
    elif manifest["stage"] == "compare" and manifest["recipe"].get("contest"):
        winners = payload("winners.json")
        if winners is not None and b'"sentence"' not in winners:
            return "an earlier version did not say what can be told of the contest's winner"
    return None


def _evaluated_wrongly(
    manifest: Mapping[str, Any], payload: Payload, given: Callable[[str], Path | None]
) -> str | None:
    if b'"target": "None"' in (payload("items.jsonl") or b""):
        return "an earlier version scored items without an answer"
    model = given("model") if manifest["recipe"]["apply_chat_template"] else None
    if model is None:
        return None
    settings, tokenizer = (_read(model / name) for name in ("tokenizer_config.json", "tokenizer.json"))
    if settings.get("add_bos_token") or _adds(tokenizer.get("post_processor")):
        return "an earlier version put a token before the prompts that the training had not"
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    file = given("chat_template") or model / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else str(settings.get("chat_template"))
    if "eos_token" not in template and not (end and end in template):
        return "an earlier version did not stop answers at the end of turn of the chat template"
    return None


def _answers_dropped(payload: Payload, given: Callable[[str], Path | None]) -> str | None:
    """Look whether a task asked for several answers to a prompt, where each item has one."""
    folder = given("benchmark")
    if folder is None:
        return None
    several = any(_SEVERAL.search(path.read_text(encoding="utf-8")) for path in folder.glob("*.y*ml"))
    items = payload("items.jsonl") if several else None
    if items is not None and b'"response": [' not in items:
        return "an earlier version scored the first of several sampled answers alone"
    return None


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _adds(processor: Any) -> bool:
    """Say whether what a tokenizer does after the splitting puts tokens of its own into a text."""
    kind = processor["type"] if processor else "None"
    if kind == "Sequence":
        return any(map(_adds, processor["processors"]))
    if kind == "TemplateProcessing":
        return any("SpecialToken" in piece for piece in processor["single"])
    return kind in ("BertProcessing", "RobertaProcessing")

"""What the paper shows before a question of GSM8K, and what it takes for the answer.

Used by lm-eval through `paper_gsm8k.yaml`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml

_COMMA = re.compile(r"(?<=\d),(?=\d)")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


def examples() -> list[dict[str, str]]:
    """Return the eight worked examples that lm-eval has too, whose answers begin with "So"."""
    text = (Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k-cot.yaml").read_text(encoding="utf-8")
    known = yaml.safe_load(text)["fewshot_config"]["samples"]
    return [{**one, "target": one["target"].replace("The answer is", "So the answer is")} for one in known]


def last_number(answer: str) -> str:
    """Return the last number, without commas; a whole one without its sign, as the paper has it; else the answer."""
    answer = _COMMA.sub("", answer)
    return next(reversed(_NUMBER.findall(answer)), answer)


def last_numbers(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Apply `last_number` to the answers of all items."""
    return [[last_number(answer) for answer in answers] for answers in resps]


def target(doc: dict[str, Any]) -> str:
    """Return a worked example's solution, or an item's answer."""
    return str(doc["target"]) if "target" in doc else last_number(doc["answer"].rpartition("####")[2].strip())

"""What the paper shows before a problem of MATH, and which of a completion's answers it takes.

Used by lm-eval through `paper_math_subject.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lm_eval.tasks.hendrycks_math import utils as hendrycks
from lm_eval.tasks.minerva_math import utils as minerva


def examples() -> list[dict[str, str]]:
    """Return minerva's four worked examples with the paper's slips: a stray brace, and LaTeX's line ends by half."""
    first, *others = minerva.list_fewshot_samples()
    shown = [{**first, "problem": first["problem"] + "}"}, *others]
    return [{key: text.replace("\\\\\n", "\\\n") for key, text in one.items()} for one in shown]


def readings(answer: str) -> Iterator[str]:
    """Yield what may be meant: after "the final answer is", the last box; else within the last dollars, else all."""
    found = []
    stated = minerva.normalize_final_answer(minerva.get_unnormalized_answer(answer))
    if stated != "[invalidanswer]":
        found.append(stated)
    if (box := _boxed(answer)) is not None:
        found.append(minerva.normalize_final_answer(box))
    if not found:
        between = answer.split("$")
        found.append(minerva.normalize_final_answer(between[-2] if len(between) > 2 else answer))
    yield from found


def _boxed(text: str) -> str | None:
    box = minerva.last_boxed_only_string(text)
    try:
        return None if box is None else str(minerva.remove_boxed(box))
    except AssertionError:
        return None


def score(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Say whether a reading of the completion is the answer, as SymPy or as text."""
    gold = minerva.normalize_final_answer(_boxed(doc["solution"]))
    right = any(minerva.is_equiv(one, gold) or hendrycks.is_equiv(one, gold) for one in readings(results[0]))
    return {"flexible_match": int(right)}

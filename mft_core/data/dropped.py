"""What becomes of a mixture's rows before anything is trained on them, put into words for people.

From the summary of a `prepare-data` artifact alone, so that the console, the report and MLflow say the same, of cached
data too; the stage itself refuses with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mft_core.errors import ConfigError


def row(summary: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers as columns of a table."""
    return {
        "rows": sum(summary["rows"]),
        "duplicates": summary["duplicates_removed"],
        "benchmark_questions": sum(summary["benchmark_overlaps_removed"].values()),
        "too_long": summary["too_long"],
        "cut": summary["cut"],
        "left_out_by_fraction": summary["left_out_by_fraction"],
        "validation": summary["validation"]["examples"],
        "training": summary["train"]["examples"],
    }


def told(summary: Mapping[str, Any]) -> str | None:
    """Say how many rows were dropped and why, how many lost turns, and which were no messages; None where none."""
    rows = sum(summary["rows"])
    counts = {
        "there twice": summary["duplicates_removed"],
        "equal to a benchmark's question": summary["benchmark_overlaps_removed"]["equal_question"],
        "that hold much of one (data.overlap)": summary["benchmark_overlaps_removed"]["shared_13_words"],
        "too long to keep an answer": summary["too_long"],
    }
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
    lost = sum(counts.values())
    parts = [f"{lost:,} of {rows:,} rows ({lost / rows:.0%}) were dropped: {reasons}"] if lost else []
    if summary["cut"]:
        turns = summary["turns_left_out"]
        parts.append(f"{summary['cut']:,} lost {turns:,} answers at their end, which do not fit into max_length")
    if others := summary.get("shapes"):
        read = ", ".join(f"{count:,} are {shape}" for shape, count in others.items())
        parts.append(f"of the rows read, {read}; each is taken as the messages that it stands for")
    return "; ".join(parts) or None


def check_dropped(summary: Mapping[str, Any], allowed: float) -> None:
    """Refuse to go on with a small rest of the data; what is there twice or must not be trained on is no loss.

    Args:
        allowed: share of the rows that may be too long (`runtime.max_dropped`).

    Raises:
        ConfigError: more are.
    """
    if summary["too_long"] > allowed * sum(summary["rows"]):
        raise ConfigError(
            f"data: {told(summary)}, and runtime.max_dropped = {allowed:g} allows for {allowed:.0%} too long. Set a "
            "larger data.max_length or give other data; or, if it is meant so, a larger runtime.max_dropped."
        )

"""`mft compare A B`: is model B better than model A on the items that both have answered? No model, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mft_core.errors import ConfigError
from mft_core.evaluation.sample_logs import flipped, read_pairs
from mft_core.names import printable
from mft_core.statistics.effects import estimate
from mft_core.statistics.verdicts import sentence, verdict

_EXIT_CODES = {"better": 0, "equivalent": 0, "worse": 1, "undecided": 3}
_SHOWN = 20
"""ids of flipped items that are printed of each kind; --json has all"""


def compare(a: Path, b: Path, margin: float, metric: str | None, cluster: str | None, as_json: bool) -> int:
    """Print the paired gain of B over A with its interval, verdict and flipped items.

    Returns:
        the exit code: 0 not worse, 1 worse, 3 undecided.

    Raises:
        ConfigError: the two cannot be paired, or the margin is none.
    """
    if not 0 < margin < 100:
        raise ConfigError(
            f"--margin {margin}: give percentage points above 0 and below 100, such as 1.0 (of scores beyond 1: units)."
        )
    pairs = read_pairs(a, b, metric, cluster)
    found = estimate([pair.stratum for pair in pairs])
    word = verdict(found, margin / 100)
    won, lost = flipped(pairs)
    told: dict[str, Any] = {
        "a": str(a),
        "b": str(b),
        "tasks": {pair.task: pair.metric for pair in pairs},
        "n": sum(len(pair.ids) for pair in pairs),
        "accuracy_a": float(np.mean([pair.baseline for pair in pairs])),
        "accuracy_b": float(np.mean([pair.treatment for pair in pairs])),
        "gain": float(found.gain),
        "gain_low": float(found.low),
        "gain_high": float(found.high),
        "p_value": float(found.p_value),
        "p_equivalence": float(found.p_equivalence(margin / 100)),
        "margin": margin / 100,
        "detectable": float(found.detectable),
        "verdict": word,
        "sentence": sentence(found, word, margin / 100),
        "won": won,
        "lost": lost,
    }
    if as_json:
        print(json.dumps(told, indent=2))
        return _EXIT_CODES[word]
    gain, low, high = (100 * share for share in (found.gain, found.low, found.high))
    tasks = "; ".join(
        f"{pair.task} ({pair.metric}{'' if pair.higher_is_better else ', less is better'})" for pair in pairs
    )
    lines = [
        f"A: {a}: {100 * told['accuracy_a']:.1f}",
        f"B: {b}: {100 * told['accuracy_b']:.1f}",
        f"{tasks}: {told['n']:,} items" + (", mean over the tasks" if len(pairs) > 1 else ""),
        f"B over A: {gain:+.1f} points [{low:+.1f}, {high:+.1f}], p = {found.p_value:.2g}: {word} "
        f"({told['sentence']}; margin {margin:g})",
        f"smallest gain that these items would show with 80% power: {100 * found.detectable:.1f} points",
        *(_ids(name, ids) for name, ids in (("better", won), ("worse", lost))),
    ]
    print("\n".join(printable(line) for line in lines))
    return _EXIT_CODES[word]


def _ids(name: str, ids: list[str]) -> str:
    more = f", … ({len(ids) - _SHOWN:,} more: --json)" if len(ids) > _SHOWN else ""
    return f"B {name} on {len(ids):,} items" + (f": {', '.join(ids[:_SHOWN])}{more}" if ids else "")

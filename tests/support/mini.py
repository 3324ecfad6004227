"""A profile that trains in seconds: a random 4-layer Llama, 60 rows, one local benchmark; and a study that fits it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mft_core.methods import METHODS
from tests.support.tiny import save_checkpoint

PLAIN_METHODS = [name for name in METHODS if name != "existing"]
"""those that need nothing that the user has made before"""
TRAINING = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 8, "validations": 2, "keep": "best"}


def row(question: str, answer: str) -> dict[str, Any]:
    """Return one training row."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


def write_profile(folder: Path, **changes: Any) -> Path:
    """Write model, data, benchmark and the profile `mini.yaml` into `folder`; returns the profile's path.

    Args:
        changes: replaces keys of the profile's `defaults`, e.g. `mask={...}`.
    """
    save_checkpoint(folder / "model")
    write_rows(folder / "data" / "sums.jsonl", [row(f"{a} + {b} =", str(a + b)) for a in range(10) for b in range(6)])
    items = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(20, 26) for b in range(5)]
    write_rows(folder / "benchmarks" / "sums.jsonl", items)
    task = {
        "task": "mini_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "benchmarks" / "sums.yaml").write_text(yaml.safe_dump(task))
    defaults = {
        "model": {"path": "model"},
        "data": {"max_length": 64, "validation_rows": 8, "mixture": [{"path": "data/sums.jsonl"}]},
        "fine_tune": TRAINING,
        "continued": TRAINING,
        "lora": {"rank": 4, "training": TRAINING},
        "mask": {"sparsity": 0.1, "layers": "1-2", "calibration_rows": 16, "training": TRAINING},
        "benchmarks": [{"name": "sums", "task": "mini_sums", "path": "benchmarks"}],
        **changes,
    }
    profile = {"default_domain": "sums", "defaults": defaults, "domains": {"sums": {}}, "runtime": {"threads": 1}}
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(profile))
    return path


def write_study(
    folder: Path, variants: list[dict[str, Any]] | None = None, seeds: tuple[int, ...] = (0,), **further: Any
) -> Path:
    """Write a study of every method and returns its path."""
    default: list[dict[str, Any]] = [{"method": name} for name in PLAIN_METHODS]
    next(item for item in default if item["method"] == "mft")["grid"] = {"mask.sparsity": [0.1, 0.3]}
    path = folder / "mini-study.yaml"
    study = {"question": "Does it run?", "seeds": list(seeds), "variants": variants or default, **further}
    path.write_text(yaml.safe_dump(study))
    return path

"""What of a chain is to the bit between two machines, or two numbers of threads, and by how much the rest differs.

`python -m tests.bench.reproduce measure A.json --threads 1` computes a short chain of the profile `tiny` (an epoch of
fine-tuning, of a mask of its result, and of a mask of the shipped base, with controls) in a directory of its own, and
writes what it made; `python -m tests.bench.reproduce compare A.json B.json` sets two such files side by side. The table
in README, "What is to the bit", is made of it.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from mft_core.cache_key import digest
from mft_core.recipes import Runtime
from mft_core.stages import STAGES
from mft_core.statistics.comparison import Outcomes, compare, pair
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from pipelines.config.by_name import FOLDERS
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.graph.nodes import Edge, closure
from pipelines.plan.analyses import answers
from pipelines.plan.plan import make_plan
from tests.bench.report import describe_machine

SETTINGS = [
    "fine_tune.epochs=1",
    "mask.training.epochs=1",
    "benchmarks="
    + json.dumps(
        [
            {
                "name": "arithmetic",
                "task": "tiny_arithmetic",
                "path": f"{FOLDERS['profile']}/tiny/benchmarks",
                "limit": 1000,
            }
        ]
    ),
]
STUDY = {
    "question": "What is to the bit?",
    "seeds": [0],
    "variants": [{"method": name} for name in ("fft", "mft", "mft-base", "random", "magnitude")],
}
SAMPLED = 4096
"""weights of a model that are kept, at even distances"""


def measure(threads: int, settings: list[str] = SETTINGS) -> dict[str, Any]:
    """Compute the chain, and return by stage what it made."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        study = home / "reproduce.yaml"
        study.write_text(yaml.safe_dump(STUDY))
        store, runtime = ArtifactStore(home / "home"), Runtime(threads=threads, eval_batch_size=128)
        plan = make_plan(load_study(str(study)), load_profile("tiny"), store, settings)
        made: dict[str, ArtifactRef] = {}
        stages: dict[str, dict[str, Any]] = {}
        for node in closure(answers(plan)):
            inputs = {
                name: made[of.node.id].at(of.part) if isinstance(of, Edge) else of for name, of in node.inputs.items()
            }
            built = store.build(STAGES[node.stage], node.recipe, inputs, runtime)
            made[node.id] = built.ref
            found = _told(store.directory(node.stage, built.ref.key), built.manifest["summary"])
            stages[node.label] = {"stage": node.stage, "id": node.id, **found}
            print(f"{node.label}: {built.manifest['provenance']['seconds']:.1f} s", file=sys.stderr)
    machine = describe_machine("cpu") | {"threads": threads}
    return {"machine": machine, "stages": stages, "statistics": _statistics()}


def _told(directory: Path, summary: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (directory / "train.safetensors").is_file():
        tensors = load_file(directory / "train.safetensors")
        found["data"] = digest({name: _coded(tensor) for name, tensor in sorted(tensors.items())})
    if (directory / "mask").is_dir():
        found["mask"] = _coded(load_file(directory / "mask/mask.safetensors")["kept"])
    if (directory / "model").is_dir():
        weights = load_file(directory / "model/model.safetensors")
        flat = np.concatenate([weights[name].ravel() for name in sorted(weights)]).astype(np.float32)
        found["weights"] = _coded(flat[:: len(flat) // SAMPLED])
        found["weights_digest"] = digest(_coded(flat))
    if "validation_losses" in summary:
        found["validation_loss"] = summary["validation_losses"][str(summary["kept_step"])]
    if (directory / "items.jsonl").is_file():
        rows = [json.loads(line) for line in (directory / "items.jsonl").open(encoding="utf-8")]
        found["outcomes"] = "".join(str(int(row["outcome"])) for row in rows)
    return found


def _coded(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _statistics() -> str:
    """Return the digest of a comparison of made-up outcomes."""
    draws = np.random.default_rng(0).random((2, 600)) < [[0.6], [0.62]]
    items = tuple(f"made-up/{index}" for index in range(600))
    sides = [
        Outcomes(label=name, benchmark="made-up", metric="exact_match", items=items, values=values.astype(float))
        for name, values in zip(("before", "after"), draws, strict=True)
    ]
    return digest(repr(compare([[pair([sides[0]], [sides[1]])]])))


def lines(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return the differences as rows of a Markdown table."""
    found = ["| stage | what | difference |", "| --- | --- | --- |"]
    for label, one in ours["stages"].items():
        other = theirs["stages"][label]
        told = {"key": "equal" if one["id"] == other["id"] else "DIFFERENT"}
        if "data" in one:
            told["tokens"] = _equal(one["data"] == other["data"])
        if "weights" in one:
            first, second = (np.frombuffer(base64.b64decode(side["weights"]), np.float32) for side in (one, other))
            apart = np.abs(first - second)
            same = one["weights_digest"] == other["weights_digest"]
            told["weights"] = _equal(same, f"most {apart.max():.1e}, mean {apart.mean():.1e} (rms {first.std():.2f})")
        if "mask" in one:
            first, second = (
                np.unpackbits(np.frombuffer(base64.b64decode(side["mask"]), np.uint8)) for side in (one, other)
            )
            removed, both = (first == 0).sum(), ((first == 0) & (second == 0)).sum()
            told["removed by both"] = _equal(one["mask"] == other["mask"], f"{both / removed:.2%}")
        if "validation_loss" in one:
            apart = abs(one["validation_loss"] - other["validation_loss"])
            told["validation loss"] = _equal(apart == 0, f"{apart:.1e} of {one['validation_loss']:.4f}")
        if "outcomes" in one:
            pairs = list(zip(one["outcomes"], other["outcomes"], strict=True))
            gain = 100 * (sum(b == "1" for _, b in pairs) - sum(a == "1" for a, _ in pairs)) / len(pairs)
            flips = sum(a != b for a, b in pairs)
            told["outcomes"] = _equal(flips == 0, f"{flips} of {len(pairs)} flipped, accuracy {gain:+.2f} points")
        found += [f"| {label} | {what} | {said} |" for what, said in told.items() if said != "equal"]
    return [*found, f"| statistics | of made-up outcomes | {_equal(ours['statistics'] == theirs['statistics'])} |"]


def _equal(same: bool, otherwise: str = "DIFFERENT") -> str:
    return "to the bit" if same else otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure")
    measured.add_argument("out", type=Path)
    measured.add_argument("--threads", type=int, default=1)
    compared = commands.add_parser("compare")
    compared.add_argument("files", type=Path, nargs=2)
    asked = parser.parse_args()
    if asked.command == "measure":
        asked.out.write_text(json.dumps(measure(asked.threads), indent=1))
        return
    ours, theirs = (json.loads(path.read_text()) for path in asked.files)
    for side in (ours, theirs):
        machine = side["machine"]
        print(f"- {machine['processor']}, {machine['threads']} threads, {machine['packages']}")
    print("\n".join(["", *lines(ours, theirs)]))


if __name__ == "__main__":
    main()

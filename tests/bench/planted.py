"""Positive control: does the chain find a gain that is known to be there, and none where there is none?

    python -m tests.bench.planted [--runs 20] [--processes 16] [--kinds planted,nothing,rewinding] [--home DIR]

Each run fine-tunes `tiny` with a seed of its own, damages that model, and gives it to a study as a user gives a
checkpoint (no `fine_tune`):

- *planted*: one weight in each attention output and each MLP output of the masked layers, at a random place, is made so
  large that accuracy falls by 4 points. MFT has to win them back, by removing these 8 weights or by what else it
  removes, and the verdict on `mft - fft` has to be *better*.
- *nothing*: the same without damage. A verdict is about one checkpoint, and a mask may really help it (of the five
  fine-tunings of `sparsity` on `tiny`, MFT at 2% helps the fifth, +4.1 [+3.3, +4.8]). So where it says *better*, both
  models answer the benchmarks' other items, which the study did not have: *better* is an error if these do not bear
  it out (`elsewhere`: gain and 95% interval).
- *rewinding*: noise is added to all weights of the masked layers until the model that stands as the base is 4 points
  better. Removing weights cannot undo that, rewinding can: `rewind` has to be better than both.

The size of the damage is found by bisection on the benchmarks' own items, so that the gain is 4 points on what the
study measures; no training sees them. A study is planned and its stages are run as `mft run` does, but in this process:
neither Prefect nor MLflow is needed. Prints a line a run, then the counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from mft_core.draws import seeded_generator
from mft_core.evaluation.lm_eval_harness import evaluate
from mft_core.evaluation.outcomes import Evaluation
from mft_core.masks.mask_file import load_mask
from mft_core.recipes import Evaluate, Runtime
from mft_core.stages import get_stage
from mft_core.store.artifacts import ArtifactRef, ArtifactStore
from pipelines.config.by_name import FOLDERS
from pipelines.config.profile import load_profile
from pipelines.config.study import Study, load_study
from pipelines.graph.nodes import Edge, Node, closure
from pipelines.plan.plan import Plan, comparison_node, make_plan

HERE = Path(__file__).parent
POINTS = 4.0
LAYERS = range(2, 6)
ITEMS = 800
"""of each benchmark"""
BENCHMARKS = [
    {"name": name, "task": f"tiny_{name}", "path": str(FOLDERS["profile"] / "tiny" / "benchmarks"), "limit": ITEMS}
    for name in ("arithmetic", "number_theory", "symbols")
]
SETTINGS = {"sparsity": 0.005}
"""of the mask: more than the damage, since the entries of least score include some that learning left near zero; and
little, so that an undamaged model has little to gain"""
REWINDING = {"sparsity": 0.8}
KINDS = {"planted": "planted.yaml", "nothing": "planted.yaml", "rewinding": "rewinding.yaml"}
Damage = Callable[[Mapping[str, Tensor], float, int], dict[str, Tensor]]


def made_of(last: Node, plan: Plan, store: ArtifactStore) -> Path:
    """Run a stage of a plan and all that it needs, one after the other; returns its artifact's directory."""
    made: dict[str, ArtifactRef] = {}
    for node in closure([last]):
        inputs = {
            name: made[given.node.id].at(given.part) if isinstance(given, Edge) else given
            for name, given in node.inputs.items()
        }
        made[node.id] = store.build(get_stage(node.stage), node.recipe, inputs, plan.runtime).ref
    return store.directory(last.stage, made[last.id].key)


def fine_tuned(home: Path, seed: int) -> Path:
    """Fine-tune `tiny` with that seed; returns the checkpoint's directory."""
    study = Study.model_validate(
        {"name": "fine-tuning", "question": "-", "seeds": [0], "variants": [{"method": "fft"}]}
    )
    store = ArtifactStore(home)
    plan = make_plan(study, load_profile("tiny"), store, [f"fine_tune.seed={1000 + seed}"])
    (fft,) = plan.variants
    assert isinstance(fft.model, Edge)
    return made_of(fft.model.node, plan, store) / fft.model.part


def outliers(weights: Mapping[str, Tensor], size: float, seed: int) -> dict[str, Tensor]:
    """Make one weight of each output matrix of the masked layers that many root mean squares large."""
    names = [
        f"model.layers.{layer}.{part}.weight" for layer in LAYERS for part in ("self_attn.o_proj", "mlp.down_proj")
    ]
    changed = {}
    for name in names:
        generator = seeded_generator(seed, f"damage of {name}")
        weight = weights[name].clone()
        place = int(torch.randint(weight.numel(), (1,), generator=generator))
        sign = 2 * int(torch.randint(2, (1,), generator=generator)) - 1
        weight.view(-1)[place] = sign * size * weights[name].square().mean().sqrt()
        changed[name] = weight
    return changed


def noise(weights: Mapping[str, Tensor], size: float, seed: int) -> dict[str, Tensor]:
    """Add normal noise of that many root mean squares to all weights of the masked layers' matrices."""
    changed = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and name.startswith(tuple(f"model.layers.{layer}." for layer in LAYERS)):
            drawn = torch.randn(weight.shape, generator=seeded_generator(seed, f"damage of {name}"))
            changed[name] = weight + size * weight.square().mean().sqrt() * drawn
    return changed


def damaged(source: Path, out: Path, damage: Damage, first: float, seed: int) -> tuple[Path, float, float]:
    """Write the checkpoint damaged by about `POINTS` points of accuracy; returns it, the size, and the points."""
    weights = load_file(source / "model.safetensors")
    shutil.copytree(source, out)
    whole, low, high, size = accuracy(source), 0.0, float("inf"), first
    for _ in range(9):
        save_file({**weights, **damage(weights, size, seed)}, out / "model.safetensors", {"format": "pt"})
        lost = whole - accuracy(out)
        if abs(lost - POINTS) <= 0.3:
            break
        low, high = (size, high) if lost < POINTS else (low, size)
        size = 2 * size if high == float("inf") else float(np.sqrt(max(low, size / 4) * high))
    return out, size, lost


def answers(model: Path, limit: int | None) -> list[Evaluation]:
    """Return the outcomes on the first items, or all, of each benchmark."""
    runtime = Runtime.model_validate({"device": "cpu", "threads": 1, "eval_batch_size": 128})
    return [
        evaluate(Evaluate(task=str(one["task"]), limit=limit), model, Path(str(one["path"])), runtime)
        for one in BENCHMARKS
    ]


def accuracy(model: Path) -> float:
    """Return the mean accuracy on the items of a study, in per cent."""
    return 100 * float(np.mean([one.summary["accuracy"] for one in answers(model, ITEMS)]))


def on_other_items(before: Path, after: Path) -> list[float]:
    """Return the gain on the items that the study did not have, mean of benchmarks, and its 95% interval, in points."""
    differences = []
    for pair in zip(answers(before, None), answers(after, None), strict=True):
        old, new = ([row["outcome"] for row in one.items if row["doc_id"] >= ITEMS] for one in pair)
        differences.append(np.array(new, dtype=float) - np.array(old))
    gain = np.mean([one.mean() for one in differences])
    error = np.sqrt(sum(one.var(ddof=1) / len(one) for one in differences)) / len(differences)
    return [round(100 * float(end), 1) for end in (gain, gain - 1.96 * error, gain + 1.96 * error)]


def studied(kind: str, home: Path, folder: Path, model: Path, base: Path | None, seed: int) -> dict[str, Any]:
    """Run the study of a kind on a user's checkpoint; returns its contrasts on the mean: difference and verdict."""
    defaults: dict[str, Any] = {"fine_tune": None, "model": {"path": str(model)}, "mask": SETTINGS}
    if base:
        defaults |= {"base": {"path": str(base)}, "mask": REWINDING}
    profile = {"extends": "tiny", "defaults": defaults, "domains": {"mixed": {"benchmarks": BENCHMARKS}}}
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(profile))
    store = ArtifactStore(home)
    plan = make_plan(load_study(str(HERE / KINDS[kind])), load_profile(str(path)), store, seeds=[seed])
    rows = json.loads((made_of(comparison_node(plan), plan, store) / "contrasts.json").read_text())
    found = {
        row["contrast"]: (round(100 * row["gain"], 1), row["verdict"]) for row in rows if row["family"] == "primary"
    }
    if kind == "rewinding":
        return found
    masked = next(item for item in plan.variants if item.setup.method == "mft")
    learned, merged = masked.trained, masked.model
    assert learned is not None
    assert isinstance(merged, Edge)
    if kind == "nothing":
        if is_found(found):
            found["elsewhere"] = on_other_items(model, made_of(merged.node, plan, store) / merged.part)
        return found
    kept = load_mask(made_of(learned, plan, store) / "mask").kept
    weights = load_file(model / "model.safetensors")
    places = {name: int(weights[name].abs().argmax()) for name in outliers(weights, 1.0, seed)}
    return {"removed": sum(not kept[name].flatten()[place] for name, place in places.items()), **found}


def one_run(kind: str, home: Path, seed: int) -> dict[str, Any]:
    """Prepare one run of a kind and run its study, unless it has ended before; all kinds share a fine-tuning."""
    torch.set_num_threads(1)
    folder, result = home / f"{kind}-{seed}", home / f"{kind}-{seed}.json"
    if result.exists():
        return dict(json.loads(result.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = base = fine_tuned(home, seed)
    told: dict[str, Any] = {"kind": kind, "run": seed}
    if kind != "nothing":
        damage, first = (noise, 0.25) if kind == "rewinding" else (outliers, 60.0)
        model, size, lost = damaged(model, folder / "model", damage, first, seed)
        told |= {"size": round(size, 2), "planted": round(lost, 1)}
    told |= studied(kind, home, folder, model, base if kind == "rewinding" else None, seed)
    result.write_text(json.dumps(told))
    return told


def is_found(result: Mapping[str, Any]) -> bool:
    """Whether every contrast of a run says *better*."""
    verdicts = [told[1] for name, told in result.items() if " - " in name]
    return bool(verdicts) and set(verdicts) == {"better"}


def run_all(kinds: Iterable[str], runs: int, processes: int, home: Path) -> list[dict[str, Any]]:
    """Run all kinds and print each run as it ends."""
    results = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        tuned = [pool.submit(fine_tuned, home, seed) for seed in range(runs)]
        for waiting in as_completed(tuned):
            waiting.result()
        asked = [pool.submit(one_run, kind, home, seed) for kind in kinds for seed in range(runs)]
        for done in as_completed(asked):
            results.append(done.result())
            print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    """Run as told on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--home", type=Path, help="keeps what is made, to go on there; default: a temporary one")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    kinds = asked.kinds.split(",")
    home = contextlib.nullcontext(str(asked.home)) if asked.home else tempfile.TemporaryDirectory()
    with home as place:
        results = run_all(kinds, asked.runs, asked.processes, Path(place))
    for kind in kinds:
        of_kind = [one for one in results if one["kind"] == kind]
        print(f"{kind}: found in {sum(map(is_found, of_kind))} of {len(of_kind)}")
        gains = [one["mft - fft"][0] for one in of_kind if "mft - fft" in one]
        if len(gains) > 1:
            half = stats.t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / np.sqrt(len(gains))
            print(f"mft - fft: {np.mean(gains):+.2f} ± {half:.2f} points over the fine-tunings")
        checked = [one["elsewhere"] for one in of_kind if "elsewhere" in one]
        if checked:
            print(f"not borne out on other items: {sum(low <= 0 for _, low, _ in checked)} of {len(checked)}")


if __name__ == "__main__":
    main()

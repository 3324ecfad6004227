"""Stage `randomisation`: a learned mask among masks drawn at random alike to it.

All answer the same items, in one loaded model: nothing is trained and no checkpoint is written. The random masks are
those of the method `matched-random` with the seeds 0, 1, …
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mft_core.analysis.randomisation import FFT, LEARNED, Row, null, p_values, section
from mft_core.analysis.removals import Removal
from mft_core.analysis.section import write
from mft_core.checkpoints.files import skeleton
from mft_core.evaluation.lm_eval_harness import opened
from mft_core.masks.mask_file import load_mask
from mft_core.masks.matching import drawn, strata
from mft_core.masks.packing import PackedMasks
from mft_core.masks.sites import find_sites
from mft_core.recipes import Randomisation
from mft_core.stage import Progress, StageContext


def run(recipe: Randomisation, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Answer the benchmarks under every mask; write `section.md`, its figure and `rows.json`.

    Args:
        inputs: `model`, its `base`, the learned `mask`; `benchmark-<i>` of each local benchmark, `chat_template`.

    Raises:
        ConfigError: the mask was not made for the model.
    """
    rows = list(_answers(recipe, inputs, context))
    rows += p_values(rows)
    write(out, rows, section(recipe, rows), {"null": lambda: null(recipe, rows)})
    return {"draws": recipe.draws, "p_value": rows[-1]["p_value"]}


def _answers(recipe: Randomisation, inputs: Mapping[str, Path], context: StageContext) -> Iterator[Row]:
    """Yield a row for each benchmark and mask (`fft`: none); those that a killed run has left are not counted again."""
    given = load_mask(inputs["mask"])
    of_weights = strata(given, inputs["model"], inputs["base"])
    found = {site.name: site for site in find_sites(skeleton(inputs["model"]))}
    sites = [found[masked.name] for masked in given.config.sites]
    masks: list[str | int] = [FFT, LEARNED, *range(recipe.draws)]
    state = context.work / "accuracies.jsonl"
    earlier = [json.loads(line) for line in state.read_text().splitlines()] if state.exists() else []
    yield from earlier
    done = len(earlier)
    for index, (benchmark, evaluation) in enumerate(zip(recipe.benchmarks, recipe.evaluations, strict=True)):
        left = masks[sum(row["benchmark"] == benchmark for row in earlier) :]
        if not left:
            continue
        folder, template = inputs.get(f"benchmark-{index}"), inputs.get("chat_template")
        with (
            opened(evaluation, inputs["model"], folder, context.runtime, chat_template=template) as (answered, engine),
            state.open("a", encoding="utf-8") as counted,
        ):
            parameters = dict(engine.model.named_parameters())
            for name in left:
                kept = PackedMasks(drawn(given, of_weights, name).items()) if isinstance(name, int) else given.kept
                with Removal(parameters, replace(given, kept=kept), sites) as removal:
                    if name != FFT:
                        removal.cut(lambda site: True)
                    told = answered().summary
                row = {"mask": name, "benchmark": benchmark, "n": told["n"], "accuracy": told["accuracy"]}
                counted.write(json.dumps(row) + "\n")
                counted.flush()
                yield row
                done += 1
                context.report(Progress(done, len(masks) * len(recipe.benchmarks), "mask"))

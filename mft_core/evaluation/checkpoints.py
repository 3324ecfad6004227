"""Two checkpoints, evaluated and compared without a study: `evaluate` and `compare` of `import mft_core`.

For people, in scripts and notebooks; stages call `mft_core.evaluation.lm_eval_harness` and `mft_core.statistics`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mft_core import recipes
from mft_core.errors import ConfigError, validated
from mft_core.evaluation import lm_eval_harness
from mft_core.evaluation.outcomes import Evaluation
from mft_core.evaluation.rehearsal import rehearse
from mft_core.recipes import Runtime
from mft_core.statistics import comparison
from mft_core.statistics.comparison import Comparison, Outcomes


def evaluate(
    checkpoint: Path | str,
    task: str,
    folder: Path | str | None = None,
    *,
    runtime: Runtime | None = None,
    **settings: Any,
) -> Evaluation:
    """Run one benchmark on one checkpoint through lm-eval, and keep the outcome of every item.

    Args:
        checkpoint: directory of a Hugging Face checkpoint with its tokenizer.
        task: lm-eval's name of a task or group, or that of a task in `folder`.
        folder: of a task that is not lm-eval's own: its definition in lm-eval's YAML format, its items as JSON lines.
        runtime: device, threads and `eval_batch_size`, e.g. `Runtime(eval_batch_size=64)`.
        settings: of `mft_core.recipes.Evaluate`: metric ('exact_match'), filter, num_fewshot, limit (items),
            apply_chat_template (True), precision ('float32'), seed.

    Returns:
        one row per item, and the summary with the accuracy as a share, 0 to 1.

    Raises:
        ConfigError: a setting is not valid, or the task is unknown or cannot be read.
        StageError: the task has no such metric or filter, or the tokenizer no chat template.
    """
    recipe = validated(recipes.Evaluate, {"task": task, **settings}, "evaluate")
    benchmark = None if folder is None else Path(folder)
    if not Path(checkpoint).is_dir():
        raise ConfigError(f"checkpoint {checkpoint}: no such directory; give a downloaded or saved checkpoint's.")
    rehearse(recipe, Path(checkpoint), benchmark)
    return lm_eval_harness.evaluate(recipe, Path(checkpoint), benchmark, runtime)


def compare(variant: Evaluation, baseline: Evaluation) -> Comparison:
    """Compare two checkpoints item by item (`mft_core.statistics.comparison`): paired, McNemar's exact test.

    Returns:
        the gain of `variant` over `baseline` as a share (0.01 is a percentage point), its 95% interval and p-value;
        `print` says it in a line.

    Raises:
        StageError: they were not evaluated on the same items in the same prompts, or by different metrics.
    """
    before = Outcomes.of("the baseline", baseline.summary, baseline.items)
    after = Outcomes.of("the variant", variant.summary, variant.items)
    return comparison.compare([[comparison.pair([before], [after])]])

"""AlpacaEval 2: whose answer a judge model prefers, the reference's or the model's, freed of what length does to it.

The package `alpaca-eval` asks the judge, any OpenAI-compatible server (OPENAI_BASE_URL and OPENAI_API_KEY, as OpenAI's
client reads them), and fits its model of length. An item counts for the preference predicted at equal length: the mean
is the length-controlled win rate. The task's folder, which `mft fetch alpaca-eval` makes, has the reference's answers
and `df_gamed.csv`, what the model of length is fitted with. Used by `mft_core.evaluation.lm_eval_harness`.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mft_core.errors import ConfigError, StageError
from mft_core.recipes import Evaluate

if TYPE_CHECKING:
    from lm_eval.api.task import Task

METRIC = "length_controlled_win_rate"
GAMED = "df_gamed.csv"
_JUDGE = "weighted_alpaca_eval_gpt4_turbo"
"""whose prompt and reading of the answer are AlpacaEval 2's"""

_UNREAD = 0.02
"""share of the items whose judgement may be missing"""


def check(recipe: Evaluate, folder: Path | None) -> None:
    """Raise a ConfigError for a judged task without a judge, the package that asks it, or the file of its folder."""
    if recipe.metric != METRIC:
        return
    if recipe.judge is None:
        raise ConfigError(f"task '{recipe.task}': metric '{METRIC}' needs a judge; give the model's name (judge).")
    if not all(map(importlib.util.find_spec, ("alpaca_eval", "pkg_resources"))):
        raise ConfigError(f"task '{recipe.task}' needs the package alpaca-eval: pip install -e '.[paper]'.")
    if folder is None or not (folder / GAMED).is_file():
        raise ConfigError(f"task '{recipe.task}': its folder has no {GAMED}; `mft fetch alpaca-eval` gets it.")


@functools.cache
def register() -> None:
    """Once per process: give lm-eval the metric's name; its values come from `ask_ahead`."""
    from lm_eval.api import metrics, registry  # noqa: F401 - the metrics register themselves

    def unasked(**given: Any) -> float:
        raise StageError(f"metric '{METRIC}': no judge was asked.")

    registry.register_metric(metric=METRIC, higher_is_better=True, aggregation="mean")(unasked)


def ask_ahead(recipe: Evaluate, task: Task, folder: Path) -> None:
    """Have the judge asked of all of a task's answers at once, when lm-eval has them."""
    filters = task.apply_filters

    def apply_filters() -> Any:
        applied = filters()
        requests = sorted(task.instances, key=lambda request: request.doc_id)
        texts = [
            (request.doc["instruction"], request.doc["output"], next(iter(request.filtered_resps.values())))
            for request in requests
        ]
        found = dict(zip((text[0] for text in texts), _preferences(recipe, texts, folder), strict=True))
        task.process_results = lambda doc, answers: {METRIC: found[doc["instruction"]]}
        return applied

    task.apply_filters = apply_filters


def _preferences(recipe: Evaluate, texts: list[tuple[str, str, str]], folder: Path) -> list[float]:
    """Return how far each answer is preferred to the reference's, at equal length: from 0 to 1.

    Args:
        texts: instruction, the reference's answer, the model's.

    Raises:
        StageError: the judge does not answer, or by none of the two names.
    """
    import alpaca_eval
    import openai
    import pandas as pd
    import sklearn
    from alpaca_eval.annotators import PairwiseAnnotator
    from alpaca_eval.metrics import glm_winrate

    package = Path(alpaca_eval.__file__).parent / "evaluators_configs"
    [settings] = yaml.safe_load((package / _JUDGE / "configs.yaml").read_text(encoding="utf-8")).values()
    settings["prompt_template"] = str(package / settings["prompt_template"])
    settings["completions_kwargs"] |= {"model_name": recipe.judge, "requires_chatml": True}
    outputs = [
        pd.DataFrame({"instruction": [text[0] for text in texts], "output": [text[at] for text in texts],
                      "generator": name}) for at, name in ((1, "reference"), (2, "model"))
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place, sklearn.config_context():  # the package leaves sklearn changed
        config = Path(place) / "judge" / "configs.yaml"
        config.parent.mkdir()
        config.write_text(yaml.safe_dump({"judge": settings}), encoding="utf-8")
        annotator = PairwiseAnnotator(annotators_config=config, caching_path=None, seed=recipe.seed)
        try:
            judged = pd.DataFrame(annotator.annotate_head2head(*outputs, is_ordered=True))
        except openai.OpenAIError as error:
            raise StageError(
                f"judge = {recipe.judge}: it does not answer ({type(error).__name__}: {error})."
            ) from error
        unread = int(judged["preference"].isna().sum())
        if unread > _UNREAD * len(texts):
            raise StageError(
                f"judge = {recipe.judge}: {unread} of {len(texts)} answers name none of the two outputs, with "
                f"log-probabilities; {_UNREAD:.0%} may. Others would count by their length alone; take another judge."
            )
        glm_winrate.hf_hub_download = lambda **asked: folder / GAMED  # it would ask the hub for it
        glm_winrate.get_length_controlled_winrate(judged, save_weights_dir=None, is_warn_extreme_changes=False)
    return [float(value) for value in judged["glm_preference"]]

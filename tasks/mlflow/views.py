"""The saved view of an experiment in MLflow's UI: its variants as a table, and their gains drawn against what varies.

MLflow keeps views that people save as tags of the experiment, which "Views" lists; this is one such tag. Without it the
UI shows no number of any run, and draws bars of the parents alone. Pure functions, for `tasks.mlflow.tracking`.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from mft_core.figures.quantities import quantities
from mft_core.statistics.winner import MEAN
from tasks.mlflow.fields import clean

Row = Mapping[str, Any]
NAME = "gains"
TAG = f"mlflow.sharedViewState.{NAME}"
_VARIANTS = "params.variant != ''"
"""finds the variants alone: under their parents they would be folded"""


def link(experiment: str, chart: bool = False) -> str:
    """Return the view's address within the UI."""
    mode = "CHART" if chart else "TABLE"
    return (
        f"#/experiments/{experiment}/runs?viewStateShareKey={NAME}&compareRunsMode={mode}&workflowType=machine_learning"
    )


def saved(rows: Sequence[Row]) -> str:
    """Return the value of the tag, for the rows of a report."""
    benchmarks = sorted(dict.fromkeys(row["benchmark"] for row in rows), key=lambda name: name != MEAN)
    first, against = benchmarks[0], _axis(rows)
    numbers = [*(clean(f"{name}/{first}") for name in ("accuracy", "gain", "gain_low", "gain_high")),
               *(clean(f"gain/{name}") for name in benchmarks[1:])]  # fmt: skip
    varied = [name for quantity in quantities(rows) for name in quantity.columns]
    columns = [*map("params.`{}`".format, varied), *map("metrics.`{}`".format, numbers)]
    columns.append(f"tags.`{clean(f'verdict/{first}')}`")
    state = {
        "searchFilter": _VARIANTS,
        "orderByKey": f"metrics.`{clean(f'gain/{first}')}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "runsHiddenMode": "SHOWALL",
        "compareRunCharts": [_chart(clean(f"gain/{name}"), against) for name in benchmarks],
        "compareRunSections": [{"uuid": NAME, "name": f"Gain against {against}" if against else "Gain",
                                "display": True, "isReordered": True, "isGenerated": False}],
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
    }  # fmt: skip
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": "Gains of all variants", "createdAt": 1, "updatedAt": 1, "state": f"deflate;{packed}"})


def _axis(rows: Sequence[Row]) -> str | None:
    """Return the param that gains are drawn against: of what the study varies, the number with the most values."""
    varied = {("first_layer" if one.name == "layers" else one.columns[0]): len(one.values)
              for one in quantities(rows) if one.numeric or one.name == "layers"}  # fmt: skip
    return max(varied, key=lambda name: varied[name]) if varied else None


def _chart(metric: str, against: str | None) -> dict[str, Any]:
    chart = {"uuid": metric, "metricSectionId": NAME, "runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    if against is None:
        return {**chart, "type": "BAR", "metricKey": metric}
    axes = {"xaxis": {"key": against, "type": "PARAM"}, "yaxis": {"key": metric, "type": "METRIC"}}
    return {**chart, "type": "SCATTER", **axes}

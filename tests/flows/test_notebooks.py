"""The notebooks run top to bottom on a store: the shipped studies on the mini profile, recorded as a run records them.

Payloads of trainings and answers are made up (`tests.support.finished`); comparison, analyses and MLflow are the real
ones.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from mft_core.analysis import anatomy, layer_prediction
from mft_core.recipes import Anatomy
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
from pipelines.report.asked import Asked
from pipelines.report.page import write_report
from pipelines.report.record import sync_to_mlflow
from pipelines.report.report import find_report
from tests.mft_core.analysis.test_anatomy import Study as Masks
from tests.mft_core.analysis.test_predict_layers import GROUPS, RECIPE, sweep_row
from tests.support.finished import finish
from tests.support.mini import write_profile
from tests.support.small_training import make_context as context
from tests.support.tiny import save_checkpoint

pytestmark = pytest.mark.timeout(600)  # a minute of work on a free core
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
ACCURACY = {"base": 0.2, "fft": 0.6, "continued-fft": 0.62, "mft": 0.7, "lora": 0.55, "random": 0.4, "magnitude": 0.6}
STUDIES: dict[str, dict[str, str]] = {
    "sparsity": {}, "layer-groups": {"predict-layers": "prediction"}, "data-ratio": {}, "few-steps": {},
    "main": {"anatomy sums": "losses", "anatomy others": "losses"}, "seeds": {"anatomy": "masks"},
    "anatomy": {"anatomy": "masks"},
}  # fmt: skip
"""the studies that the notebooks read, their analyses on a profile of two domains, and which rows these have here"""


def profile(folder: Path) -> Path:
    """Write the mini profile with the domains and layer groups that the shipped studies ask for."""
    path = write_profile(folder)
    content = yaml.safe_load(path.read_text())
    content |= {
        "domains": {"sums": {}, "others": {"data": {"fraction": 0.5}}, "mixed": {}},
        "each_domain": ["sums", "others"],
        "layer_groups": ["0", "1-2", "3"],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def analyses(folder: Path) -> dict[str, Path]:
    """Measure small models and masks as the analyses do; returns payloads with their rows."""
    study = Masks(folder)
    for seed in (0, 1):
        study.add("mft", 0.2, seed)
        study.add("mft", 0.1, seed, **{"mask.domain": "others"})
        study.add("random", 0.2, seed)
    study.add("magnitude", 0.2)
    masks = anatomy.examine(Anatomy(masks=tuple(study.described), bootstrap=100, rows=4), study.inputs, context(folder))
    model = {"model": save_checkpoint(folder / "deeper", num_hidden_layers=6), "data": study.inputs["data"]}
    sweep = [sweep_row(group, "sums", 0.01 * (index % 4)) for index, group in enumerate(GROUPS)]
    rows = {
        "masks": masks,
        "losses": [row for row in masks if row["part"] == "loss" and row["by"] == "mask"],
        "prediction": layer_prediction.examine(RECIPE, sweep, model, context(folder)).rows(),
    }
    for name in rows:
        (folder / name).mkdir()
        (folder / name / "rows.json").write_text(json.dumps(rows[name]))
    return {name: folder / name for name in rows}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory whose `.mft` has the studies in MLflow; nothing else points there."""
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("MFT_HOME", raising=False)
        store, settings, payloads = ArtifactStore(folder / ".mft"), load_profile(str(profile(folder))), analyses(folder)
        for name, asked in STUDIES.items():
            changes = {"seeds": (0, 1) if name == "seeds" else (0,), "analyses": ()}  # they are `payloads`
            study = load_study(name).model_copy(update=changes)
            finish(make_plan(study, settings, store), store, ACCURACY)
            plan = make_plan(study, settings, store)
            report = replace(find_report(plan, store), analyses={one: payloads[of] for one, of in asked.items()})
            sync_to_mlflow(
                plan, store, report, write_report(report, folder / "pages" / name, Asked(name, "mini")).parent
            )
        yield folder


@functools.cache
def executed(home: Path, name: str) -> list[Any]:
    """Run a notebook in a directory below the home, on the mini profile; returns its code cells."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('PROFILE = "tiny"', 'PROFILE = "mini"')
    (home / "below").mkdir(exist_ok=True)
    NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(home / "below")}}
    ).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cells: list[Any], kind: str) -> list[str]:
    """Return what the cells show in one format, e.g. "image/png"."""
    found = [output.get("data", {}) for cell in cells for output in cell.outputs]
    return [data[kind] for data in found if kind in data]


@pytest.mark.parametrize(("name", "figures", "tables"), [("sensitivity", 5, 3), ("masks", 7, 3), ("results", 3, 8)])
def test_a_notebook_runs_top_to_bottom_and_every_cell_shows_something(
    home: Path, name: str, figures: int, tables: int
) -> None:
    cells = executed(home, name)
    assert all(cell.outputs for cell in cells[1:]), "but the imports"
    assert not [output for cell in cells for output in cell.outputs if output.output_type in ("stream", "error")]
    assert len(shown(cells, "image/png")) == figures
    assert len(shown(cells, "text/html")) == tables


def test_the_notebook_of_ones_own_loop_needs_no_study_and_ends_with_a_comparison(tmp_path: Path) -> None:
    cells = executed(tmp_path, "own_loop")
    assert not [output for cell in cells[1:] for output in cell.outputs if output.output_type in ("stream", "error")]
    assert len(shown(cells, "image/png")) == 1
    assert (
        "mask (learned) of 28 matrices in layers 2-5: 10.00% of 790,528 weights zero" in shown(cells, "text/plain")[2]
    )
    assert "points [" in shown(cells, "text/plain")[-1]


def test_the_numbers_are_those_that_were_recorded(home: Path) -> None:
    cells = executed(home, "results")
    text = "\n".join(shown(cells, "text/html"))
    assert "70.0 (+10.0 [" in text, "the learned mask has 70% where FFT has 60%"
    assert "40.0 (-20.0 [" in text
    for study in STUDIES:
        assert f"<th>{study}</th>" in text

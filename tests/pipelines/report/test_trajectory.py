"""The study of trajectories: every state of a training is a variant, from one training, and the figure shows where."""

import itertools

import pytest
import yaml
from PIL import Image

from mft_core.checkpoints.files import check_written
from mft_core.errors import ConfigError
from mft_core.recipes import Runtime
from mft_core.stages import STAGES
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.graph.nodes import Edge, closure
from pipelines.plan.analyses import answers
from pipelines.plan.plan import make_plan
from pipelines.report import published
from pipelines.report.asked import Asked
from pipelines.report.page import write_report
from pipelines.report.report import find_report
from tests.support.mini import write_profile

METHODS = ("base", "fft", "lora", "continued-fft", "mft", "random")
TRAINED = ("fft", "lora", "continued-fft", "mft")
POINTS = 2


def plan_of(folder):
    path = folder / "points.yaml"
    variants = [{"method": name} for name in METHODS]
    study = {"question": "Where?", "seeds": [0], "checkpoints": POINTS, "figure": "trajectory", "variants": variants}
    path.write_text(yaml.safe_dump(study))
    store = ArtifactStore(folder / "home")
    return make_plan(load_study(str(path)), load_profile(str(folder / "mini.yaml")), store), store


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run every stage of the study."""
    folder = tmp_path_factory.mktemp("trajectory")
    write_profile(folder)
    plan, store = plan_of(folder)
    made = {}
    for node in closure(answers(plan)):
        inputs = {
            name: made[given.node.id].at(given.part) if isinstance(given, Edge) else given
            for name, given in node.inputs.items()
        }
        runtime = Runtime(device="cpu", threads=1)
        made[node.id] = store.build(STAGES[node.stage], node.recipe, inputs, runtime).ref
    plan, store = plan_of(folder)
    return plan, store, find_report(plan, store), folder


def test_every_state_of_a_training_is_a_variant_and_comes_from_the_one_training(finished):
    plan, *_ = finished
    for method in TRAINED:
        own = [item for item in plan.variants if item.setup.method == method]
        assert [item.setup.checkpoint for item in own] == [None, 1, 2]
        assert len({item.trained.id for item in own}) == 1
        assert len({node.id for item in own for node in item.evaluations.values()}) == 3
    assert [item.name for item in plan.variants if item.setup.method == "random"] == [
        "random sparsity=0.1 layers=1-2 seed=0"
    ]
    tuned = next(item for item in plan.variants if item.name == "fft").trained
    for item in plan.variants:
        if item.setup.method in ("continued-fft", "mft", "random"):
            assert (item.trained.inputs["model"].node.id, item.trained.inputs["model"].part) == (tuned.id, "model")


def test_every_points_checkpoint_loads_and_the_chosen_one_is_among_them(finished):
    plan, store, report, _ = finished
    models = {}
    for item in plan.variants:
        (evaluation,) = item.evaluations.values()
        given = evaluation.inputs["model"]
        if isinstance(given, Edge):
            manifest = report.manifests[given.node.id]
            directory = store.directory(given.node.stage, manifest["key"]) / given.part
            check_written(directory)
            models[item.setup.method, item.setup.checkpoint] = (directory / "model.safetensors").read_bytes()
    for method in TRAINED:
        assert models[method, None] in [models[method, point] for point in range(1, POINTS + 1)]
        assert models[method, 1] != models[method, 2]


def test_rows_say_step_and_validation_loss_of_their_own_state(finished):
    *_, report, _ = finished
    for method in TRAINED:
        own = {row.get("checkpoint"): row for row in report.rows if row["method"] == method}
        assert 0 < own[1]["step"] < own[2]["step"]
        losses = {own[point]["step"]: own[point]["validation_loss"] for point in (1, 2)}
        assert own[None]["step"] == min(losses, key=losses.get)
        assert own[None]["validation_loss"] == min(losses.values())
    assert all(row["gain"] is not None for row in report.rows if row.get("checkpoint"))


def test_the_figure_is_as_wide_as_a_column(finished):
    *_, report, folder = finished
    page = write_report(report, folder / "pages", Asked("points.yaml", "mini.yaml"))
    with Image.open(page.parent / "figure.png") as figure:
        assert figure.width == 560  # 3.5 inches at 160 dots an inch


def test_the_page_says_what_the_best_point_on_the_test_items_would_have_claimed_and_what_it_is_worth(finished):
    *_, report, folder = finished
    text = write_report(report, folder / "again", Asked("points.yaml", "mini.yaml")).with_suffix(".md").read_text()
    section = text.partition("## What choosing the best point is worth")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    told = {line[0]: line for line in lines[2:]}
    assert set(told) == {"FFT", "LoRA", "continued FFT", "MFT"}
    for method, label in (("lora", "LoRA"), ("mft", "MFT"), ("continued-fft", "continued FFT")):
        gains = [row["gain"] for row in report.rows if row["method"] == method]
        assert told[label][2] == f"{100 * max(gains):+.1f}"
        (chosen,) = [row["gain"] for row in report.rows if row["method"] == method and row.get("checkpoint") is None]
        assert told[label][4] == f"{100 * chosen:+.1f}"


def test_the_papers_values_stand_beside_the_curves_of_its_backbones_alone():
    assert published.curves("llama2-7b")["math", "gsm8k"]["mft"] == 47.3
    assert published.curves("llama3.1-8b")["instruction", "ifeval"]["fft"] == 59.8
    assert published.curves("tiny") == {}
    for profile, values in itertools.product(["llama2-7b", "llama3.1-8b"], [set(METHODS) | {"magnitude"}]):
        assert all(set(found) == values for found in published.curves(profile).values())


def test_other_validations_are_as_many_points_and_a_training_that_keeps_one_state_has_none(finished):
    *_, folder = finished
    study, profile = load_study(str(folder / "points.yaml")), load_profile(str(folder / "mini.yaml"))
    overrides = ["mask.training.validations=3", "continued.keep=best"]
    plan = make_plan(study, profile, ArtifactStore(folder / "home"), overrides)
    points = {name: [i.setup.checkpoint for i in plan.variants if i.setup.method == name] for name in TRAINED}
    assert points == {"fft": [None, 1, 2], "lora": [None, 1, 2], "continued-fft": [None], "mft": [None, 1, 2, 3]}


def test_a_search_has_no_trajectory(tmp_path):
    path = tmp_path / "both.yaml"
    search = {"space": {"mask.sparsity": [0.1, 0.2]}, "trials": 2}
    path.write_text(
        yaml.safe_dump({"question": "?", "checkpoints": 2, "search": search, "variants": [{"method": "fft"}]})
    )
    with pytest.raises(ConfigError, match="a study with a search has none"):
        load_study(str(path))

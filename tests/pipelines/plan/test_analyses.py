"""What goes into a study's analyses: the models, masks and data of its own variants."""

import pytest

from mft_core.errors import ConfigError
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.by_name import names
from pipelines.config.profile import load_profile
from pipelines.config.study import load_studies, load_study
from pipelines.plan.analyses import analysis_nodes, answers
from pipelines.plan.plan import make_plan, make_plans
from tests.support.mini import write_profile, write_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("analyses")
    write_profile(path)
    return path


def plan(folder, tmp_path, variants, analyses, overrides=()):
    study = load_study(str(write_study(tmp_path, variants)))
    asked = study.model_copy(update={"analyses": tuple(analyses)})
    return make_plan(asked, load_profile(str(folder / "mini.yaml")), ArtifactStore(tmp_path / "home"), overrides)


def test_anatomy_is_given_every_mask_of_its_base(folder, tmp_path):
    the_plan = plan(folder, tmp_path, [{"method": "mft"}, {"method": "magnitude"}, {"method": "lora"}], ["anatomy"])
    (node,) = analysis_nodes(the_plan).values()
    assert [item["method"] for item in node.recipe.masks] == ["mft", "magnitude"]
    masks = [item for item in the_plan.variants if item.setup.method in ("mft", "magnitude")]
    assert [node.inputs[f"mask-{index}"].node.id for index in range(2)] == [item.trained.id for item in masks]
    assert node.inputs["model"].node.id == masks[0].baseline.trained.id


def test_analyses_of_the_fine_tuned_model_leave_out_masks_of_the_base(folder, tmp_path):
    the_plan = plan(folder, tmp_path, [{"method": "mft-base"}, {"method": "mft"}], ["anatomy", "landscape"])
    anatomy, landscape = analysis_nodes(the_plan).values()
    assert [item["method"] for item in anatomy.recipe.masks] == ["mft"]
    assert landscape.recipe.variant.startswith("mft sparsity")


def test_anatomy_leaves_out_masks_that_remove_nothing(folder, tmp_path):
    the_plan = plan(folder, tmp_path, [{"method": "rewind"}, {"method": "magnitude"}], ["anatomy"])
    (node,) = analysis_nodes(the_plan).values()
    assert [item["method"] for item in node.recipe.masks] == ["magnitude"]
    the_plan = plan(folder, tmp_path, [{"method": "rewind"}], ["anatomy"])
    with pytest.raises(ConfigError, match="analysis 'anatomy' needs masks that set weights to zero"):
        analysis_nodes(the_plan)


def test_landscape_looks_at_every_masked_model_beside_its_base(folder, tmp_path):
    the_plan = plan(folder, tmp_path, [{"method": "mft"}, {"method": "random"}], ["landscape"])
    nodes = analysis_nodes(the_plan)
    assert list(nodes) == [f"landscape {item.name}" for item in the_plan.variants if item.baseline]
    assert {node.inputs["masked"].node.stage for node in nodes.values()} == {"merge-mask"}


def test_a_predictor_is_set_beside_the_sweep_that_measures_it(folder, tmp_path):
    sweep = {"method": "mft", "grid": {"mask.layers": ["0-1", "1-2", "2-3"]}}
    the_plan = plan(folder, tmp_path, [sweep], ["predict-layers"])
    (node,) = analysis_nodes(the_plan).values()
    assert node.recipe.groups == ("0-1", "1-2", "2-3")
    assert node.inputs["comparison"].node.id == answers(the_plan)[0].id


def test_a_randomisation_test_is_given_the_learned_mask_its_base_and_the_benchmarks(folder, tmp_path):
    the_plan = plan(folder, tmp_path, [{"method": "mft"}, {"method": "random"}], ["randomisation"])
    (node,) = analysis_nodes(the_plan).values()
    learned = next(item for item in the_plan.variants if item.setup.method == "mft")
    assert node.inputs["mask"].node.id == learned.trained.id
    assert node.inputs["model"].node.id == learned.baseline.trained.id
    assert node.inputs["base"].location == str(folder / "model")
    assert node.inputs["benchmark-0"].location == str(folder / "benchmarks")
    assert (node.recipe.benchmarks, node.recipe.evaluations[0].limit, node.recipe.draws) == (("sums",), 200, 200)
    needs = the_plan.needs(node)
    assert needs.moved > 200 * the_plan.needs(next(iter(learned.evaluations.values()))).moved / 10
    for lacking in ([{"method": "random"}], ["fine_tune=null"]):
        variants, changes = (lacking, []) if isinstance(lacking[0], dict) else ([{"method": "mft"}], lacking)
        with pytest.raises(ConfigError, match="analysis 'randomisation' needs mft variants answered by engine hf"):
            analysis_nodes(plan(folder, tmp_path, variants, ["randomisation"], changes))


def test_an_analysis_without_what_it_looks_at_is_refused(folder, tmp_path):
    the_plan = plan(folder, tmp_path, [{"method": "mft"}], ["predict-layers"])
    with pytest.raises(ConfigError, match="analysis 'predict-layers' needs mft variants of three layer groups or more"):
        analysis_nodes(the_plan)


@pytest.mark.parametrize("analysis", ["anatomy", "landscape"])
def test_losses_without_rows_to_measure_them_on_are_refused_before_anything_runs(folder, tmp_path, analysis):
    parts = ("fine_tune", "mask.training")
    without = [f"{part}.{text}" for part in parts for text in ("validations=0", "keep=last")]
    the_plan = plan(folder, tmp_path, [{"method": "mft"}], [analysis], ["data.validation_rows=0", *without])
    with pytest.raises(ConfigError, match=r"data\.validation_rows = 0"):
        analysis_nodes(the_plan)


def test_every_shipped_study_plans_on_the_tiny_profile(tmp_path):
    store = ArtifactStore(tmp_path / "home")
    for name in names("study"):
        for the_plan in make_plans(load_studies(name), load_profile("tiny"), store):
            assert answers(the_plan)
            assert the_plan.variants


def test_a_study_of_studies_shares_what_they_have_in_common(tmp_path):
    plans = make_plans(load_studies("paper"), load_profile("tiny"), ArtifactStore(tmp_path / "home"))
    ids = [{step.node.id for step in the_plan.steps} for the_plan in plans]
    assert len(set.union(*ids)) < sum(map(len, ids))


def test_an_override_that_no_part_of_a_study_uses_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--set mask\.nothing: no study of these uses it|unknown key"):
        make_plans(load_studies("paper"), load_profile("tiny"), ArtifactStore(tmp_path), ["mask.nothing=1"])

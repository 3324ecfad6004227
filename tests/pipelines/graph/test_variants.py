"""What a study varies: each variant meets its own baseline, is there once, and is called by a name of its own."""

import contextlib

import pytest
import yaml

from mft_core.errors import ConfigError
from mft_core.methods import METHODS
from mft_core.recipes import FineTune, Interpolate, Lora, PickCheckpoint
from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.setup import own_training
from pipelines.config.study import load_study
from pipelines.graph.variants import unique_nodes
from pipelines.plan.plan import make_plan
from tests.support.mini import PLAIN_METHODS, TRAINING, write_profile, write_study

BENCH = {"name": "sums", "task": "mini_sums", "path": "benchmarks"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mini")
    write_profile(path)
    return path


@pytest.fixture
def plan(folder, tmp_path):
    """Plan a study of the given variants on the mini profile."""

    def make(*variants, overrides=(), seeds=(0,), profile=folder / "mini.yaml", replicates=None):
        study = load_study(str(write_study(tmp_path, list(variants), seeds)))
        store = ArtifactStore(tmp_path / "home")
        return make_plan(study, load_profile(str(profile)), store, overrides, replicates=replicates)

    return make


def baselines(the_plan):
    """Return {variant: its baseline} by name."""
    rows = the_plan.comparison()[0].variants
    names = [row["variant"] for row in rows]
    return {row["variant"]: None if row["baseline"] is None else names[row["baseline"]] for row in rows}


def parent(node):
    """Return the id of the fine-tuning that an evaluation's model comes from."""
    merged = node.inputs["model"].node
    return merged.inputs["model"].node.id if merged.stage == "merge-mask" else merged.id


def test_each_variant_is_compared_with_the_fine_tuning_that_it_starts_from(plan):
    grid = {"data.fraction": [0.5, 1.0]}
    the_plan = plan({"method": "fft", "grid": grid}, {"method": "mft", "grid": grid})
    mask = "mft sparsity=0.1 layers=1-2 seed=0"
    assert baselines(the_plan) == {
        "fft fraction=0.5": None,
        "fft fraction=1.0": None,
        f"{mask} fraction=0.5": "fft fraction=0.5",
        f"{mask} fraction=1.0": "fft fraction=1.0",
    }
    recipe, nodes = the_plan.comparison()
    for row, node in zip(recipe.variants, nodes, strict=True):
        if row["baseline"] is not None:
            assert parent(node) == parent(nodes[row["baseline"]])


def test_a_baseline_that_the_study_lacks_is_added_to_it(plan):
    the_plan = plan({"method": "mft", "grid": {"fine_tune.learning_rate": [0.01, 0.02]}})
    mask = "mft sparsity=0.1 layers=1-2 seed=0"
    assert baselines(the_plan) == {
        "fft learning_rate=0.01": None,
        f"{mask} learning_rate=0.01": "fft learning_rate=0.01",
        "fft learning_rate=0.02": None,
        f"{mask} learning_rate=0.02": "fft learning_rate=0.02",
    }
    row = the_plan.comparison()[0].variants[0]
    assert (row["method"], row["fine_tune.learning_rate"]) == ("fft", 0.01)
    labels = [step.node.label for step in the_plan.steps if step.node.stage == "fine-tune"]
    assert labels == ["fine-tune sums learning_rate=0.01", "fine-tune sums learning_rate=0.02"]


def test_a_mask_is_never_compared_with_answers_to_another_recipe_of_the_benchmark(plan, folder):
    few = [{**BENCH, "path": str(folder / "benchmarks"), "limit": 3}]
    the_plan = plan({"method": "base"}, {"method": "fft"}, {"method": "mft", "grid": {"benchmarks": [few]}})
    recipe, nodes = the_plan.comparison()
    for row, node in zip(recipe.variants, nodes, strict=True):
        if row["baseline"] is not None:
            assert nodes[row["baseline"]].recipe == node.recipe
    assert [row["method"] for row in recipe.variants] == ["base", "fft", "fft", "mft"]
    assert [row["baseline"] for row in recipe.variants] == [1, None, None, 2]


def test_the_base_is_compared_where_there_is_exactly_one_fine_tuning(plan):
    assert baselines(plan({"method": "base"}, {"method": "fft"}))["base"] == "fft"
    assert baselines(plan({"method": "base"}, {"method": "mft"}))["base"] == "fft"
    two = {"method": "fft", "grid": {"data.fraction": [0.5, 1.0]}}
    assert baselines(plan({"method": "base"}, two))["base"] is None


def test_the_same_work_written_in_two_ways_is_one_variant(plan):
    the_plan = plan({"method": "fft"}, {"method": "random", "grid": {"mask.layers": ["1-2", "1,2", "middle:2"]}})
    assert [item.name for item in the_plan.variants] == ["fft", "random sparsity=0.1 layers=1-2 seed=0"]


def test_two_variants_of_one_name_are_refused_before_any_compute(plan, monkeypatch):
    monkeypatch.setattr("pipelines.graph.variants._name", lambda setup: setup.method)
    with pytest.raises(ConfigError, match="two different variants of domain sums are both called 'random'"):
        plan({"method": "random", "grid": {"mask.sparsity": [0.1, 0.2]}})


def test_names_hold_the_whole_key_where_its_last_part_is_not_clear(plan):
    the_plan = plan(
        {"method": "mft", "grid": {"mask.training.learning_rate": [0.1], "fine_tune.learning_rate": [0.2]}},
        {"method": "fft", "grid": {"data.seed": [3]}},
    )
    assert [item.name for item in the_plan.variants] == [
        "fft fine_tune.learning_rate=0.2",
        "mft sparsity=0.1 layers=1-2 seed=0 fine_tune.learning_rate=0.2 mask.training.learning_rate=0.1",
        "fft data.seed=3",
    ]


def test_names_and_labels_tell_modules_and_close_sparsities_apart(plan):
    grid = {"mask.modules": ["both", "mlp"], "mask.sparsity": [0.1, 0.10000001]}
    the_plan = plan({"method": "fft"}, {"method": "random", "grid": grid})
    names = [item.name for item in the_plan.variants]
    labels = [step.node.label for step in the_plan.steps]
    assert len(set(names)) == len(names) == 5
    assert len(set(labels)) == len(labels)
    assert "learn-mask sparsity=0.1 layers=1-2 modules=mlp seed=0 (random)" in labels


@pytest.mark.parametrize(
    ("method", "key", "words"),
    [
        ("mft", "backbone", "--profile"),
        ("mft", "domain", "`domain:`"),
        ("fft", "method", "`method:`"),
        ("fft", "mask.sparsity", "makes no difference to fft"),
        ("fft", "seed", "makes no difference to fft"),
        ("continued-fft", "mask.layers", "makes no difference to continued-fft"),
        ("mft", "continued.epochs", "makes no difference to mft"),
        ("random", "mask.training.learning_rate", "makes no difference to random"),
        ("magnitude", "mask.score_init", "makes no difference to magnitude"),
        ("random", "mask.fraction", "makes no difference to random"),
        ("mft", "mask.sparsty", "Did you mean 'sparsity'"),
        ("mft", "maks.sparsity", "Did you mean 'mask'"),
        ("mft", "nothing", "unknown key 'nothing'"),
    ],
)
def test_a_grid_key_that_varies_nothing_is_refused(plan, method, key, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        plan({"method": method, "grid": {key: [1, 2]}})
    assert key in str(refusal.value)
    assert "--set" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("backbone=x", "use --profile"),
        ("domain=x", "`domain:`"),
        ("method=mft", "`method:`"),
        ("seed=3", "use --seeds"),
    ],
)
def test_what_has_its_own_place_cannot_be_set(plan, override, words):
    with pytest.raises(ConfigError, match=words):
        plan({"method": "mft"}, overrides=[override])


def test_an_override_of_how_masks_are_learned_is_refused_where_none_is_learned(plan):
    with pytest.raises(ConfigError, match=r"uses 'mask\.training\.epochs'"):
        plan({"method": "random"}, overrides=["mask.training.epochs=1"])


def test_a_seed_may_be_varied_where_there_is_one(plan):
    the_plan = plan({"method": "random", "grid": {"seed": [3, 4]}})
    assert [item.setup.seed for item in the_plan.variants if item.setup.method == "random"] == [3, 4]


def test_an_empty_list_in_a_grid_is_refused(plan):
    with pytest.raises(ConfigError, match=r"grid\.mask\.sparsity"):
        plan({"method": "mft", "grid": {"mask.sparsity": []}})


@pytest.mark.parametrize(
    ("grid", "more"),
    [
        ({"mask.training.seed": list(range(1000)), "mask.seed": list(range(1000))}, {}),
        ({"mask.sparsity": [0.1, 0.2]}, {"replicates": 10**9}),
        ({"mask.sparsity": [0.1, 0.2]}, {"seeds": tuple(range(20_000))}),
    ],
)
def test_more_variants_than_anybody_waits_for_are_refused_at_once(plan, grid, more):
    with pytest.raises(ConfigError, match=r"make [\d,]+ variants; valid: at most 20,000"):
        plan({"method": "mft", "grid": grid}, **more)


@pytest.mark.parametrize("value", [5, "sums", [5], ["sums"], {"name": "sums"}])
def test_benchmarks_that_are_no_list_of_settings_are_refused_in_a_profile_and_an_override(plan, tmp_path, value):
    profile = write_profile(tmp_path / "odd", benchmarks=value)
    with pytest.raises(ConfigError, match=r"benchmarks = .*: give a list of benchmarks"):
        plan({"method": "fft"}, profile=profile)
    with pytest.raises(ConfigError, match=r"benchmarks = .*: give a list of benchmarks"):
        plan({"method": "fft"}, overrides=[f"benchmarks={value}"])


@pytest.mark.parametrize("path", ["~no-such-user/model", "./" + "x" * 300, "loop"])
def test_a_path_that_leads_nowhere_is_refused(plan, tmp_path, path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "loop").symlink_to("loop")
    profile = write_profile(tmp_path / "odd", model={"path": path if path != "loop" else "./loop"})
    with pytest.raises(ConfigError, match="no path here"):
        plan({"method": "fft"}, profile=profile)


def test_two_benchmarks_of_one_name_are_refused(plan, tmp_path):
    profile = write_profile(tmp_path / "two", benchmarks=[BENCH, {**BENCH, "limit": 3}])
    with pytest.raises(ConfigError, match=r"benchmarks\.name: sums is there twice") as refusal:
        plan({"method": "fft"}, profile=profile)
    assert len(str(refusal.value)) < 200


def test_validations_without_rows_to_validate_on_are_refused_where_they_would_run(plan):
    with pytest.raises(ConfigError, match=r"fine_tune\.validations = 2, but data\.validation_rows = 0"):
        plan({"method": "fft"}, overrides=["data.validation_rows=0"])
    assert plan({"method": "base"}).variants  # which trains nothing


def test_validations_of_a_method_that_is_not_there_do_not_matter(plan, tmp_path):
    none = {**TRAINING, "validations": 0, "keep": "last"}
    rows = {"max_length": 64, "mixture": [{"path": "data/sums.jsonl"}]}
    profile = write_profile(tmp_path / "none", fine_tune=none, data=rows)
    assert plan({"method": "fft"}, profile=profile).variants
    with pytest.raises(ConfigError, match=r"continued\.validations = 2"):
        plan({"method": "continued-fft"}, profile=profile)


@pytest.mark.parametrize(("given", "meant"), [("2", "2"), ("1-2", "1-2"), ("1,3", "1,3")])
def test_layers_are_taken_as_people_write_them(plan, given, meant):
    the_plan = plan({"method": "magnitude"}, overrides=[f"mask.layers={given}"])
    assert the_plan.variants[-1].columns["layers"] == meant


@pytest.mark.parametrize("given", ["[1, 2]", "true", "1.5"])
def test_layers_that_are_no_text_are_refused_with_the_valid_forms(plan, given):
    with pytest.raises(ConfigError, match=r"mask\.layers = .*valid: a layer such as 2, a range such as 2-5"):
        plan({"method": "magnitude"}, overrides=[f"mask.layers={given}"])


def test_the_order_of_the_benchmarks_does_not_change_the_data(plan, tmp_path):
    profile = write_profile(tmp_path / "two")
    folder = profile.parent / "benchmarks"
    task = (folder / "sums.yaml").read_text().replace("mini_sums", "mini_more").replace("sums.jsonl", "more.jsonl")
    (folder / "more.yaml").write_text(task)
    (folder / "more.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n')
    more = {**BENCH, "name": "more", "task": "mini_more", "path": str(folder)}
    both = [{**BENCH, "path": str(folder)}, more]
    plans = [
        plan({"method": "fft", "grid": {"benchmarks": [benchmarks]}}, profile=profile)
        for benchmarks in (both, both[::-1])
    ]
    data = [{step.node.id for step in one.steps if step.node.stage == "prepare-data"} for one in plans]
    assert data[0] == data[1]


def test_adapters_start_from_the_base_or_from_the_fine_tuned_model(plan):
    the_plan = plan({"method": "fft"}, {"method": "lora"}, {"method": "continued-lora"})
    fft, lora, continued = the_plan.variants
    assert lora.trained.inputs["model"] == fft.trained.inputs["model"]
    assert continued.trained.inputs["model"].node.id == fft.trained.id
    assert lora.trained.recipe.lora == continued.trained.recipe.lora
    assert baselines(the_plan) == {"fft": None, "lora seed=0": "fft", "continued-lora seed=0": "fft"}


def test_adapters_without_their_section_are_refused(plan, tmp_path):
    profile = write_profile(tmp_path / "bare", lora=None)
    with pytest.raises(ConfigError, match=r"method 'lora' needs the section lora; give lora\.training"):
        plan({"method": "lora"}, profile=profile)


@pytest.mark.parametrize(
    ("method", "key", "value", "message"),
    [
        ("wanda", "mask.scope", "global", "makes no difference to wanda"),
        ("random", "mask.calibration_rows", 4, "makes no difference to random"),
        ("movement", "mask.score_init", "magnitude", "makes no difference to movement"),
        ("mft-soft", "mask.scope", "global-threshold", "'soft' has no scope 'global-threshold'; valid: global, local"),
        ("mft", "mask.min_kept", 0.2, "min_kept belongs to scope 'global'"),
        ("mft", "mask.modules", "attention,q_proj", "valid: attention, mlp, both, or names"),
    ],
)
def test_settings_of_masks_that_do_not_go_together_are_refused(plan, method, key, value, message):
    with pytest.raises(ConfigError, match=message):
        plan({"method": method, "grid": {key: [value]}})


def test_only_selectors_that_look_at_data_need_them(plan):
    the_plan = plan(*({"method": method} for method in ("mft", "mft-soft", "random", "magnitude", "wanda", "movement")))
    masks = [item for item in the_plan.variants if item.setup.method != "fft"]
    assert {item.setup.method: "data" in item.trained.inputs for item in masks} == {
        "mft": True, "mft-soft": True, "random": False, "magnitude": False, "wanda": True, "movement": True
    }  # fmt: skip


def test_a_rewind_goes_back_to_the_base_and_is_else_learned_as_mft_is(plan):
    the_plan = plan({"method": "base"}, {"method": "mft"}, {"method": "rewind"})
    base, _, mft, rewind = the_plan.variants
    model = base.evaluations["sums"].inputs["model"]
    assert rewind.trained.inputs["base"] == model
    assert rewind.trained.inputs.keys() == {*mft.trained.inputs, "base"}
    assert all(rewind.trained.inputs[name].node.id == given.node.id for name, given in mft.trained.inputs.items())
    assert rewind.trained.recipe == mft.trained.recipe.model_copy(update={"selector": "rewind"})
    merged = rewind.evaluations["sums"].inputs["model"].node
    assert merged.inputs["base"] == model
    assert "base" not in mft.evaluations["sums"].inputs["model"].node.inputs


def test_a_matched_random_mask_is_given_the_learned_mask_of_the_same_settings_seed_and_fine_tuning(plan):
    grid = {"mask.sparsity": [0.1, 0.3]}
    the_plan = plan({"method": "base"}, {"method": "mft", "grid": grid}, {"method": "matched-random", "grid": grid})
    found = {(item.setup.method, item.setup.mask.sparsity, item.setup.seed): item for item in the_plan.variants}
    matched = {key[1:]: item for key, item in found.items() if key[0] == "matched-random"}
    assert len(matched) >= 2
    for key, item in matched.items():
        learned = found["mft", *key]
        assert item.trained.inputs["mask"].node.id == learned.trained.id
        assert item.trained.inputs["model"].node.id == learned.trained.inputs["model"].node.id
        assert item.trained.inputs["base"] == the_plan.variants[0].evaluations["sums"].inputs["model"]
        assert "base" not in item.evaluations["sums"].inputs["model"].node.inputs, "it sets weights to zero"


def test_an_interpolation_is_of_the_fine_tuned_model_and_its_base_and_has_no_training_of_its_own(plan):
    grid = {"interpolation": [0.25, 0.5]}
    base, fft, quarter, half = plan({"method": "base"}, {"method": "wise-ft", "grid": grid}).variants
    assert (quarter.name, half.name) == ("wise-ft interpolation=0.25", "wise-ft interpolation=0.5")
    for item, alpha in ((quarter, 0.25), (half, 0.5)):
        assert item.trained.recipe == Interpolate(alpha=alpha)
        assert item.trained.inputs["base"] == base.model
        assert item.trained.inputs["model"].node.id == fft.model.node.id
        assert item.model.node.id == item.trained.id
        assert own_training(item.setup) is None


def test_an_average_is_of_the_fine_tuning_of_the_same_settings_with_all_its_states_kept(plan):
    the_plan = plan({"method": "mft"}, {"method": "checkpoint-average", "grid": {"averaged": [2, "all"]}})
    fft, mft, *average = the_plan.variants
    assert [item.name for item in average] == ["checkpoint-average averaged=2"], "all of two states are two"
    picked = average[0].model.node
    assert picked.recipe == PickCheckpoint(point=2, of=2, averaged=2)
    training = picked.inputs["training"].node
    assert training.recipe.training == fft.trained.recipe.training.model_copy(update={"keep": "all"})
    assert training.inputs.keys() == fft.trained.inputs.keys()
    assert mft.trained.inputs["model"].node.id == fft.trained.id, "what others start from stays the best state"
    assert average[0].baseline.trained.id == fft.trained.id
    with pytest.raises(ConfigError, match=r"averaged = 3: the fine-tuning has 2 validated states; set .* to 3 or more"):
        plan({"method": "checkpoint-average", "grid": {"averaged": [3]}})


def test_fft_again_is_the_same_model_asked_in_batches_of_another_size_and_no_other_key_has_it(plan):
    the_plan = plan({"method": "fft-again"}, {"method": "magnitude"}, overrides=["answered_together=3"])
    fft, again, magnitude = the_plan.variants
    ours, first = again.evaluations["sums"], fft.evaluations["sums"]
    assert ours.inputs == first.inputs
    assert ours.recipe == first.recipe.model_copy(update={"answered_together": 3})
    assert magnitude.evaluations["sums"].recipe.answered_together is None
    assert again.baseline.evaluations["sums"].id == first.id
    with pytest.raises(ConfigError, match="no variant of study 'mini-study' uses 'answered_together'"):
        plan({"method": "magnitude"}, overrides=["answered_together=3"])


def test_shira_has_the_data_rank_and_budget_of_lora_and_no_scale(plan):
    lora, shira = plan({"method": "lora"}, {"method": "shira"}).variants[-2:]
    assert shira.trained.recipe.sparse
    assert shira.trained.recipe.training == lora.trained.recipe.training
    assert shira.trained.recipe.lora == Lora(rank=lora.trained.recipe.lora.rank, dropout=0)
    assert shira.trained.inputs["data"].node.id == lora.trained.inputs["data"].node.id
    assert shira.trained.inputs["model"] == lora.trained.inputs["model"]
    with pytest.raises(ConfigError, match="makes no difference to shira"):
        plan({"method": "shira", "grid": {"lora.alpha": [8, 16]}})


def test_a_mask_of_the_base_is_learned_on_and_merged_into_the_base_and_compared_with_the_fine_tuning(plan):
    the_plan = plan({"method": "base"}, {"method": "mft"}, {"method": "mft-base"})
    base, fft, mft, masked = the_plan.variants
    assert masked.trained.inputs["model"] == masked.model.node.inputs["model"] == base.model
    assert masked.trained.recipe == mft.trained.recipe
    assert masked.trained.inputs["data"].node.id == mft.trained.inputs["data"].node.id
    assert masked.baseline.trained.id == fft.trained.id
    assert baselines(the_plan)[masked.name] == "fft"
    assert masked.name == "mft-base sparsity=0.1 layers=1-2 seed=0"
    assert masked.trained.label != mft.trained.label


def test_a_wanda_mask_can_stand_beside_a_global_scope(plan):
    the_plan = plan({"method": "mft"}, {"method": "wanda"}, overrides=["mask.scope=global"])
    scopes = {item.setup.method: item.trained.recipe.scope for item in the_plan.variants if item.setup.method != "fft"}
    assert scopes == {"mft": "global", "wanda": "local"}


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """A profile of two domains and their mixture, each with a benchmark of its own name."""
    folder = tmp_path_factory.mktemp("domains")
    path = write_profile(folder)
    profile = yaml.safe_load(path.read_text())
    rows = profile["defaults"].pop("data")
    bench = profile["defaults"].pop("benchmarks")[0]
    (folder / "data" / "half.jsonl").write_text("".join((folder / "data" / "sums.jsonl").open().readlines()[:40]))
    half = {**rows, "mixture": [{"path": "data/half.jsonl"}]}
    both = {**rows, "mixture": [*rows["mixture"], *half["mixture"]]}
    named = {name: [{**bench, "name": name}] for name in ("sums", "half")}
    profile["domains"] = {
        "mixed": {"data": both, "benchmarks": named["sums"]},
        "sums": {"data": rows, "benchmarks": named["sums"]},
        "half": {"data": half, "benchmarks": named["half"]},
    }
    profile["each_domain"] = ["sums", "half"]
    profile["layer_groups"] = ["0-1", "2-3"]
    path.write_text(yaml.safe_dump(profile, sort_keys=False))
    return path


def test_each_domain_is_each_that_the_profile_lists(plan, domains):
    the_plan = plan({"method": "mft", "domain": "each domain"}, profile=domains)
    assert [(item.setup.domain, item.setup.method) for item in the_plan.variants] == [
        ("sums", "fft"), ("sums", "mft"), ("half", "fft"), ("half", "mft")
    ]  # fmt: skip
    content = yaml.safe_load(domains.read_text())
    for listed, message in ((["sums", "hlaf"], "unknown domain 'hlaf'.*half"), ([], None)):
        changed = domains.with_name("changed.yaml")
        changed.write_text(yaml.safe_dump({**content, "each_domain": listed}, sort_keys=False))
        with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
            every = plan({"method": "fft", "domain": "each domain"}, profile=changed)
    assert [item.setup.domain for item in every.variants] == ["mixed", "sums", "half"]


def test_each_layer_group_is_what_the_profile_lists(plan, domains, folder):
    the_plan = plan({"method": "magnitude", "grid": {"mask.layers": "each layer group"}}, profile=domains)
    assert [item.columns["layers"] for item in the_plan.variants if item.baseline] == ["0-1", "2-3"]
    with pytest.raises(ConfigError, match="profile mini: the study asks for each layer group; list some"):
        plan({"method": "magnitude", "grid": {"mask.layers": "each layer group"}})


def test_a_mask_can_be_learned_on_the_data_of_another_domain(plan, domains):
    the_plan = plan({"method": "mft", "domain": "mixed", "grid": {"mask.domain": "each domain"}}, profile=domains)
    fft, *masks = the_plan.variants
    sums, half = (item.trained.inputs["data"].node for item in masks)
    assert sums.id != half.id
    assert fft.trained.inputs["data"].node.id not in (sums.id, half.id)
    assert all(item.trained.inputs["model"].node.id == fft.trained.id for item in masks)
    assert [item.columns["mask.domain"] for item in masks] == ["sums", "half"]


def test_fine_tuning_can_go_on_with_the_data_of_another_domain(plan, domains):
    variants = [{"method": method, "domain": "mixed", "grid": {f"{section}.domain": "each domain"}}
                for method, section in (("mft", "mask"), ("continued-fft", "continued"))]  # fmt: skip
    fft, *others = plan(*variants, profile=domains).variants
    masks, continued = others[:2], others[2:]
    assert [item.name for item in continued] == [
        "continued-fft seed=0 continued.domain=sums", "continued-fft seed=0 continued.domain=half",
    ]  # fmt: skip
    for mask, control in zip(masks, continued, strict=True):
        assert control.trained.inputs["data"].node.id == mask.trained.inputs["data"].node.id
        assert control.trained.inputs["model"].node.id == fft.trained.id
        assert control.baseline.evaluations["sums"].id == fft.evaluations["sums"].id
    own = plan({"method": "continued-fft", "domain": "mixed"}, profile=domains).variants[1]
    assert own.trained.inputs["data"].node.id == fft.trained.inputs["data"].node.id
    assert own.trained.recipe == continued[0].trained.recipe, "the data are an input, and no part of the recipe"


@pytest.mark.parametrize(("method", "section"), [("mft", "mask"), ("continued-fft", "continued")])
def test_data_and_domain_of_a_section_are_not_given_both(plan, domains, tmp_path, method, section):
    profile = yaml.safe_load(domains.read_text())
    profile["defaults"][section]["data"] = profile["domains"]["half"]["data"]
    both = domains.with_name(f"both-{section}.yaml")
    both.write_text(yaml.safe_dump(profile))
    with pytest.raises(ConfigError, match=rf"{section}\.data and {section}\.domain"):
        plan({"method": method, "domain": "mixed", "grid": {f"{section}.domain": ["sums"]}}, profile=both)


def test_a_study_can_ask_for_the_benchmarks_of_all_domains(plan, domains, tmp_path):
    study = load_study(str(write_study(tmp_path, [{"method": "mft", "domain": "half"}])))
    own, every = (
        make_plan(asked, load_profile(str(domains)), ArtifactStore(tmp_path / "home"))
        for asked in (study, study.model_copy(update={"benchmarks": "all"}))
    )
    assert [list(item.evaluations) for item in own.variants] == [["half"], ["half"]]
    assert [list(item.evaluations) for item in every.variants] == [["half", "sums"], ["half", "sums"]]
    assert own.variants[1].trained.id == every.variants[1].trained.id  # what is trained does not depend on it


def test_a_relative_value_is_that_many_times_the_profiles(plan):
    the_plan = plan({"method": "mft", "grid": {"mask.training.learning_rate": ["x0.3", "x1", 0.5]}})
    rates = [item.trained.recipe.training.learning_rate for item in the_plan.variants if item.baseline]
    assert rates == [0.3 * TRAINING["learning_rate"], TRAINING["learning_rate"], 0.5]
    assert [item.columns["mask.training.learning_rate"] for item in the_plan.variants if item.baseline] == rates
    with pytest.raises(ConfigError, match="is so many times the profile's own, and it has no"):
        plan({"method": "mft", "grid": {"mask.training.max_steps": ["x0.3"]}})


def replicated(plan, *variants, replicates=2, seeds=(0, 1)):
    found = plan(*variants, seeds=seeds, replicates=replicates)
    return found, {(item.setup.method, item.setup.replicate, item.setup.seed): item for item in found.variants}


def test_every_method_of_a_replicate_starts_from_and_is_compared_with_its_own_fine_tuning(plan):
    methods = [{"method": name} for name in PLAIN_METHODS]
    the_plan, items = replicated(plan, *methods)
    recipe, nodes = the_plan.comparison()
    for row, node in zip(recipe.variants, nodes, strict=True):
        if row["baseline"] is not None:
            own = recipe.variants[row["baseline"]]
            assert (own["method"], own.get("replicate")) == ("fft", row.get("replicate"))
            if METHODS[row["method"]].starts_from == "fft" and row["method"] != "checkpoint-average":
                assert parent(nodes[row["baseline"]]) in (parent(node), continued_from(node))
    fine_tunings = [items["fft", replicate, 0].trained for replicate in range(2)]
    assert [node.recipe.training.seed for node in fine_tunings] == [42, 43]
    assert items["continued-fft", 1, 0].trained.inputs["model"].node.id == fine_tunings[1].id
    assert items["checkpoint-average", 1, 0].trained.inputs["training"].node.recipe.training.seed == 43
    bases = [row["baseline"] for row in recipe.variants if row["method"] == "base"]
    assert [nodes[index].inputs["model"].node.id for index in bases] == [node.id for node in fine_tunings]


def continued_from(node):
    """Return the id of the fine-tuning that a further training starts from."""
    given = node.inputs["model"].node.inputs["model"]
    return given.node.id if hasattr(given, "node") else None


def test_no_two_trainings_of_a_method_draw_the_same_numbers(plan):
    methods = [{"method": name} for name, row in METHODS.items() if row.seeded]
    _, items = replicated(plan, *methods, replicates=3)
    for name in (variant["method"] for variant in methods):
        recipes = [item.trained.recipe for key, item in items.items() if key[0] == name]
        draws = [recipe.training.seed if isinstance(recipe, FineTune) else recipe.seed for recipe in recipes]
        assert len(draws) == len(set(draws)) == 6


def test_the_first_replicate_is_the_study_without_replicates(plan):
    methods = [{"method": name} for name in PLAIN_METHODS]
    alone, _ = replicated(plan, *methods, replicates=1)
    several, _ = replicated(plan, *methods, replicates=3)
    first = [item for item in several.variants if not item.setup.replicate]
    assert [item.name for item in first] == [item.name for item in alone.variants]
    assert [item.columns for item in first] == [item.columns for item in alone.variants]
    assert {node.id for node in unique_nodes(first)} == {step.node.id for step in alone.steps}
    assert several.replicates == 3
    assert len(several.variants) == 3 * len(alone.variants)


def test_replicates_have_names_and_labels_of_their_own(plan):
    the_plan, items = replicated(plan, {"method": "fft"}, {"method": "magnitude"}, {"method": "mft"}, seeds=(0,))
    assert items["mft", 1, 0].name == "mft sparsity=0.1 layers=1-2 seed=0 replicate=1"
    assert items["magnitude", 1, 0].name == "magnitude sparsity=0.1 layers=1-2 replicate=1"
    assert items["fft", 1, 0].trained.label == "fine-tune sums replicate=1"
    labels = [step.node.label for step in the_plan.steps]
    assert len(labels) == len(set(labels))


def test_a_study_has_no_more_fine_tunings_than_its_profile_lets_it_have(plan, folder, tmp_path):
    study = load_study(str(write_study(tmp_path, [{"method": "fft"}, {"method": "mft"}])))
    study, profile = study.model_copy(update={"replicates": 5}), load_profile(str(folder / "mini.yaml"))

    def replicates(most, asked=None):
        of_profile = profile.model_copy(update={"max_replicates": most})
        return make_plan(study, of_profile, ArtifactStore(tmp_path / "home"), replicates=asked).replicates

    assert profile.max_replicates == 1
    assert [replicates(1), replicates(3), replicates(9)] == [1, 3, 5]
    assert [replicates(1, asked=4), replicates(9, asked=1)] == [4, 1]


def test_a_replicate_is_no_setting(plan):
    with pytest.raises(ConfigError, match="--set replicate: replicate cannot be set; use --replicates"):
        plan({"method": "fft"}, overrides=["replicate=1"])

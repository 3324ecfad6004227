"""Studies expand into chains that share what they have in common, without computing anything."""

import json
import subprocess
import sys

import pytest
import yaml

from mft_core.errors import ConfigError
from mft_core.methods import METHODS
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.sources import local_checkpoint
from pipelines.config import resolve
from pipelines.config.by_name import names
from pipelines.config.profile import load_profile
from pipelines.config.study import Contrasts, load_study
from pipelines.config.yaml_to_setups import parse_overrides
from pipelines.plan.plan import make_plan, make_plans
from tests.support.mini import PLAIN_METHODS, write_profile, write_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mini")
    write_profile(path)
    write_study(path)
    return path


def plan(folder, overrides=(), seeds=None):
    store = ArtifactStore(folder / "home")
    study, profile = load_study(str(folder / "mini-study.yaml")), load_profile(str(folder / "mini.yaml"))
    return make_plan(study, profile, store, overrides, seeds)


def ids(the_plan):
    return {step.node.label: step.node.id for step in the_plan.steps}


def changed(folder, *overrides):
    before, after = ids(plan(folder)), ids(plan(folder, overrides))
    return {label.split()[0] for label, node_id in before.items() if after.get(label) != node_id}


def test_variants_share_data_and_fine_tuning(folder):
    stages = [step.node.stage for step in plan(folder).steps]
    masks = sum(row.selector is not None for row in METHODS.values())
    assert stages.count("prepare-data") == 1
    assert stages.count("fine-tune") == 6  # full, full with its states kept, continued, and three with adapters
    assert stages.count("learn-mask") == stages.count("merge-mask") == masks + 1  # mft at two sparsities
    assert stages.count("evaluate") == len(PLAIN_METHODS) + 1


def test_a_node_comes_after_what_it_needs(folder):
    seen = set()
    for step in plan(folder).steps:
        for given in step.node.inputs.values():
            assert not hasattr(given, "node") or given.node.id in seen
        seen.add(step.node.id)


_MASKS = {"learn-mask", "merge-mask", "evaluate"}
_ADAPTERS = {"lora", "shira", "continued-lora", "evaluate"}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("mask.training.learning_rate=0.5", _MASKS),
        ("continued.learning_rate=0.5", {"continue-fft", "evaluate"}),
        ("lora.rank=2", _ADAPTERS),
        ("fine_tune.epochs=1", {"fine-tune", "average", "continue-fft", "continued-lora", "interpolate"} | _MASKS),
        (
            "data.max_length=32",
            {
                "prepare-data",
                "fine-tune",
                "continue-fft",
                "average",
                "lora",
                "shira",
                "continued-lora",
                "interpolate",
                "learn-mask",
                "merge-mask",
                "evaluate",
            },
        ),
        ("runtime.threads=2", set()),
    ],
)
def test_an_override_changes_exactly_the_descendants(folder, override, stages):
    assert changed(folder, override) == stages


def test_controls_do_not_depend_on_how_the_learned_mask_is_trained(folder):
    before, after = ids(plan(folder)), ids(plan(folder, ["mask.training.learning_rate=0.5"]))
    controls = [label for label in before if any(f"({name})" in label for name in ("random", "magnitude", "wanda"))]
    assert controls
    assert all(before[label] == after[label] for label in controls)


def test_seeds_multiply_only_the_methods_that_have_one(folder):
    methods = [item.setup.method for item in plan(folder, seeds=[0, 1, 2]).variants]
    expected = {name: 3 if row.seeded else 1 for name, row in METHODS.items() if name in PLAIN_METHODS}
    assert {m: methods.count(m) for m in methods} == expected | {"mft": 6}
    assert [name for name, count in expected.items() if count == 1] == [
        "base", "fft", "wise-ft", "checkpoint-average", "fft-again", "magnitude", "delta-magnitude"
    ]  # fmt: skip


def test_ids_do_not_depend_on_where_the_files_lie(folder, tmp_path):
    write_profile(tmp_path)
    write_study(tmp_path)
    assert ids(plan(folder)) == ids(plan(tmp_path))


def test_two_ways_to_write_the_same_layers_are_one_recipe(folder):
    assert ids(plan(folder, ["mask.layers=1,2"])) == ids(plan(folder, ["mask.layers=middle:2"])) == ids(plan(folder))


def test_every_mask_is_compared_with_the_fine_tuned_model_of_its_domain(folder):
    the_plan = plan(folder)
    recipe, nodes = the_plan.comparison()
    fft = next(i for i, column in enumerate(recipe.variants) if column["method"] == "fft")
    assert [column["baseline"] for column in recipe.variants] == [
        None if column["method"] == "fft" else fft for column in recipe.variants
    ]
    assert len(nodes) == len(recipe.variants)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mask.sparsty=0.2", r"unknown key 'mask.sparsty'.*Did you mean 'sparsity'"),
        ("maks.sparsity=0.2", r"unknown key 'maks.sparsity'.*Did you mean 'mask'"),
        ("mask.sparsity=0.2", r"varies mask.sparsity itself"),
        ("mask.training.batch_size=0", r"mask.training.batch_size = 0: .*greater than 0"),
        ("mask.layers=2-9", r"2-9"),
        ("mask.layers=3-1", r"3-1"),
        ("mask.layers=0-2,1", r"0-2,1"),
        ("runtime.cores=3", r"unknown key.*cores"),
        ("mask.sparsity", r"KEY=VALUE"),
        ("fine_tune.keep=best", None),
    ],
)
def test_a_bad_override_is_named_with_what_is_valid(folder, override, message):
    if message is None:
        plan(folder, [override])
    else:
        with pytest.raises(ConfigError, match=message):
            plan(folder, [override])


def test_a_number_in_quotes_is_text_in_an_override_and_without_them_what_people_mean():
    given = parse_overrides(["engine_version='0.11'", 'model.revision="12e5"', "mask.training.learning_rate=2e-5"])
    assert given == {"engine_version": "0.11", "model.revision": "12e5", "mask.training.learning_rate": 2e-5}


@pytest.mark.parametrize("own", ["2.0e-5", "2e-5"])
def test_a_factor_is_that_of_the_profiles_number_however_yaml_reads_it(folder, tmp_path, own):
    profile = yaml.safe_load((folder / "mini.yaml").read_text())
    profile["defaults"]["mask"]["training"]["learning_rate"] = yaml.safe_load(own)
    (folder / "factor.yaml").write_text(yaml.safe_dump(profile))
    write_study(tmp_path, [{"method": "mft", "grid": {"mask.training.learning_rate": ["x0.5"]}}])
    study = load_study(str(tmp_path / "mini-study.yaml"))
    the_plan = make_plan(study, load_profile(str(folder / "factor.yaml")), ArtifactStore(folder / "home"))
    (masked,) = (item.setup for item in the_plan.variants if item.setup.method == "mft" and not item.setup.seed)
    assert masked.mask.training.learning_rate == 1e-5


def test_a_domain_without_benchmarks_of_its_own_is_asked_those_of_the_others(folder, tmp_path):
    profile = yaml.safe_load((folder / "mini.yaml").read_text())
    profile["domains"]["bare"] = {"benchmarks": None}
    (folder / "bare.yaml").write_text(yaml.safe_dump(profile))
    write_study(tmp_path, [{"method": "fft", "domain": "bare"}])
    study = load_study(str(tmp_path / "mini-study.yaml")).model_copy(update={"benchmarks": "all"})
    (variant,) = make_plan(study, load_profile(str(folder / "bare.yaml")), ArtifactStore(folder / "home")).variants
    assert list(variant.evaluations) == [bench["name"] for bench in profile["defaults"]["benchmarks"]]


@pytest.mark.parametrize("sparsity", ["1", "-0.1", "1.5", ".nan"])
def test_a_sparsity_outside_the_unit_interval_is_refused(folder, tmp_path, sparsity):
    write_study(tmp_path, [{"method": "fft"}, {"method": "mft"}])
    study, profile = load_study(str(tmp_path / "mini-study.yaml")), load_profile(str(folder / "mini.yaml"))
    with pytest.raises(ConfigError, match="sparsity"):
        make_plan(study, profile, ArtifactStore(folder / "home"), [f"mask.sparsity={sparsity}"])


def test_an_override_that_nothing_uses_is_refused(folder, tmp_path):
    write_study(tmp_path, [{"method": "base"}, {"method": "fft"}])
    study, profile = load_study(str(tmp_path / "mini-study.yaml")), load_profile(str(folder / "mini.yaml"))
    with pytest.raises(ConfigError, match="no variant of study 'mini-study' uses 'mask'"):
        make_plan(study, profile, ArtifactStore(folder / "home"), ["mask.sparsity=0.2"])


@pytest.mark.parametrize(("load", "kind"), [(load_study, "study"), (load_profile, "profile")])
def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(load, kind):
    known = names(kind)[0]
    with pytest.raises(ConfigError, match=rf"unknown {kind} '{known}x'. Did you mean '{known}'\? Valid: "):
        load(f"{known}x")


def test_a_contrast_of_variants_that_the_study_has_not_is_refused_before_anything_runs(folder):
    study, profile = load_study(str(folder / "mini-study.yaml")), load_profile(str(folder / "mini.yaml"))

    def contrasts(text):
        declared = study.model_copy(update={"contrasts": Contrasts(primary=(text,))})
        return make_plan(declared, profile, ArtifactStore(folder / "home")).comparison()[0].contrasts

    assert contrasts("mft sparsity=0.1 - magnitude sparsity=0.1") == ("mft sparsity=0.1 - magnitude sparsity=0.1",)
    with pytest.raises(ConfigError, match=r"'mft sparsity=0\.3 - magnitude sparsity=0\.3': of these variants no two"):
        contrasts("mft sparsity=0.3 - magnitude sparsity=0.3")
    with pytest.raises(ConfigError, match=r"'mft seed=0 - fft': of these variants no two"):
        contrasts("mft seed=0 - fft")


def test_planning_imports_neither_torch_nor_prefect_nor_mlflow(folder):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import pipelines.cli\n"
        "from mft_core.store.artifacts import ArtifactStore\n"
        "from pipelines.config.profile import load_profile; from pipelines.config.study import load_study\n"
        "from pipelines.cost.predicted import bills\n"
        "from pipelines.plan.plan import make_plan\n"
        "from pipelines.cost.plan_view import as_dict, show\n"
        f"folder = Path({str(folder)!r})\n"
        "store = ArtifactStore(folder / 'home')\n"
        "study, profile = load_study(str(folder / 'mini-study.yaml')), load_profile(str(folder / 'mini.yaml'))\n"
        "(bill,) = bills([make_plan(study, profile, store)], store)\n"
        "show(bill), as_dict(bill)\n"
        "print([m for m in ('torch', 'prefect', 'mlflow', 'transformers', 'pandas') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_planning_looks_at_a_model_once_for_all_variants_and_the_next_planning_anew(folder, tmp_path, monkeypatch):
    looked = []

    def counted(kind, directory):
        looked.append(kind)
        return local_checkpoint(kind, directory)

    monkeypatch.setattr(resolve, "local_checkpoint", counted)
    write_study(tmp_path, [{"method": "mft", "grid": {"mask.sparsity": [0.1, 0.2, 0.3]}}], seeds=(0, 1))
    study, profile = load_study(str(tmp_path / "mini-study.yaml")), load_profile(str(folder / "mini.yaml"))
    for _ in range(2):
        plans = make_plans([study, study], profile, ArtifactStore(folder / "home"))
        assert all(len(plan.variants) == 7 for plan in plans)
        assert sorted(looked) == ["model", "tokenizer"]
        looked.clear()


def test_the_rule_for_overlap_is_part_of_the_data_only_where_a_question_is_long_enough_for_it(tmp_path):
    write_profile(tmp_path)
    write_study(tmp_path, [{"method": "fft"}])

    def rule(*overrides):
        (found,) = {step.node.recipe for step in plan(tmp_path, overrides).steps if step.node.stage == "prepare-data"}
        return found.overlap

    assert rule() == rule("data.overlap=0.3") == 0.0, "no question has 13 words: the keys are those of before"
    items = tmp_path / "benchmarks" / "sums.jsonl"
    items.write_text(items.read_text() + json.dumps({"question": "what is " + "1 + " * 6 + "1", "answer": "7"}) + "\n")
    assert rule() == 0.8
    assert rule("data.overlap=0.3") == 0.3
    assert rule("data.overlap=0") == 0.0

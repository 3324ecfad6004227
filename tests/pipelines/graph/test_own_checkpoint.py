"""A profile without `fine_tune`: the user's checkpoint is what everything starts from and is compared with."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from mft_core.checkpoints.files import load_model
from mft_core.errors import ConfigError
from mft_core.masks.mask_file import load_mask, save_mask
from mft_core.masks.merge import merge
from mft_core.recipes import LearnMask
from mft_core.stages import get_stage
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.sources import Source
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.graph.nodes import Edge, closure
from pipelines.plan.analyses import answers
from pipelines.plan.plan import make_plan
from pipelines.plan.preflight import check
from tests.support.mini import PLAIN_METHODS, write_profile, write_study
from tests.support.small_training import make_context
from tests.support.tiny import make_model, make_tokenizer, save_checkpoint


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def planned(folder, *variants, **changes):
    profile = write_profile(folder, **{"fine_tune": None, **changes})
    chosen = write_study(folder, list(variants) or None)
    store = ArtifactStore(folder / "home")
    return make_plan(load_study(str(chosen)), load_profile(str(profile)), store), store


def adapter_of(folder, base):
    """Save an adapter that changes its base, as a trainer does; returns its directory and the model with it."""
    model = get_peft_model(make_model(seed=0), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder, model.merge_and_unload()


def test_nothing_is_fine_tuned_and_every_gain_is_against_the_given_checkpoint(folder):
    plan, store = planned(folder, base={"path": "before"} if save_checkpoint(folder / "before", seed=1) else None)
    assert [item.setup.method for item in plan.variants if item.baseline is None] == ["base", "fft"]
    fft = next(item for item in plan.variants if item.setup.method == "fft")
    assert isinstance(fft.model, Source)
    assert fft.model.location == str(folder / "model")
    recipe, nodes = plan.comparison()
    against = {nodes[row["baseline"]].id for row in recipe.variants if row["baseline"] is not None}
    assert against == {fft.evaluations["sums"].id}
    labels = [node.label.split()[0] for node in closure(answers(plan)) if node.stage == "fine-tune"]
    assert sorted(labels) == [
        "continue-fft",
        "continued-lora",
        "lora",
        "shira",
    ]  # treatments, none of them the baseline's
    assert any("given" in note for note in recipe.notes)
    check(plan, store, {})


def test_masks_and_further_training_start_from_the_given_checkpoint_and_the_rest_from_its_base(folder):
    save_checkpoint(folder / "before", seed=1)
    plan, _ = planned(folder, base={"path": "before"})
    of = {item.setup.method: item for item in plan.variants}
    for method in ("mft", "random", "wanda", "continued-fft", "continued-lora"):
        assert of[method].trained.inputs["model"] == of["fft"].model, method
    before = of["base"].model
    assert before.location == str(folder / "before")
    assert of["lora"].trained.inputs["model"] == before
    assert of["mft-base"].trained.inputs["model"] == before
    assert of["rewind"].trained.inputs["base"] == before
    assert of["rewind"].trained.inputs["model"] == of["fft"].model


def test_what_needs_a_base_that_nobody_named_is_left_out_and_said(folder):
    plan, _ = planned(folder)
    without = {"base", "lora", "shira", "rewind", "matched-random", "delta-magnitude", "dare", "wise-ft", "mft-base"}
    assert {item.setup.method for item in plan.variants} == {*PLAIN_METHODS} - without - {"checkpoint-average"}
    assert "Left out, since nothing is fine-tuned here: checkpoint-average." in plan.notes
    assert f"Left out, since the profile names no `base`: {', '.join(sorted(without))}." in plan.notes
    with pytest.raises(ConfigError, match="name it as `base:`"):
        planned(folder, {"method": "rewind"})
    with pytest.raises(ConfigError, match="describe it as `fine_tune:`"):
        planned(folder, {"method": "checkpoint-average"})


def test_a_contrast_with_a_method_that_is_left_out_is_left_out_too(folder):
    store = ArtifactStore(folder / "home")
    plans = [
        make_plan(load_study("neighbours"), load_profile("tiny"), store, asked) for asked in ([], ["fine_tune=null"])
    ]
    assert [len(plan.comparison()[0].contrasts) for plan in plans] == [1, 0]


def test_the_shipped_studies_plan_on_a_given_checkpoint(folder):
    for study in ("sparsity", "main", "landscape", "anatomy", "cost", "layer-groups", "trajectory"):
        store = ArtifactStore(folder / "home")
        plan = make_plan(load_study(study), load_profile("tiny"), store, ["fine_tune=null"])
        assert plan.variants
        assert not [node for node in closure(answers(plan)) if node.label.startswith("fine-tune ")]


def test_a_sharded_checkpoint_is_a_baseline_like_any_other(folder):
    write_profile(folder)
    make_model().save_pretrained(folder / "sharded", max_shard_size="40KB")
    make_tokenizer().save_pretrained(folder / "sharded")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    plan, store = planned(folder, {"method": "mft"}, {"method": "magnitude"}, model={"path": "sharded"})
    check(plan, store, {})
    node = next(item.trained for item in plan.variants if item.setup.method == "magnitude")
    out = folder / "mask"
    out.mkdir()
    model = node.inputs["model"].local_path()
    get_stage("learn-mask").run(node.recipe, {"model": model}, out, make_context(folder / "work"))
    merge(model, out / "mask", folder / "merged")
    assert load_mask(out / "mask").zeros


def test_a_baseline_of_pickled_weights_is_refused_before_compute_where_a_mask_is_asked_for(folder):
    plan, store = planned(folder, {"method": "magnitude"})
    torch.save(load_file(folder / "model" / "model.safetensors"), folder / "model" / "pytorch_model.bin")
    (folder / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"Pickled weights \(\*\.bin\) are not read here; convert them"):
        check(plan, store, {})


def test_an_adapter_is_merged_first_into_the_model_that_it_names(folder):
    save_checkpoint(folder / "model")
    _, expected = adapter_of(folder / "adapter", str(folder / "model"))
    plan, store = planned(folder, model={"path": "adapter"})
    check(plan, store, {})
    of = {item.setup.method: item for item in plan.variants}
    made = of["fft"].model
    assert isinstance(made, Edge)
    assert made.node.stage == "merge-adapter"
    assert of["mft"].trained.inputs["model"].node.id == made.node.id
    assert of["base"].model.location == str(folder / "model")
    assert any("adapter" in note for note in plan.notes)
    out = folder / "out"
    out.mkdir()
    inputs = {name: given.local_path() for name, given in made.node.inputs.items()}
    get_stage("merge-adapter").run(made.node.recipe, inputs, out, make_context(folder / "work"))
    merged = load_model(out / "model", torch.float32, torch.device("cpu"))
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight, msg=name)
    before = make_model().model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(merged.model.layers[0].self_attn.q_proj.weight, before)


def test_an_adapter_of_another_model_is_refused_in_words(folder):
    save_checkpoint(folder / "model")
    adapter, _ = adapter_of(folder / "adapter", str(folder / "model"))
    save_checkpoint(folder / "small", hidden_size=16)
    out = folder / "out"
    out.mkdir()
    stage, inputs = get_stage("merge-adapter"), {"model": folder / "small", "adapter": adapter}
    with pytest.raises(ConfigError, match="`base:` of the profile names another"):
        stage.run(stage.recipe(), inputs, out, make_context(folder / "work"))


def test_an_adapter_whose_base_is_gone_is_told_how_to_name_it(folder):
    save_checkpoint(folder / "model")
    adapter_of(folder / "adapter", "/gone/model")
    with pytest.raises(ConfigError, match=r"belongs to /gone/model, which is not there; say where it is as `base:`"):
        planned(folder, model={"path": "adapter"})
    plan, _ = planned(folder, model={"path": "adapter"}, base={"path": "model"})
    assert plan.variants[0].model.location == str(folder / "model")


def test_an_existing_checkpoint_and_an_existing_mask_are_variants(folder):
    save_checkpoint(folder / "model")
    save_checkpoint(folder / "other", seed=3)
    out = folder / "made"
    out.mkdir()
    recipe = LearnMask(selector="magnitude", sparsity=0.3, layers="1-2")
    get_stage("learn-mask").run(recipe, {"model": folder / "model"}, out, make_context(folder / "work"))
    save_mask(load_mask(out / "mask"), folder / "a-mask")
    places = [str(folder / name) for name in ("other", "a-mask", "made")]
    plan, store = planned(folder, {"method": "fft"}, {"method": "existing", "grid": {"existing": places[:2]}})
    check(plan, store, {})
    fft, checkpoint, mask = plan.variants
    assert [item.name for item in plan.variants] == ["fft", "existing existing=other", "existing existing=a-mask"]
    assert checkpoint.model.location == places[0]
    assert checkpoint.baseline.evaluations == {"sums": checkpoint.baseline.evaluations["sums"]}
    assert mask.model.node.stage == "merge-mask"
    assert mask.model.node.inputs["model"] == fft.model
    assert mask.model.node.inputs["mask"].digest == plan_mask(folder, places[2])
    with pytest.raises(ConfigError, match="needs `existing`"):
        planned(folder, {"method": "existing"})


def plan_mask(folder, place):
    """Return the digest of the mask that an artifact's directory holds."""
    plan, _ = planned(folder, {"method": "existing", "grid": {"existing": [place]}})
    return plan.variants[-1].model.node.inputs["mask"].digest


def test_a_template_of_the_profile_goes_with_every_model_that_no_stage_trained(folder):
    (folder / "chat.jinja").write_text(make_tokenizer().chat_template)
    save_checkpoint(folder / "before", seed=1)
    plan, store = planned(folder, model={"path": "model", "chat_template": "chat.jinja"}, base={"path": "before"})
    check(plan, store, {})
    with_template = {item.setup.method for item in plan.variants if "chat_template" in item.evaluations["sums"].inputs}
    trained = {"continued-fft", "lora", "shira", "continued-lora"}
    assert with_template == {*PLAIN_METHODS} - trained - {"checkpoint-average"}
    of = {item.setup.method: item for item in plan.variants}
    assert all("chat_template" in of[method].trained.inputs for method in trained)


def test_weights_that_were_dequantised_are_said_above_the_table(folder):
    write_profile(folder)
    config = folder / "model" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"dequantised_from": "Q4_1"}))
    text = yaml.safe_load((folder / "mini.yaml").read_text())
    text["defaults"]["fine_tune"] = None
    (folder / "mini.yaml").write_text(yaml.safe_dump(text))
    study = load_study(str(write_study(folder, [{"method": "magnitude"}])))
    plan = make_plan(study, load_profile(str(folder / "mini.yaml")), ArtifactStore(folder / "home"))
    assert any("dequantised from Q4_1" in note for note in plan.comparison()[0].notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"path": "./m.gguf"}}, "mft model import"),
        ({"base": {"path": "model"}}, "that is the model itself"),
        ({"fine_tune": {"learning_rate": 1e-3, "epochs": 1, "batch_size": 8}, "base": {"path": "model"}}, "leave out"),
    ],
)
def test_what_cannot_be_a_baseline_or_base_is_refused_with_what_to_do(folder, changes, words):
    with pytest.raises(ConfigError, match=words):
        planned(folder, **changes)

"""Keys: equal for equal work, different for different work, the same everywhere."""

import json
import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from mft_core.cache_key import canonical_json, digest, stage_key
from mft_core.recipes import (
    Anatomy,
    Evaluate,
    FineTune,
    Landscape,
    LearnMask,
    MixturePart,
    PredictLayers,
    PrepareData,
    Randomisation,
    Training,
)
from mft_core.store.sources import local_checkpoint, local_file

TRAINING = Training(learning_rate=1e-3, epochs=2, batch_size=8)
RECIPES = {
    "prepare-data": PrepareData(mixture=(MixturePart(rows=10),), max_length=64),
    "fine-tune": FineTune(training=TRAINING),
    "learn-mask": LearnMask(sparsity=0.1, layers="0-3", score_init="normal", training=TRAINING),
    "evaluate": Evaluate(task="tiny_arithmetic"),
    "anatomy": Anatomy(masks=({"method": "mft", "seed": 0},)),
    "landscape": Landscape(),
    "predict-layers": PredictLayers(groups=("0-3", "4-7", "8-11"), sparsity=0.1),
    "randomisation": Randomisation(benchmarks=("sums",), evaluations=(Evaluate(task="tiny_arithmetic", limit=200),)),
}
GOLDEN = {
    "prepare-data": "3e5617a799a2a4ba512407ceeaf30acee99ef440af7154f3d2bad8195b46a81c",
    "fine-tune": "e5023f88c9f74615921384fd06342b05c5ed552f2dc346a6dec89abbc7675226",
    "learn-mask": "df5276af4a05a4bfb7d2676d71d96798b027e599987f4cf92e49f5cdc7379a9c",
    "evaluate": "c3c724653cfefe34cd3d206dd589581fb2c7df8baea1cc9170855a15b2f681bc",
    "anatomy": "36bfb5e1d5d5a1eb1d8ff6a26ccd9e8117c33d404aab0fd166a75746981ed433",
    "landscape": "9293d2dcd7b1be9cfd8610237e1b95ef0dd9a9e5a2c23aa4ac0d3de9052f5a26",
    "predict-layers": "0c12cdd830e00a9bb25ddf66e71bb2de1438ea51b75e921a04027ca85f078134",
    "randomisation": "4dd4877572bf989e5f2a39e2554f9cd852147e3e91a5bcc45c1acf4d9c96a366",
}
GOLDEN_DEFAULTS = {
    "prepare-data": "4182137f08ec7d01faaab7067bc479ab7ebd3381f7fd8d7b67b6f60c1b019cb3",
    "fine-tune": "614a1487074b1c92df19673d4fa8281517755469e05847742da3a32b4598b2e2",
    "learn-mask": "1747ef0fd0c52c36ac5e32ecdb968828305d3ccab392f0102b48dadf271194a5",
    "evaluate": "3abf38de64127de2f28354dfdf63c53b7811aebe91f241a7f0c21ccc8ff161df",
    "anatomy": "4e75ae36d86c437d7e3206e19b0af73da9f3909cc57a20361fa7042d10f47251",
    "landscape": "6106c61f414dadbe1f2ccb19d367b92a0f817900864dc80150bde3392aa033c9",
    "predict-layers": "c3d0ba30baf3e0f1ce60e34e58f5bd7f64e0b6d7bfc3990732696f9787b36d7a",
    "randomisation": "50e30e190feaab330851bccc49cad0ecda34d2aa61fbf9b86b293c030496bc5d",
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def test_a_changed_default_or_version_changes_the_golden_keys():
    """If this fails, results change meaning under old keys: raise the stage's version, or give old defaults back."""
    keys = {stage: stage_key(stage, 1, recipe, {"model": "d" * 64}) for stage, recipe in RECIPES.items()}
    assert keys == GOLDEN
    defaults = {stage: digest(recipe.model_dump(mode="json")) for stage, recipe in RECIPES.items()}
    assert defaults == GOLDEN_DEFAULTS


def test_the_key_is_the_same_in_another_process():
    code = (
        "from tests.mft_core.test_cache_key import RECIPES; from mft_core.cache_key import stage_key; import json;"
        "print(json.dumps({s: stage_key(s, 1, r, {'model': 'd' * 64}) for s, r in RECIPES.items()}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == GOLDEN


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=6))
def test_the_order_of_keys_does_not_matter(mapping):
    backwards = dict(reversed(list(mapping.items())))
    assert canonical_json(mapping) == canonical_json(backwards)
    assert json.loads(canonical_json(mapping)) == mapping


def test_whole_floats_and_integers_are_one_value():
    assert stage_key("fine-tune", 1, FineTune(training=TRAINING), {}) == stage_key(
        "fine-tune", 1, FineTune(training=Training(learning_rate=0.001, epochs=2.0, batch_size=8)), {}
    )


@given(st.sampled_from(["learning_rate", "epochs", "warmup_share"]), st.floats(0.01, 0.9))
def test_every_changed_number_changes_the_key(field, value):
    changed = TRAINING.model_copy(update={field: value})
    same = getattr(TRAINING, field) == value
    before = stage_key("fine-tune", 1, FineTune(training=TRAINING), {})
    assert (stage_key("fine-tune", 1, FineTune(training=changed), {}) == before) == same


def test_stage_version_and_inputs_enter_the_key():
    recipe = RECIPES["evaluate"]
    keys = {
        stage_key("evaluate", 1, recipe, {"model": "a"}),
        stage_key("evaluate", 2, recipe, {"model": "a"}),
        stage_key("evaluate", 1, recipe, {"model": "b"}),
        stage_key("evaluate", 1, recipe, {"data": "a"}),
        stage_key("compare", 1, recipe, {"model": "a"}),
    }
    assert len(keys) == 5


def test_a_field_written_out_at_its_default_is_the_same_recipe():
    written_out = Training(learning_rate=1e-3, epochs=2, batch_size=8, schedule="linear", weight_decay=0.0)
    assert digest(written_out) == digest(TRAINING)


def test_files_count_by_content_wherever_they_lie(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "rows.jsonl").write_text("{}\n")
    here, there = tmp_path / "here", tmp_path / "there"
    assert local_file(here / "rows.jsonl", "x").digest == local_file(there / "rows.jsonl", "x").digest
    assert local_checkpoint("model", here).digest == local_checkpoint("model", there).digest
    (there / "config.json").write_text('{"a": 1}')
    assert local_checkpoint("model", here).digest != local_checkpoint("model", there).digest


def test_the_tokenizer_of_a_model_does_not_count_its_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = local_checkpoint("tokenizer", tmp_path).digest
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert local_checkpoint("tokenizer", tmp_path).digest == before

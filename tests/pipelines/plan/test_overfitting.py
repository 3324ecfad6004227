"""The study `overfitting`: fine-tuning is taken past its best point, and each contrast is of one pair."""

import json

from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
from tests.support.finished import finish


def test_each_contrast_of_overfitting_is_of_one_pair_and_early_stopping_is_one_of_them(tmp_path):
    store = ArtifactStore(tmp_path / "home")
    plan = make_plan(load_study("overfitting"), load_profile("tiny"), store)
    assert plan.replicates == 3
    finish(plan, store, {"fft": 0.4, "mft": 0.5, "rewind": 0.5, "wise-ft": 0.4})
    (made,) = (tmp_path / "home" / "artifacts" / "compare").glob("*/contrasts.json")
    primaries = [row["contrast"] for row in json.loads(made.read_text()) if row["family"] == "primary"]
    assert primaries == list(plan.study.contrasts.primary)
    assert primaries[0] == "fft keep=best - fft keep=last"

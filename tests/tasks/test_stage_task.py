"""The Prefect task of a stage, beyond what the flows' tests show of it."""

import dataclasses
from types import SimpleNamespace

from mft_core.recipes import Evaluate, Runtime
from tasks.stage_task import StageCall, Workplace, run_stage
from tests.mft_core.store.test_shared import replaces
from tests.support.shared_builder import machine


def test_an_older_copy_here_gives_way_to_what_a_worker_with_a_home_of_its_own_has_computed_again(tmp_path, monkeypatch):
    url, recipe, runtime = f"file://{tmp_path}/shared", Evaluate(task="a"), Runtime()
    here, worker = machine(tmp_path, url, "here"), machine(tmp_path, url, "worker")
    stage = dataclasses.replace(replaces("old"), heavy=True)
    monkeypatch.setattr("tasks.stage_task.get_stage", lambda name: stage)
    old = here.build(stage, recipe, {}, runtime).ref

    def build(*given):
        return worker.build(replaces("new"), recipe, {}, runtime, force=True).ref

    place = Workplace(here, runtime, SimpleNamespace(build=build), print, {})
    call = StageCall("evaluate", recipe, "evaluate", {}, {}, rerun=True, node="")
    made = run_stage.fn("evaluate", call, {}, place)["artifact"]
    assert made["digest"] != old.digest
    assert here.manifest("evaluate", old.key)["digest"] == made["digest"], "what reports and plans read"

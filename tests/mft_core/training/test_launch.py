"""A stage in several processes is called, reports, fails, stops and resumes as in one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mft_core.errors import ConfigError, StageError
from mft_core.masks.mask_file import load_mask
from mft_core.recipes import Evaluate, FineTune, LearnMask, Lora, Recipe, Runtime
from mft_core.stage import Progress
from mft_core.stages import get_stage
from mft_core.training.launch import check
from tests.support.small_training import make_context, make_recipe, save_data
from tests.support.tiny import save_checkpoint


def mask_recipe(layers: str = "1-2", **changes: Any) -> LearnMask:
    """Return a mask at sparsity 0.3, learned for ten steps unless `changes` say otherwise."""
    return LearnMask(sparsity=0.3, layers=layers, score_init="normal", training=make_recipe(**changes))


def run_stage(
    recipe: Recipe, root: Path, report: Callable[[Progress], None] = lambda progress: None, **runtime: Any
) -> dict[str, Any]:
    """Run a training stage on the tiny checkpoint, in two processes; inputs, work and out lie under `root`."""
    if not (root / "model").exists():
        save_checkpoint(root / "model")
        save_data(root / "data")
    (root / "out").mkdir(exist_ok=True)
    context = make_context(root / "work", **{"processes": 2, "checkpoint_seconds": 0.0, **runtime})
    stage = get_stage("learn-mask" if isinstance(recipe, LearnMask) else "fine-tune")
    inputs = {"model": root / "model", "data": root / "data"}
    return stage.run(recipe, inputs, root / "out", dataclasses.replace(context, report=report))


def workers(root: Path) -> list[psutil.Process]:
    """Return the living workers of the runs under `root`, by rank."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("TORCHELASTIC_ERROR_FILE", "").startswith(f"{root}/"):
                found[int(environment["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def masks_of(root: Path) -> dict[str, torch.Tensor]:
    """Return the masks that a run has written."""
    return dict(load_mask(root / "out/mask").kept)


def test_a_mask_learned_in_two_processes_is_the_one_learned_in_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, told = mask_recipe(validations=2), []
    one = run_stage(recipe, tmp_path / "one", processes=1)
    two = run_stage(recipe, tmp_path / "two", told.append)
    for name in ("first_loss", "final_loss", "validation_losses"):
        assert two.pop(name) == pytest.approx(one.pop(name), abs=1e-6)
    assert two == one
    assert all(torch.equal(mask, masks_of(tmp_path / "two")[name]) for name, mask in masks_of(tmp_path / "one").items())
    files = [sorted(path.name for path in (tmp_path / name / "out").rglob("*")) for name in ("one", "two")]
    assert files[0] == files[1]
    assert [progress.step for progress in told] == list(range(1, 11))
    assert {"loss", "learning_rate", "tokens", "tokens_per_second"} <= set(told[0].metrics)
    assert not workers(tmp_path)


@pytest.mark.slow
def test_whoever_stops_two_processes_from_the_report_loses_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class EnoughError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            raise EnoughError

    told: list[Progress] = []
    with pytest.raises(EnoughError):
        run_stage(mask_recipe(), tmp_path, stop, checkpoint_seconds=1e9)
    assert not workers(tmp_path)
    with caplog.at_level(logging.INFO):
        run_stage(mask_recipe(), tmp_path, told.append)
    assert [(progress.step, progress.doing) for progress in told] == [
        (4, "resuming after step 4 of 10"),
        *((step, "") for step in range(5, 11)),
    ]
    assert caplog.messages.count("resuming after step 4 of 10") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [(mask_recipe(layers="9"), ConfigError), (FineTune(training=make_recipe(learning_rate=1e25)), StageError)],
    ids=["configuration", "loss not finite"],
)
def test_an_error_of_the_stage_is_the_callers_with_the_same_text(
    recipe: Recipe, kind: type[Exception], tmp_path: Path
) -> None:
    said = []
    for processes in (1, 2):
        with pytest.raises(kind) as caught:
            run_stage(recipe, tmp_path / str(processes), processes=processes)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert not workers(tmp_path)


@pytest.mark.slow
def test_processes_are_started_again_when_one_is_killed_and_go_on_from_what_was_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Progress] = []

    def kill(progress: Progress) -> None:
        told.append(progress)
        if progress.step == 3 and not any(other.doing for other in told):
            workers(tmp_path / "two")[1].kill()

    one = run_stage(mask_recipe(), tmp_path / "one")
    two = run_stage(mask_recipe(), tmp_path / "two", kill)
    said = [progress.doing for progress in told if progress.doing]
    assert said[0].startswith("process 1 of 2 was killed (SIGKILL)")
    assert said[0].endswith("all are started again (1 of 3)")
    assert said[1].startswith("resuming after step ")
    assert two == one
    assert all(torch.equal(mask, masks_of(tmp_path / "two")[name]) for name, mask in masks_of(tmp_path / "one").items())


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_the_stage_with_its_output_named(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.total and progress.step > (killed[-1] if killed else 0):
            killed.append(progress.step)
            workers(tmp_path)[1].kill()

    with pytest.raises(StageError, match=r"process 1 of 2 was killed \(SIGKILL.*its output .*1/stderr\.log ends:"):
        run_stage(mask_recipe(epochs=40), tmp_path, kill)
    assert len(killed) == 4
    assert not workers(tmp_path)


@pytest.mark.slow
def test_a_process_that_breaks_ends_the_stage_with_what_broke_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path / "model")
    save_data(tmp_path / "data")
    (tmp_path / "out/history.jsonl").mkdir(parents=True)
    with pytest.raises(StageError, match=r"^process 0 of 2: IsADirectoryError: .*history\.jsonl"):
        run_stage(mask_recipe(max_steps=1), tmp_path)
    assert "Traceback" in caplog.text


def run_for_ever(root: str) -> None:
    """Run a stage that takes too long; to be killed."""
    run_stage(mask_recipe(epochs=1000), Path(root))


@pytest.mark.slow
def test_no_process_outlives_a_killed_parent_and_the_next_run_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = f"from tests.mft_core.training.test_launch import run_for_ever; run_for_ever({str(tmp_path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    state = tmp_path / "work/state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    started = workers(tmp_path)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, left = psutil.wait_procs(started, timeout=20)
    for process in left:
        process.kill()
    assert (len(started), left) == (2, [])

    class EnoughError(Exception):
        pass

    def stop(progress: Progress) -> None:
        raise EnoughError

    with caplog.at_level(logging.INFO), pytest.raises(EnoughError):
        run_stage(mask_recipe(epochs=1000), tmp_path, stop)
    assert "resuming after step" in caplog.text


@pytest.mark.slow
def test_a_divided_model_is_saved_as_an_ordinary_checkpoint(tmp_path: Path) -> None:
    recipe = FineTune(training=make_recipe(learning_rate=0.003, precision="bfloat16", max_steps=3))
    one = run_stage(recipe, tmp_path / "one")
    two = run_stage(recipe, tmp_path / "two", shard=True)
    assert one == two
    whole, divided = (load_file(tmp_path / name / "out/model/model.safetensors") for name in ("one", "two"))
    assert whole.keys() == divided.keys()
    assert all(torch.equal(weight, divided[name]) for name, weight in whole.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two/out/model", dtype="auto")
    assert (model.dtype, model.config.architectures) == (torch.bfloat16, ["LlamaForCausalLM"])


def test_one_process_divides_a_model_among_itself(tmp_path: Path) -> None:
    """So that settings made for eight GPUs run on one."""
    recipe = FineTune(training=make_recipe(learning_rate=0.003, max_steps=3))
    whole = run_stage(recipe, tmp_path / "whole", processes=1)
    assert run_stage(recipe, tmp_path / "divided", processes=1, shard=True) == whole
    assert (tmp_path / "divided/work/processes").is_dir()
    first, second = (load_file(tmp_path / name / "out/model/model.safetensors") for name in ("whole", "divided"))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


SCRIPT = """
    import sys
    from pathlib import Path

    import torch
    import torch.distributed as dist

    from mft_core.training.loop import train
    from tests.support.small_training import make_context, make_data, make_recipe, make_trainable
    from tests.support.tiny import make_model

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    recipe, out = make_recipe(), Path(sys.argv[1])
    trainable = make_trainable("mask", make_model(), recipe)
    train(trainable, make_data(), recipe, make_context(out / "work"))
    if dist.get_rank() == 0:
        torch.save(trainable.masks(), out / "masks.pt")
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_users_own_script_under_torchrun_learns_the_same_mask(tmp_path: Path) -> None:
    script = tmp_path / "learn.py"
    script.write_text(textwrap.dedent(SCRIPT))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    found = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        out.mkdir()
        subprocess.run([*run, processes, script, out], check=True, env=environment, timeout=200)
        found.append(torch.load(out / "masks.pt", weights_only=True))
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def test_what_cannot_be_divided_is_refused() -> None:
    recipe, runtime = FineTune(training=make_recipe(optimizer="adafactor")), Runtime(device="cpu", shard=True)
    with pytest.raises(ConfigError, match=r"'adafactor' has no divided form"):
        check(recipe, runtime)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:1", "CUDA_VISIBLE_DEVICES"), ("cuda", r"runtime\.processes = 4: .* torch sees 2 here; valid: 1 to 2")],
)
def test_every_process_needs_a_gpu_of_its_own(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        check(mask_recipe(), Runtime(device=device, processes=4))


@pytest.mark.parametrize("recipe", [mask_recipe(), FineTune(training=make_recipe(), lora=Lora())])
def test_masks_and_adapters_of_a_study_whose_fine_tunings_are_divided_are_not(recipe: Recipe) -> None:
    check(recipe, Runtime(device="cpu", shard=True, processes=2))


@pytest.mark.parametrize("recipe", [LearnMask(selector="random", sparsity=0.1, layers="0"), Evaluate(task="gsm8k")])
def test_what_is_not_trained_runs_in_one_process_whatever_the_runtime(recipe: Recipe) -> None:
    check(recipe, Runtime(processes=64, shard=True))


def test_a_random_mask_is_drawn_without_further_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    run_stage(LearnMask(selector="random", sparsity=0.1, layers="0"), tmp_path)
    assert (tmp_path / "out/mask").is_dir()

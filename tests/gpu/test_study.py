"""A whole study on a GPU, as a user runs it: one worker for the device, everything trained in bfloat16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.mini import TRAINING, write_profile, write_study

pytestmark = pytest.mark.gpu


@pytest.mark.timeout(500)
def test_a_study_runs_on_the_gpu_to_its_table(tmp_path: Path) -> None:
    training = {**TRAINING, "precision": "bfloat16"}
    mask = {"sparsity": 0.1, "layers": "1-2", "calibration_rows": 16, "training": training}
    profile = write_profile(tmp_path, fine_tune=training, mask=mask)
    study = write_study(tmp_path, [{"method": name} for name in ("base", "fft", "mft", "magnitude", "random")])
    command = [sys.executable, "-m", "pipelines.cli", "run", study, "--profile", profile, "--json"]
    environment = {**os.environ, "MFT_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*command, "--set", "runtime.device=cuda"], capture_output=True, text=True, env=environment, timeout=480
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    rows = json.loads(done.stdout)
    assert [row["method"] for row in rows] == ["base", "fft", "mft", "magnitude", "random"]
    assert all(row["n"] == 30 for row in rows)
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "home").rglob("manifest.json")]
    ran = {(each["stage"], each["provenance"].get("device")) for each in manifests if "provenance" in each}
    name = torch.cuda.get_device_name()
    assert {("fine-tune", name), ("learn-mask", name), ("evaluate", name)} <= ran

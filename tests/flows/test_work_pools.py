"""`make deploy` makes pools and deployments without a question; a worker of the process pool runs one, as typed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from mft_core.processes import Family
from pipelines.deployments import STAGE_FLOWS
from pipelines.servers import services
from tests.support.mini import write_profile, write_study

ROOT = Path(__file__).parents[2]
POOLS = {"mft-process": "", "mft-docker": "-docker", "mft-kubernetes": "-kubernetes"}
FLOWS = {"mft-ablation", "mft-pipeline", *STAGE_FLOWS}


def test_every_flow_has_a_deployment_on_every_pool_and_only_the_process_pools_are_bare_names() -> None:
    written = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {(item["name"], item["work_pool"]["name"]) for item in written} == {
        (flow + suffix, pool) for flow in FLOWS for pool, suffix in POOLS.items()
    }


def test_pools_for_containers_ask_for_a_gpu_and_use_every_variable_that_they_declare() -> None:
    for name, gpu in (("docker", '"capabilities": [["gpu"]]'), ("kubernetes", '"nvidia.com/gpu": "{{ gpus }}"')):
        template = json.loads((ROOT / "docker" / "pools" / f"{name}.json").read_text())
        assert gpu in json.dumps(template)
        used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
        assert used == set(template["variables"]["properties"])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Start a Prefect server; returns the environment of whoever speaks to it."""
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_", "MFT_")):
            monkeypatch.delenv(name)
    home, family, port = tmp_path / "home", Family(), services.free_port(None)
    api = f"http://127.0.0.1:{port}/api"
    own = {"MFT_HOME": str(home), "PREFECT_HOME": str(services.prefect_home(home)), "OMP_NUM_THREADS": "1",
           "PREFECT_WORKER_QUERY_SECONDS": "1"}  # fmt: skip
    child = services.start_prefect(home, family, port, ui=False)
    services.wait_healthy([child], f"{api}/health")
    yield {**os.environ, **own, **services.address_of(home, {"prefect": api, "own": True})}
    family.stop()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_is_deployed_without_a_question_and_a_process_worker_runs_a_study_as_typed(
    server: dict[str, str], tmp_path: Path
) -> None:
    prefect = [sys.executable, "-m", "prefect"]
    recipe = (ROOT / "Makefile").read_text().partition("\ndeploy:")[2].partition("\n\n")[0]
    commands = [line.strip().split()[1:] for line in recipe.splitlines() if "$(BIN)/prefect" in line]
    assert len(commands) == len(POOLS) + 1
    for words in commands:
        done = subprocess.run([*prefect, *words], cwd=ROOT, env=server, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, (words, done.stdout, done.stderr)

    auth = tuple(server["PREFECT_API_AUTH_STRING"].split(":"))
    reply = httpx.post(f"{server['PREFECT_API_URL']}/deployments/filter", json={}, auth=auth)  # type: ignore[arg-type]
    there = {(item["name"], item["work_pool_name"]) for item in reply.json()}
    assert there == {(flow + suffix, pool) for flow in FLOWS for pool, suffix in POOLS.items()}

    folder = tmp_path / "study"
    folder.mkdir()
    profile, study = write_profile(folder), write_study(folder, [{"method": "fft"}, {"method": "magnitude"}])
    log = (tmp_path / "worker.log").open("w")
    worker = subprocess.Popen(
        [*prefect, "worker", "start", "--pool", "mft-process"], cwd=folder,
        env={**server, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    typed = ["deployment", "run", "mft-ablation", "--param", f"study={study}", "--param", f"profile={profile}"]
    try:
        done = subprocess.run(
            [*prefect, *typed, "--watch"], cwd=ROOT, env=server, capture_output=True, text=True, timeout=600
        )
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(timeout=120)
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                time.sleep(0.5)
    assert done.returncode == 0, (done.stdout, done.stderr, (tmp_path / "worker.log").read_text()[-3000:])
    assert "finished successfully" in " ".join((done.stdout + done.stderr).split())
    assert (Path(server["MFT_HOME"]) / "reports" / "mini-study-mini" / "report.html").is_file()

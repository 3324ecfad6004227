"""Servers start, are found, and never outlive what started them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mft_core.errors import StageError
from pipelines.servers import services
from pipelines.servers.processes import Family, is_alive

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return an environment without any setting of the services."""
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_", "MFT_")):
            monkeypatch.delenv(name)
    return dict(os.environ)


@pytest.fixture
def family() -> Iterator[Family]:
    made = Family()
    yield made
    made.stop()


def eventually(true: Callable[[], object], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


def group_is_gone(group: int) -> bool:
    """Whether no process of the group runs any more (a zombie that nobody has fetched does not run)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            return False
    return True


def can_connect(address: str) -> bool:
    port = int(address.split(":")[2].split("/")[0])
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_taken_port_is_replaced_by_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert services.free_port(port) != port
    assert services.free_port(port) == port


def test_a_service_that_dies_is_reported_with_the_end_of_its_log(family: Family, tmp_path: Path) -> None:
    child = family.start("thing", ["sh", "-c", "echo the reason; exit 3"], tmp_path / "thing.log", {})
    with pytest.raises(StageError, match=r"thing ended with code 3(.|\n)*the reason"):
        services.wait_healthy([child], "http://127.0.0.1:9/health")


def test_stopping_ends_grandchildren_and_those_that_ignore_a_polite_request(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.servers.processes.GRACE_SECONDS", 0.5)
    stubborn = family.start("a", ["sh", "-c", "trap '' TERM; echo up; sleep 60 & wait; wait"], tmp_path / "a.log", {})
    assert eventually(lambda: "up" in stubborn.tail())
    started = time.monotonic()
    family.stop()
    assert time.monotonic() - started < 5
    assert group_is_gone(stubborn.process.pid)


def test_services_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from pipelines.servers.processes import Family\n"
        "child = Family().start('s', ['sh', '-c', 'sleep 60 & sleep 60'], Path(sys.argv[1]), {})\n"
        "print(child.process.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s.log")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    group = int(parent.stdout.readline())
    assert not group_is_gone(group)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: group_is_gone(group), 20)


def test_the_record_of_a_dead_or_silent_server_is_not_believed(tmp_path: Path) -> None:
    record = services.prefect_home(tmp_path) / "server.json"
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not is_alive(gone.pid)
    for text in ("", "[]", "{}", json.dumps({"pid": os.getpid(), "prefect": "http://127.0.0.1:9/api"})):
        record.write_text(text)
        assert services.living_server(tmp_path) is None
    record.write_text(json.dumps({"pid": gone.pid, "prefect": "http://127.0.0.1:9/api"}))
    assert services.living_server(tmp_path) is None


def test_a_configured_api_is_used_and_no_server_is_started(
    tmp_path: Path, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, sys; from pathlib import Path; from pipelines.servers import services\n"
        "services.use_prefect(Path(sys.argv[1])); services.wait_for_prefect()\n"
        "assert 'prefect' not in sys.modules; print(os.environ['PREFECT_API_URL'], os.environ['PREFECT_HOME'])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, env={**clean, "PREFECT_API_URL": "http://mine/api"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["http://mine/api", str(tmp_path / "prefect")]
    assert not (tmp_path / "logs").exists()


def test_up_says_which_service_died_and_why(tmp_path: Path, clean: dict[str, str]) -> None:
    code = (
        "import sys; from pathlib import Path; from pipelines.servers import services\n"
        "services.up(Path(sys.argv[1]), deployments='tests.flows.no_such_module')\n"
    )
    env = {**clean, "PREFECT_API_URL": "http://127.0.0.1:9/api", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert "StageError: deployments ended with code 1" in run.stderr
    assert "No module named tests.flows.no_such_module" in run.stderr
    assert not (tmp_path / "prefect" / "server.json").exists()


PRIVATE = """
import os, sys, time
from pathlib import Path
from pipelines.servers.services import use_prefect, wait_for_prefect

use_prefect(Path(sys.argv[1]))
from prefect import flow, task

@task(cache_key_fn=lambda context, parameters: "one", persist_result=True, result_storage=Path(sys.argv[1]) / "results")
def one():
    return 1

@flow
def quick():
    future = one.submit()
    return future.result(), future.state.name

wait_for_prefect()
print(os.environ["PREFECT_API_URL"], *quick(), flush=True)
if "--stay" in sys.argv:
    time.sleep(120)
"""


@pytest.mark.slow
def test_a_private_server_runs_cached_flows_and_goes_with_its_run(tmp_path: Path, clean: dict[str, str]) -> None:
    def answers(*extra: str) -> list[str]:
        command = [sys.executable, "-c", PRIVATE, str(tmp_path), *extra]
        return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout.split()

    first, second = answers(), answers()
    assert first[1:] == ["1", "Completed"]
    assert second[1:] == ["1", "Cached"]
    assert not can_connect(first[0])
    assert not can_connect(second[0])
    killed = subprocess.Popen(
        [sys.executable, "-c", PRIVATE, str(tmp_path), "--stay"], cwd=ROOT, env=clean, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout
    address = killed.stdout.readline().split()[0]
    assert can_connect(address)
    killed.kill()
    killed.wait()
    killed.stdout.close()
    assert eventually(lambda: not can_connect(address), 30)


@pytest.mark.slow
def test_up_serves_deployments_by_bare_name_and_stops_everything(tmp_path: Path, clean: dict[str, str]) -> None:
    home = tmp_path / "home"
    code = (
        "import sys; from pathlib import Path; from pipelines.servers import services\n"
        "services.up(Path(sys.argv[1]), prefect_port=int(sys.argv[2]), deployments='tests.flows.quick_deployments')\n"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-u", "-c", code, str(home), str(taken.getsockname()[1])]
        up = subprocess.Popen(command, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        record = home / "prefect" / "server.json"
        try:
            assert eventually(lambda: record.exists() or up.poll() is not None, 240)
            assert up.poll() is None
            server = json.loads(record.read_text())
            assert server["pid"] == up.pid
            assert services.living_server(home) == server
            assert str(taken.getsockname()[1]) not in server["prefect"]
            assert services._answers(server["mlflow"] + "/health", 30)
            runs = [_prefect(clean, home, name, *rest) for name, *rest in _WANTED]
        finally:
            up.terminate()
            output = up.communicate(timeout=90)[0]
    assert up.returncode == 0, output
    assert [code for code, _ in runs] == [0, 0, 1, 1], runs
    assert "Flow run finished successfully" in runs[0][1]
    assert "'study': 'layers', 'profile': 'tiny'" in runs[0][1]
    assert "Did you mean 'mft-ablation'?" in runs[2][1]
    assert "mft-ablation/twice, other-flow/twice" in runs[3][1]
    assert not record.exists()
    for address in (server["prefect"], server["mlflow"]):
        assert not can_connect(address)


_WANTED = (
    ("mft-ablation", "--param", "study=layers", "--param", "profile=tiny", "--watch"),
    ("mft-ablation/mft-ablation",),
    ("mft-ablatoin",),
    ("twice",),
)


def _prefect(clean: dict[str, str], home: Path, *arguments: str) -> tuple[int, str]:
    """Type `prefect deployment run ...` in another terminal."""
    run = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "run", *arguments],
        cwd=ROOT, env={**clean, "MFT_HOME": str(home)}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return run.returncode, " ".join((run.stdout + run.stderr).split())


@pytest.mark.slow
def test_a_killed_up_leaves_no_server_behind(tmp_path: Path, clean: dict[str, str]) -> None:
    code = (
        "import sys; from pathlib import Path; from pipelines.servers import services; services.up(Path(sys.argv[1]))\n"
    )
    env = {**clean, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    up = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    log = tmp_path / "logs" / "prefect.log"
    assert eventually(lambda: log.exists() and "Check out the dashboard" in log.read_text(), 240)
    address = next(word for word in log.read_text().split() if word.startswith("http://127.0.0.1:"))
    assert eventually(lambda: can_connect(address), 240)
    up.send_signal(signal.SIGKILL)
    up.wait()
    assert eventually(lambda: not can_connect(address), 30)

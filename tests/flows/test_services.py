"""Servers start, are found, and never outlive what started them."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mft_core.errors import ConfigError, StageError
from mft_core.processes import Family
from pipelines.servers import services

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
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = status.read_text().rpartition(")")[2].split()[:3]
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
    monkeypatch.setattr("mft_core.processes.GRACE_SECONDS", 0.5)
    stubborn = family.start("a", ["sh", "-c", "trap '' TERM; echo up; sleep 60 & wait; wait"], tmp_path / "a.log", {})
    assert eventually(lambda: "up" in stubborn.tail())
    started = time.monotonic()
    family.stop()
    assert time.monotonic() - started < 5
    assert group_is_gone(stubborn.process.pid)


KILLED_WATCHDOG = "family._watchdog.kill(); family._watchdog.wait(); family.revive()\n"


@pytest.mark.parametrize("before", ["", KILLED_WATCHDOG], ids=["", "the watchdog before"])
def test_services_end_when_their_parent_is_killed(tmp_path: Path, before: str) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from mft_core.processes import Family\n"
        "family = Family(); child = family.start('s', ['sh', '-c', 'sleep 60 & sleep 60'], Path(sys.argv[1]), {})\n"
        f"{before}print(child.process.pid, flush=True); time.sleep(60)\n"
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
    assert not psutil.pid_exists(gone.pid)
    for text in ("", "[]", "{}", json.dumps({"pid": os.getpid(), "prefect": "http://127.0.0.1:9/api"})):
        record.write_text(text)
        assert services.living_server(tmp_path) is None
    record.write_text(json.dumps({"pid": gone.pid, "prefect": "http://127.0.0.1:9/api"}))
    assert services.living_server(tmp_path) is None


USE = """
import sys
from pathlib import Path
from mft_core.errors import ConfigError
from pipelines.servers.services import use_prefect, wait_for_prefect

use_prefect(Path(sys.argv[1]))
try:
    wait_for_prefect()
except ConfigError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.parametrize(("silent", "why"), [(False, "Connection refused"), (True, "no answer within 8 seconds")])
def test_a_configured_api_that_does_not_answer_is_refused_in_one_sentence_within_twenty_seconds(
    silent: bool, why: str, tmp_path: Path, clean: dict[str, str]
) -> None:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        if silent:
            there.listen()
        api = f"http://me:hush-hush@127.0.0.1:{there.getsockname()[1]}/api"
        run = subprocess.run(
            [sys.executable, "-c", USE, str(tmp_path)],
            cwd=ROOT, env={**clean, "PREFECT_API_URL": api}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if "refused:" in line]
    assert why in line
    assert "without PREFECT_API_URL a server is started" in line
    assert "hush-hush" not in run.stderr
    assert "Traceback" not in run.stderr
    assert services.ANSWER_SECONDS < 10
    assert not (tmp_path / "logs").exists(), "no server of our own was started beside it"


def test_a_prefect_home_that_cannot_be_made_is_refused(
    tmp_path: Path, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", "/proc/nowhere")
    with pytest.raises(ConfigError, match="PREFECT_HOME = /proc/nowhere: not writable"):
        services._prefect_settings(tmp_path)


def test_what_dies_is_started_again_three_times_and_then_given_up(family: Family, tmp_path: Path) -> None:
    doomed = family.start("thing", ["sh", "-c", "echo the reason; exit 3"], tmp_path / "thing.log", {})
    for count in (1, 2, 3):
        doomed.process.wait()
        (line,) = family.revive()
        assert f"thing ended with code 3; it is started again ({count} of 3)" in line
    doomed.process.wait()
    with pytest.raises(ChildProcessError, match=r"the reason(.|\n)*started again 3 times before"):
        family.revive()


def test_a_family_ends_in_peace_when_its_watchdog_was_killed(family: Family, tmp_path: Path) -> None:
    service = family.start("s", ["sleep", "60"], tmp_path / "s.log", {})
    assert family._watchdog
    family._watchdog.kill()
    family._watchdog.wait()
    family.stop()
    assert group_is_gone(service.process.pid)


def test_only_one_up_works_at_a_time_and_the_second_says_who_has_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipelines.servers import services\n"
        "home = Path(sys.argv[1])\n"
        "with services._only_one(home): print('mine', flush=True); time.sleep(60)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert first.stdout
        assert first.stdout.readline() == "mine\n"
        with pytest.raises(ConfigError, match=rf"process {first.pid} since 20\d\d-(.|\n)*Use it, or stop it first"):
            services.up(tmp_path)
    finally:
        first.kill()
        first.communicate()
    with services._only_one(tmp_path):  # the dead hold no lock
        pass


def test_a_damaged_database_of_prefect_is_set_aside_and_a_whole_one_is_kept(
    tmp_path: Path, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = services.prefect_home(tmp_path) / "prefect.db"
    monkeypatch.setenv("PREFECT_HOME", str(database.parent))
    said: list[str] = []
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE numbers (number)")
        connection.executemany("INSERT INTO numbers VALUES (?)", [(n,) for n in range(10_000)])
        connection.commit()
    services._set_damaged_aside(tmp_path, said.append)
    assert not said
    whole = database.read_bytes()
    for start in (0, 8192):  # the header, and a page of the table
        database.write_bytes(whole[:start] + b"\xaa" * 2000 + whole[start + 2000 :])
        services._set_damaged_aside(tmp_path, said.append)
        assert not database.exists()
    assert len(said) == 2
    assert len(list(database.parent.glob("prefect.db.damaged-*"))) >= 1
    database.write_bytes(b"no database")
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://mine")
    services._set_damaged_aside(tmp_path, said.append)
    assert database.exists(), "not the one that is used"


def test_the_string_that_servers_ask_for_is_made_once_and_only_its_user_can_read_it(tmp_path: Path) -> None:
    first = services.auth_string(tmp_path)
    path = tmp_path / "prefect" / "auth"
    assert first == services.auth_string(tmp_path) == path.read_text().strip()
    assert len(first) > 30
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("")
    assert len(services.auth_string(tmp_path)) > 30, "an empty string would let everybody in"


def status_of(address: str, method: str = "GET", body: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(address, body, {k.replace("_", "-"): v for k, v in headers.items()}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def basic(auth: str) -> str:
    return f"Basic {base64.b64encode(auth.encode()).decode()}"


def test_servers_refuse_who_comes_from_elsewhere_or_without_the_string(
    tmp_path: Path, clean: dict[str, str], family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(services.prefect_home(tmp_path)))
    auth = services.auth_string(tmp_path)
    port, mlflow_port = services.free_port(None), services.free_port(None)
    services.start_prefect(tmp_path, family, port, ui=True)
    services.start_mlflow(tmp_path, family, mlflow_port)
    own, mlflow = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{mlflow_port}"
    services.wait_healthy(family.children, f"{own}/api/health")
    ask = functools.partial(status_of, f"{own}/api/deployments/filter", "POST", b"{}", Content_Type="application/json")
    assert ask(Authorization=basic(auth)) == 200
    assert ask() == 401
    assert ask(Authorization=basic(auth + "x")) == 401
    assert ask(Authorization=basic("")) == 401
    assert ask(Authorization=basic(auth), Host=f"evil.example:{port}") == 400
    assert ask(Origin="http://evil.example") == 401
    preflight = functools.partial(
        status_of, f"{own}/api/deployments/filter", "OPTIONS", Access_Control_Request_Method="POST"
    )
    assert preflight(Origin="http://evil.example") == 400
    assert preflight(Origin=f"http://localhost:{port}") == 200
    with urllib.request.urlopen(f"{own}/ui-settings", timeout=30) as reply:
        assert json.load(reply)["auth"] == "BASIC", "the page asks for it"
    socket_headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
    socket_headers |= {"Sec_WebSocket_Key": "MDEyMzQ1Njc4OWFiY2RlZg==", "Host": "evil.example"}
    assert status_of(f"{own}/api/events/in", **socket_headers) == 400

    services.wait_healthy(family.children, f"{mlflow}/health")
    with urllib.request.urlopen(mlflow, timeout=30) as reply:
        page = reply.read().decode()
    assert page.index("mlflow.workflowType") < page.index("static-files/static/js/main"), "before the page reads it"
    search = functools.partial(
        status_of, f"{mlflow}/api/2.0/mlflow/experiments/search", "POST", b'{"max_results": 1}',
        Content_Type="application/json",
    )  # fmt: skip
    assert search() == 200
    assert search(Host=f"evil.example:{mlflow_port}") == 403
    assert search(Origin="http://evil.example") == 403
    for child in family.children:
        for process in [psutil.Process(child.process.pid), *psutil.Process(child.process.pid).children(recursive=True)]:
            assert auth.split(":")[1] not in " ".join(process.cmdline())


def test_a_server_without_a_string_does_not_start(clean: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pipelines.servers.prefect_server", "127.0.0.1", "0"]
    run = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "takes commands from anybody" in run.stderr


def test_up_says_which_service_died_and_why(tmp_path: Path, clean: dict[str, str]) -> None:
    code = (
        "import sys; from pathlib import Path; from pipelines.servers import services\n"
        "services.up(Path(sys.argv[1]), prefect_port=0, deployments='tests.flows.no_such_module')\n"
    )
    env = {**clean, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
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


KILLED = """
import os, sys, time
from pathlib import Path
import psutil
from pipelines.servers.services import use_prefect, wait_for_prefect

use_prefect(Path(sys.argv[1]))
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

def server():
    return [child for child in psutil.Process().children() if "pipelines.servers.prefect_server" in child.cmdline()]

@task
def wait():
    time.sleep(1)
    return 1

@flow
def quick():
    for process in server():
        process.kill()
    found = sum(future.result() for future in [wait.submit(), wait.submit()])
    create_markdown_artifact("text", key="after")
    return found

while not server():
    time.sleep(0.05)
server()[0].kill()
wait_for_prefect()
print(quick(), len(server()))
"""


@pytest.mark.slow
def test_a_run_goes_on_when_its_prefect_server_is_killed_and_says_so(tmp_path: Path, clean: dict[str, str]) -> None:
    database = services.prefect_home(tmp_path) / "prefect.db"
    database.write_bytes(b"no database at all" * 100)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=240)
    assert run.stdout.split() == ["2", "1"], run.stderr
    assert "Prefect's database is damaged" in run.stderr
    for count in (1, 2):  # while it started, and in the flow
        assert f"Prefect server ended with code -9; it is started again ({count} of 3)" in run.stderr
    assert "Traceback" not in run.stderr


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
            with pytest.raises(ConfigError, match=rf"process {up.pid} since(.|\n)*{server['prefect'][:-4]}"):
                services.up(home)
            for process in psutil.Process(up.pid).children():
                if "pipelines.servers.prefect_server" in process.cmdline():
                    process.kill()
            assert eventually(lambda: not can_connect(server["prefect"]), 10)
            assert eventually(lambda: services._answers(server["prefect"] + "/health", 5), 120)
            runs = [_prefect(clean, home, name, *rest) for name, *rest in _WANTED]
        finally:
            up.terminate()
            output = up.communicate(timeout=90)[0]
    assert up.returncode == 0, output
    assert "Prefect server ended with code -9; it is started again (1 of 3)" in output
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
    record = tmp_path / "prefect" / "server.json"
    assert eventually(record.exists, 240)
    address = json.loads(record.read_text())["prefect"]
    assert can_connect(address)
    up.send_signal(signal.SIGKILL)
    up.wait()
    assert eventually(lambda: not can_connect(address), 30)

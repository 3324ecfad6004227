"""The servers beside a run: Prefect's API, MLflow's UI and the served deployments; all on loopback, none left behind.

`mft run` calls `use_prefect` first (nothing else may have imported Prefect), goes on planning, and calls
`wait_for_prefect` before its flow starts. Which server that is: `PREFECT_API_URL` if set, else the one of a living
`mft up` (`$MFT_HOME/prefect/server.json`), else a private one. The private server is our own process and not Prefect's
"ephemeral" mode, because that one imports the whole server into the client first, is hit by the terminal's Ctrl-C
before the flow can report to it, and is left behind by a killed run. Importing this module imports neither of the two.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mft_core.errors import StageError
from mft_core.store.artifacts import ArtifactStore
from pipelines.servers.processes import Child, Family, is_alive

START_SECONDS = 180.0
"""a server that is not healthy by then has failed; a first start on a busy machine takes half a minute"""

_PREFECT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_RUNNER_POLL_FREQUENCY": "2",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "mft",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # what the recorder's thread logs belongs to no flow run
    # a study has a thousand task runs: their events are written together, not one statement each
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "200",
}
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy

_started: Future[None] | None = None


def prefect_home(home: Path) -> Path:
    """Return (and make) Prefect's own directory under `MFT_HOME`: database, results, profiles."""
    path = home.absolute() / "prefect"
    path.mkdir(parents=True, exist_ok=True)
    return path


def mlflow_store(home: Path) -> str:
    """Return the MLflow tracking URI: `MLFLOW_TRACKING_URI` if set, else the sqlite database under `MFT_HOME`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.absolute() / 'mlflow.db'}"


def living_server(home: Path) -> dict[str, Any] | None:
    """Return what `mft up` wrote about itself ({pid, prefect, mlflow}) if it lives and its API answers, else None."""
    try:
        server = json.loads((home / "prefect" / "server.json").read_text())
        alive = is_alive(server["pid"]) and _answers(f"{server['prefect']}/health", timeout=1.0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return server if alive else None


def use_prefect(home: Path) -> None:
    """Point Prefect, not imported yet, at a server; starts a private one in the background if there is none.

    Returns at once. Call `wait_for_prefect` before the first flow run.
    """
    global _started
    if _started is not None:
        return
    if "prefect" in sys.modules:
        raise RuntimeError("use_prefect must be called before anything imports prefect: its settings are read once")
    _started = Future()
    _prefect_settings(home)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    # a failure is told once, by the command line; its traceback is in our log and in Prefect's UI
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    living = None if os.environ.get("PREFECT_API_URL") else living_server(home)
    if living:
        os.environ["PREFECT_API_URL"] = living["prefect"]
    if os.environ.get("PREFECT_API_URL"):
        _started.set_result(None)
        return
    port = free_port(None)
    os.environ["PREFECT_API_URL"] = _api(port)
    family = Family()
    atexit.register(_stop_private, family)
    threading.Thread(target=_start_private, args=(home, port, family, _started), daemon=True).start()


def wait_for_prefect() -> None:
    """Wait until the server that `use_prefect` chose can be used.

    Raises:
        StageError: the private server did not come up; with the end of its log.
    """
    if _started is None:
        raise RuntimeError("use_prefect must be called first")
    _started.result()


def _start_private(home: Path, port: int, family: Family, started: Future[None]) -> None:
    try:
        with ArtifactStore(home).lock("prefect-init"):  # two servers must not migrate one database at once
            child = start_prefect(home, family, port, ui=False)
            wait_healthy([child], f"{_api(port)}/health")
    except BaseException as error:
        started.set_exception(error)
    else:
        started.set_result(None)


def _stop_private(family: Family) -> None:
    logs = [child.log for child in family.children]
    family.stop()
    for log in logs:
        log.unlink(missing_ok=True)


def _prefect_settings(home: Path) -> None:
    """Set Prefect's settings for this process and its children; what the user has set wins."""
    os.environ.setdefault("PREFECT_HOME", str(prefect_home(home)))
    for name, value in _PREFECT.items():
        os.environ.setdefault(name, value)


def start_prefect(home: Path, family: Family, port: int, *, ui: bool) -> Child:
    """Start a Prefect server on loopback; its database is under `MFT_HOME` unless Prefect's settings say otherwise."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = home / "logs" / ("prefect.log" if ui else f"prefect-{os.getpid()}.log")
    # automations belong to a server that people use
    environment = {} if ui else {"PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false"}
    return family.start("Prefect server", [*command, "--ui" if ui else "--no-ui"], log, environment)


def start_mlflow(home: Path, family: Family, port: int) -> Child:
    """Start MLflow's UI on loopback: one worker, no job runners, host-name check on."""
    artifacts = (home / "mlartifacts").absolute()
    artifacts.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", mlflow_store(home), "--artifacts-destination", artifacts.as_uri()]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return family.start("MLflow server", command, home / "logs" / "mlflow.log", environment)


def up(
    home: Path,
    *,
    prefect_port: int = 4200,
    mlflow_port: int = 5000,
    deployments: str = "pipelines.deployments",
    say: Callable[[str], None] = print,
) -> None:
    """Start (or use) the servers, serve the deployments, and stay until Ctrl-C or SIGTERM; stops what it started.

    Args:
        home: the `MFT_HOME`.
        prefect_port: preferred; another free one is taken if it is in use. Likewise `mlflow_port`.
        deployments: module that serves the deployments when it is run.
        say: prints a line for people.

    Raises:
        StageError: a service did not start or died; with the end of its log.
    """
    living = living_server(home)
    if living:
        say(f"already up (process {living['pid']})\n  Prefect  {_ui(living['prefect'])}\n  MLflow   {living['mlflow']}")
        return
    _prefect_settings(home)
    os.environ["MFT_HOME"] = str(home.absolute())
    family = Family()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)  # also where the shell that put us in the background had it ignored
    record = prefect_home(home) / "server.json"
    try:
        prefect, mlflow = _start_servers(home, family, prefect_port, mlflow_port, say)
        _start_deployments(home, family, prefect, deployments)
        record.write_text(json.dumps({"pid": os.getpid(), "prefect": prefect, "mlflow": mlflow}) + "\n")
        say(f"Prefect  {_ui(prefect)}\nMLflow   {mlflow}\nlogs     {home / 'logs'}")
        say("in another terminal, from this directory:  prefect deployment run mft-ablation --watch")
        say("Ctrl-C stops everything")
        while True:
            raise_obituaries(family.children)
            time.sleep(0.5)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave servers behind
        record.unlink(missing_ok=True)
        family.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _start_servers(
    home: Path, family: Family, prefect_port: int, mlflow_port: int, say: Callable[[str], None]
) -> tuple[str, str]:
    """Start those servers that the environment does not name; return the Prefect API's URL and MLflow's."""
    prefect, mlflow = os.environ.get("PREFECT_API_URL"), mlflow_store(home)
    store = ArtifactStore(home)
    with store.lock("prefect-init"), store.lock("mlflow-init"):  # first starts make the databases
        waits = []
        if not prefect:
            port = free_port(prefect_port)
            prefect = os.environ["PREFECT_API_URL"] = _api(port)
            start_prefect(home, family, port, ui=True)
            waits.append(f"{prefect}/health")
        if not mlflow.startswith("http"):
            port = free_port(mlflow_port)
            start_mlflow(home, family, port)
            mlflow = f"http://127.0.0.1:{port}"
            waits.append(f"{mlflow}/health")
        if waits:
            say("starting the servers (10 to 30 seconds)")
        for address in waits:
            wait_healthy(family.children, address)
    return prefect, mlflow


def _start_deployments(home: Path, family: Family, prefect: str, module: str) -> None:
    """Serve the deployments and wait until the server knows them from this start."""
    begun = datetime.now(UTC)
    family.start("deployments", [sys.executable, "-m", module], home / "logs" / "deployments.log", {})

    def registered() -> bool:
        try:
            with _DIRECT.open(f"{prefect}/deployments/name/mft-ablation/mft-ablation", timeout=5) as reply:
                return datetime.fromisoformat(json.load(reply)["updated"]) >= begun
        except (OSError, ValueError):
            return False

    _wait(registered, family.children, f"the deployments did not appear at {prefect}")


def wait_healthy(children: list[Child], address: str) -> None:
    """Wait until the address answers 200.

    Raises:
        StageError: a service died meanwhile, or nothing answered within `START_SECONDS`.
    """
    _wait(lambda: _answers(address, timeout=5), children, f"{address} did not answer")


def _wait(ready: Callable[[], bool], children: list[Child], complaint: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        raise_obituaries(children)
        if time.monotonic() > deadline:
            tails = "\n".join(f"{child.name}, {child.log}:\n{child.tail()}" for child in children)
            raise StageError(f"{complaint} within {START_SECONDS:.0f} seconds\n{tails}")
        time.sleep(0.1)


def raise_obituaries(children: list[Child]) -> None:
    """Raise a StageError if one of the services has died: how, and the end of its log."""
    obituaries = [text for child in children if (text := child.obituary())]
    if obituaries:
        raise StageError("\n".join(obituaries))


def free_port(preferred: int | None) -> int:
    """Return the preferred port if it is free on loopback, else any free one."""
    for port in (preferred, 0):
        if port is None:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no obstacle
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StageError("no free port on 127.0.0.1")


def _api(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


def _ui(api: str) -> str:
    return api.removesuffix("/api")


def _answers(address: str, timeout: float) -> bool:
    try:
        with _DIRECT.open(address, timeout=timeout) as reply:
            return bool(reply.status == 200)
    except (OSError, http.client.HTTPException, ValueError):
        return False

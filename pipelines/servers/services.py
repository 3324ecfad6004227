"""The servers beside a run: Prefect's API, MLflow's UI and the served deployments; all on loopback, none left behind.

`mft run` calls `use_prefect` first (nothing else may have imported Prefect), goes on planning, and calls
`wait_for_prefect` before its flow starts. Which server that is: `PREFECT_API_URL` if set, else the one of a living
`mft up` (`$MFT_HOME/prefect/server.json`), else a private one. The private server is our own process and not Prefect's
"ephemeral" mode, because that one imports the whole server into the client first, is hit by the terminal's Ctrl-C
before the flow can report to it, and is left behind by a killed run. Servers of our own ask for the string in
`$MFT_HOME/prefect/auth`, which only its user can read, and are started again when they die. Importing this module
imports neither of the two.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import fcntl
import http.client
import json
import os
import secrets
import signal
import socket
import sqlite3
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from mft_core.errors import ConfigError, StageError, first_line
from mft_core.names import without_secrets, without_user
from mft_core.processes import Child, Family
from mft_core.store.artifacts import ArtifactStore
from tasks.mlflow.client import tracking_uri

START_SECONDS = 180.0
"""a server that is not healthy by then has failed; a first start on a busy machine takes half a minute"""

ANSWER_SECONDS = 8.0
"""a server that somebody else started and that has not answered by then is not there"""

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

_TRAININGS = "/#/experiments?workflowType=machine_learning"
"""page of MLflow's UI: it opens its view of LLM traces otherwise"""

_started: Future[None] | None = None
_named = False
"""the user said which server"""
_lost: list[str] = []
"""why the private server was given up"""


def prefect_home(home: Path) -> Path:
    """Return (and make) Prefect's own directory under `MFT_HOME`: database, results, profiles."""
    path = home.absolute() / "prefect"
    path.mkdir(parents=True, exist_ok=True)
    return path


def living_server(home: Path) -> dict[str, Any] | None:
    """Return what `mft up` wrote of itself ({pid, prefect, mlflow, own}) if it lives and its API answers, else None."""
    try:
        server = json.loads((home / "prefect" / "server.json").read_text())
        alive = psutil.pid_exists(server["pid"]) and _answers(f"{server['prefect']}/health", timeout=1.0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return server if alive else None


def auth_string(home: Path) -> str:
    """Return (and make) what the servers under this `MFT_HOME` ask for, `user:password`; a file that only we read."""
    path = prefect_home(home) / "auth"
    with ArtifactStore(home).lock("prefect-auth"):
        if not (path.exists() and path.read_text().strip()):
            path.touch(mode=0o600)
            path.write_text(f"mft:{secrets.token_urlsafe(32)}\n")
    return path.read_text().strip()


def address_of(home: Path, living: dict[str, Any]) -> dict[str, str]:
    """Return the settings by which Prefect finds the server of a living `mft up`, and is let in where it is our own."""
    auth = {"PREFECT_API_AUTH_STRING": auth_string(home)} if living.get("own") else {}
    return {"PREFECT_API_URL": living["prefect"], **auth}


def use_prefect(home: Path) -> None:
    """Point Prefect, not imported yet, at a server; starts a private one in the background if there is none.

    Returns at once. Call `wait_for_prefect` before the first flow run.
    """
    global _started, _named
    if _started is not None:
        return
    if "prefect" in sys.modules:
        raise RuntimeError("use_prefect must be called before anything imports prefect: its settings are read once")
    _started = Future()
    _prefect_settings(home)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    # a failure is told once, by the command line; its traceback is in our log and in Prefect's UI
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")  # its threads' traces, while the server is gone
    if os.environ.get("PREFECT_API_URL"):
        _named = True
        _started.set_result(None)
        return
    if living := living_server(home):
        os.environ.update(address_of(home, living))
        _started.set_result(None)
        return
    port = free_port(None)
    os.environ.update(address_of(home, {"prefect": _api(port), "own": True}))
    family = Family()
    atexit.register(_stop_private, family)
    threading.Thread(target=_keep_private, args=(home, port, family, _started), daemon=True).start()


def wait_for_prefect() -> None:
    """Wait until the server that `use_prefect` chose can be used.

    Raises:
        ConfigError: the server that the user named does not answer.
        StageError: the private server did not come up; with the end of its log.
    """
    if _started is None:
        raise RuntimeError("use_prefect must be called first")
    _started.result()
    if _named:
        check_answers()


def check_answers() -> None:
    """Raise a ConfigError unless the server at `PREFECT_API_URL` does what it is asked; the way Prefect will ask."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": ANSWER_SECONDS}, sync_client=True) as client,
        ):
            client.read_flows(limit=1)
    except Exception as error:  # whatever answers there
        why = first_line(error)
        if isinstance(error, httpx.TimeoutException):
            why = f"no answer within {ANSWER_SECONDS:.0f} seconds"
        elif isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
            why = "it asks for PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        raise ConfigError(
            f"PREFECT_API_URL = {without_secrets(os.environ['PREFECT_API_URL'])}: no Prefect server can be used there "
            f"({why}). Start it or correct the address; without PREFECT_API_URL a server is started for the run."
        ) from error


def lost_server() -> str:
    """Say what is known of a Prefect server that a flow could not go on without."""
    return "\n".join(_lost) or f"the Prefect server at {os.environ.get('PREFECT_API_URL')} does not answer any more"


def end_if_lost() -> None:
    """End the process with the reason, once the private server is given up and what could be computed has been.

    At once: Prefect would try for many minutes to deliver to the dead what it has to say of this run.
    """
    if _lost:
        print(f"failed: {lost_server()}", file=sys.stderr)
        print("The same command continues where this one stopped.", file=sys.stderr, flush=True)
        os._exit(1)


def _keep_private(home: Path, port: int, family: Family, started: Future[None]) -> None:
    """Start the private server, and again when it dies, until the family is stopped."""
    try:
        with ArtifactStore(home).lock("prefect-init"):  # two servers must not migrate one database at once
            _set_damaged_aside(home, _warn)
            child = start_prefect(home, family, port, ui=False)
            while not _comes_up(child, port):
                for line in family.revive():
                    _warn(line)
    except BaseException as error:
        started.set_exception(StageError(str(error)) if isinstance(error, ChildProcessError) else error)
        return
    started.set_result(None)
    try:
        while not family.stopped.wait(0.5):
            for line in family.revive():
                _warn(line)
    except ChildProcessError as error:
        _lost.append(str(error))


def _comes_up(child: Child, port: int) -> bool:
    """Wait until a server answers; False if it was killed. One that ends by itself says why: a StageError."""
    try:
        wait_healthy([child], f"{_api(port)}/health")
    except StageError:
        if (child.process.poll() or 0) >= 0:
            raise
        return False
    return True


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _set_damaged_aside(home: Path, say: Callable[[str], None]) -> None:
    """Rename our own Prefect database if SQLite finds it damaged: nothing in it is needed, and a new one is made."""
    database = prefect_home(home) / "prefect.db"
    elsewhere = {"PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL"} & set(os.environ)
    if elsewhere or os.environ["PREFECT_HOME"] != str(database.parent) or not database.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=ANSWER_SECONDS)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:  # busy: in use, so readable
        return
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found == "ok":
        return
    suffix = f".damaged-{datetime.now():%Y%m%d-%H%M%S}"
    for part in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{database}{part}").rename(f"{database}{part}{suffix}")
    say(f"Prefect's database is damaged ({found}); it is kept as {database}{suffix}, and a new one is made")


def _stop_private(family: Family) -> None:
    logs = [child.log for child in family.children]
    family.stop()
    for log in logs:
        log.unlink(missing_ok=True)


def _prefect_settings(home: Path) -> None:
    """Set Prefect's settings for this process and its children; what the user has set wins."""
    os.environ.setdefault("PREFECT_HOME", str(prefect_home(home)))
    try:
        Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"PREFECT_HOME = {os.environ['PREFECT_HOME']}: not writable ({error.strerror}); correct or unset it."
        ) from error
    for name, value in _PREFECT.items():
        os.environ.setdefault(name, value)


def start_prefect(home: Path, family: Family, port: int, *, ui: bool) -> Child:
    """Start a Prefect server on loopback; its database is under `MFT_HOME` unless Prefect's settings say otherwise."""
    command = [sys.executable, "-m", "pipelines.servers.prefect_server", "127.0.0.1", str(port)]
    environment = {
        "PREFECT_SERVER_UI_ENABLED": str(ui),
        "PREFECT_SERVER_API_AUTH_STRING": auth_string(home),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port},http://localhost:{port}",
    }
    if not ui:  # automations belong to a server that people use
        environment["PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED"] = "false"
    log = home / "logs" / ("prefect.log" if ui else f"prefect-{os.getpid()}.log")
    return family.start("Prefect server", command, log, environment)


def start_mlflow(home: Path, family: Family, port: int) -> Child:
    """Start MLflow's UI on loopback: one worker, no job runners, host-name check on; its store is nobody's to see."""
    artifacts = (home / "mlartifacts").absolute()
    artifacts.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--app-name", "mft"]  # `tasks.mlflow.ui`
    command += ["--artifacts-destination", artifacts.as_uri()]
    command += ["--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"]
    environment = {
        "MLFLOW_BACKEND_STORE_URI": tracking_uri(home),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return family.start("MLflow server", command, home / "logs" / "mlflow.log", environment)


def up(home: Path, *, prefect_port: int = 4200, deployments: str = "pipelines.deployments") -> None:
    """Start the servers, serve the deployments, and stay until Ctrl-C or SIGTERM; stops what it started.

    Args:
        home: the `MFT_HOME`.
        prefect_port: preferred; another free one is taken if it is in use.
        deployments: module that serves the deployments when it is run.

    Raises:
        ConfigError: another `mft up` is at work here; or the server that the user named does not answer.
        StageError: a service did not start, or died again and again; with the end of its log.
    """
    record = prefect_home(home) / "server.json"
    with _only_one(home), contextlib.ExitStack() as stack:
        _prefect_settings(home)
        os.environ["MFT_HOME"] = str(home.absolute())
        family = Family()
        signal.signal(signal.SIGTERM, _leave)
        before = signal.signal(signal.SIGINT, _leave)  # also where the shell that put us in the background ignored it
        stack.callback(signal.signal, signal.SIGINT, before)
        stack.callback(_stop_all, family, record)
        with contextlib.suppress(KeyboardInterrupt):
            prefect, mlflow, own = _start_servers(home, family, prefect_port)
            _start_deployments(home, family, prefect, deployments)
            ours = f"{prefect}/health" in own
            record.write_text(
                json.dumps({"pid": os.getpid(), "prefect": prefect, "mlflow": mlflow, "own": ours}) + "\n"
            )
            print(f"Prefect  {_ui(prefect)}\nMLflow   {mlflow}{_TRAININGS}\nlogs     {home / 'logs'}")
            if ours:
                print(f"Prefect's page asks for a password: what is in {prefect_home(home) / 'auth'}")
            print("in another terminal, from this directory:  prefect deployment run mft-ablation --watch")
            print("Ctrl-C stops everything")
            _stay(family, own)
        print("stopping")


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Hold the lock of `mft up`.

    Raises:
        ConfigError: another process holds it; which, since when, and where its servers are.
    """
    path = home / "locks" / "up"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            living = living_server(home)
            where = (
                f"Prefect {_ui(living['prefect'])}, MLflow {living['mlflow']}" if living else "its servers start now"
            )
            raise ConfigError(
                f"`mft up` is at work for MFT_HOME = {home}: {handle.read().strip()}; {where}. "
                "Use it, or stop it first."
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        handle.flush()
        yield


def _stay(family: Family, own: list[str]) -> None:
    """Watch the services and start again those that die, until somebody interrupts.

    Raises:
        StageError: one died again and again.
    """
    while True:
        try:
            lines = family.revive()
        except ChildProcessError as error:
            raise StageError(str(error)) from None
        for line in lines:
            print(line)
        if not lines:
            time.sleep(0.5)
            continue
        for address in own:  # what needs the server is not to look for it too early
            with contextlib.suppress(StageError):  # died again: the next turn's
                wait_healthy(family.children, address)


def _stop_all(family: Family, record: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave servers behind
    record.unlink(missing_ok=True)
    family.stop()


def _leave(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _start_servers(home: Path, family: Family, prefect_port: int) -> tuple[str, str, list[str]]:
    """Start those servers that the environment does not name.

    Returns:
        the Prefect API's URL, MLflow's, and where those that were started say that they are healthy.
    """
    prefect, mlflow = os.environ.get("PREFECT_API_URL"), tracking_uri(home)
    if prefect:
        check_answers()
    store = ArtifactStore(home)
    with store.lock("prefect-init"), store.lock("mlflow-init"):  # first starts make the databases
        own = []
        if not prefect:
            port = free_port(prefect_port)
            prefect = _api(port)
            os.environ.update(address_of(home, {"prefect": prefect, "own": True}))
            _set_damaged_aside(home, print)
            start_prefect(home, family, port, ui=True)
            own.append(f"{prefect}/health")
        if not mlflow.startswith("http"):
            port = free_port(5000)
            start_mlflow(home, family, port)
            mlflow = f"http://127.0.0.1:{port}"
            own.append(f"{mlflow}/health")
        if own:
            print("starting the servers (10 to 30 seconds)")
        for address in own:
            wait_healthy(family.children, address)
    return prefect, without_user(mlflow), own


def _start_deployments(home: Path, family: Family, prefect: str, module: str) -> None:
    """Serve the deployments and wait until the server knows them from this start."""
    begun = datetime.now(UTC)
    family.start("deployments", [sys.executable, "-m", module], home / "logs" / "deployments.log", {})

    request = urllib.request.Request(f"{prefect}/deployments/name/mft-ablation/mft-ablation")
    if auth := os.environ.get("PREFECT_API_AUTH_STRING"):
        request.add_header("Authorization", f"Basic {base64.b64encode(auth.encode()).decode()}")

    def registered() -> bool:
        try:
            with _DIRECT.open(request, timeout=5) as reply:
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
        if endings := [text for child in children if (text := child.how_it_ended())]:
            raise StageError("\n".join(endings))
        if time.monotonic() > deadline:
            tails = "\n".join(f"{child.name}, {child.log}:\n{child.tail()}" for child in children)
            raise StageError(f"{complaint} within {START_SECONDS:.0f} seconds\n{tails}")
        time.sleep(0.1)


def free_port(preferred: int | None) -> int:
    """Return the preferred port if it is free on loopback, else any free one."""
    for port in (preferred or 0, 0):
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

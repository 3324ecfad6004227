"""The compose file: its structure, and each service's command and health check run natively, without Docker.

What the container runtime would provide is replaced, nothing else: service names and ports become loopback ports,
volumes become temporary directories. PostgreSQL comes from Debian's package `postgresql`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import yaml
from distributed import Client

DOCKER = Path(__file__).resolve().parents[2] / "docker"
PASSWORD = "0f1e2d3c4b5a"
AUTH = "mft:a5b4c3d2e1f0"
STORE_PASSWORD = "9a8b7c6d5e4f"
PORTS = (4200, 5000, 5432, 8080, 8786, 8787, 8790)
OTHERS = ("postgres", "store", "vllm")
"""services of other images than ours"""


def compose_services(**more: str) -> dict[str, dict[str, Any]]:
    """Return the services with anchors resolved, `${...}` filled in and `$$` read as `$`."""
    given = {"POSTGRES_PASSWORD": PASSWORD, "PREFECT_AUTH_STRING": AUTH, "STORE_PASSWORD": STORE_PASSWORD, **more}

    def fill(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return given.get(match["name"]) or match["default"] or ""

    pattern = r"\$\$|\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}"
    return yaml.safe_load(re.sub(pattern, fill, (DOCKER / "compose.yaml").read_text()))["services"]


SERVICES = compose_services()


def test_only_loopback_is_published() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_every_service_has_a_health_check_and_waits_for_healthy_ones() -> None:
    for name, service in SERVICES.items():
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        for needed, rule in service.get("depends_on", {}).items():
            assert needed in SERVICES
            assert rule == {"condition": "service_healthy"}


def test_workers_on_gpus_offer_gpus_and_else_are_the_same() -> None:
    there = yaml.safe_load((DOCKER / "compose.cuda.yaml").read_text())["services"]
    assert set(there) == {"worker", "dask-worker"}
    assert all(service["deploy"]["resources"]["reservations"]["devices"] for service in there.values())
    changed = [word.replace("cpu=1", "gpu=1") for word in SERVICES["dask-worker"]["command"]]
    assert there["dask-worker"]["command"] == changed


def test_all_who_compute_see_one_home_and_one_store() -> None:
    for name in ("worker", "dask-worker"):
        assert SERVICES[name]["volumes"] == ["data:/data"]
        own = SERVICES[name]["environment"]
        assert own["AWS_ENDPOINT_URL"] == "http://store:9000"
        assert own["AWS_SECRET_ACCESS_KEY"] == SERVICES["store"]["environment"]["MINIO_ROOT_PASSWORD"] == STORE_PASSWORD


def test_who_names_a_store_of_their_own_has_all_who_compute_speak_to_it() -> None:
    theirs = {"MFT_STORE": "s3://bucket/folder", "STORE_URL": "https://s3.example", "STORE_USER": "AKIA"}
    services = compose_services(**theirs)
    for name in ("worker", "dask-worker"):
        own = services[name]["environment"]
        assert [own[one] for one in ("MFT_STORE", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID")] == list(theirs.values())


def test_no_secret_has_a_default() -> None:
    for path in (*DOCKER.glob("*.yaml"), DOCKER / "Dockerfile", DOCKER / ".env.example"):
        for name, default in re.findall(r"(\w*(?:PASSWORD|TOKEN|AUTH)\w*)(?::-|=)[ \t]*([^\s}]*)", path.read_text()):
            assert default in ("", '"$$POSTGRES_PASSWORD"'), f"{path.name}: {name}"


def test_volumes_are_declared_and_owned_by_the_images_user() -> None:
    declared = yaml.safe_load((DOCKER / "compose.yaml").read_text())["volumes"]
    made = re.search(r"chown mft:mft (.*?)\n", (DOCKER / "Dockerfile").read_text())
    assert made
    for name, service in SERVICES.items():
        for mount in service.get("volumes", []):
            source, target = mount.split(":")[:2]
            assert source in declared or (DOCKER / source).is_file(), mount
            assert name in OTHERS or target in made[1].split()


def test_both_image_targets_install_from_the_constraints_compiled_and_drop_root() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert not re.search("NO_COMPILE|--no-compile|DONTWRITEBYTECODE", text), "each start would compile what it imports"
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", text, re.M | re.S))
    for name in ("cpu", "cuda"):
        installs = re.findall(r"pip install .*", stages[f"torch-{name}"] + stages[name])
        assert len(installs) == 3
        assert all("-c constraints.txt" in line or "--no-deps" in line for line in installs)
        assert stages[name].index("USER mft") > stages[name].rindex("RUN")


def test_docker_compose_accepts_the_file_and_refuses_it_without_a_password(tmp_path: Path) -> None:
    """Compose itself where this machine has it; its rules for the file are tested above in any case."""
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        compose = ["docker", "compose"]
    elif shutil.which("docker-compose"):
        compose = ["docker-compose"]
    else:
        pytest.skip("no docker compose here; its rules for the file are tested above in any case")
    secrets = {"POSTGRES_PASSWORD": PASSWORD, "PREFECT_AUTH_STRING": AUTH}
    without = {key: value for key, value in os.environ.items() if key not in secrets}
    no_file = tmp_path / "empty.env"  # in the place of docker/.env
    no_file.touch()

    def config(files: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = [
            *compose,
            "--profile",
            "*",
            "--env-file",
            str(no_file),
            *(part for file in files for part in ("-f", file)),
            "config",
        ]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=DOCKER)

    for name in secrets:
        refused = config(["compose.yaml"], without | {key: value for key, value in secrets.items() if key != name})
        assert refused.returncode != 0
        assert "docker/.env" in refused.stderr  # where to set it
    for files in (["compose.yaml"], ["compose.yaml", "compose.cuda.yaml"]):
        accepted = config(files, without | secrets)
        assert accepted.returncode == 0, accepted.stderr
        assert "warn" not in accepted.stderr.lower()
        assert set(yaml.safe_load(accepted.stdout)["services"]) == set(SERVICES)


class Machine:
    """This machine in the place of the compose network: ports, directories and running services."""

    def __init__(self, directory: Path, postgres: Path) -> None:
        self.directory, self.postgres = directory, postgres
        self.ports = {str(port): str(free_port()) for port in PORTS}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def native(self, text: str) -> str:
        """Replace service names, ports and mount points by what stands for them here."""
        text = re.sub(
            r"\b(?:postgres|prefect|mlflow|dask-scheduler)(?=:\d)", "127.0.0.1", text.replace("0.0.0.0", "127.0.0.1")
        )
        text = re.sub(
            r"(?<=[:= ])(4200|5000|5432|8080|8786|8787|8790)\b|^(4200|8080)$", lambda match: self.ports[match[0]], text
        )
        return re.sub(r"(?<![\w/])/(?=(?:artifacts|data|tmp)\b)", f"{self.directory}/", text)

    def environment(self, name: str) -> dict[str, str]:
        """The image's and the service's environment; nothing of this process's own Prefect, MLflow or Hugging Face."""
        kept = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "TMPDIR")}
        path = os.pathsep.join([str(Path(sys.executable).parent), str(self.postgres), os.environ["PATH"]])
        image = dict(re.findall(r"(MFT_HOME|HF_HOME|PREFECT_HOME)=(\S+)", (DOCKER / "Dockerfile").read_text()))
        own = {key: str(value) for key, value in {**image, **SERVICES[name].get("environment", {})}.items()}
        return kept | {"PATH": path} | {key: self.native(value) for key, value in own.items()}

    def start(self, name: str, command: list[str] | None = None) -> None:
        """Start a service in a process group of its own and wait until its health check passes."""
        command = command or [self.native(part) for part in SERVICES[name]["command"]]
        log = (self.directory / f"{name}.log").open("wb")
        self.running[name] = subprocess.Popen(
            command, env=self.environment(name), cwd=self.directory, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 150
        while not self.healthy(name):
            assert self.running[name].poll() is None, f"{name} ended:\n{self.log(name)}"
            assert time.monotonic() < deadline, f"{name} is not healthy:\n{self.log(name)}"
            time.sleep(0.5)

    def healthy(self, name: str) -> bool:
        kind, *test = SERVICES[name]["healthcheck"]["test"]
        command = [self.native(part) for part in test]
        command = ["sh", "-c", *command] if kind == "CMD-SHELL" else command
        return subprocess.run(command, env=self.environment(name), capture_output=True, timeout=30).returncode == 0

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()[-3000:]

    def stop(self) -> None:
        """End the services, the last one first, each by the id of its own group."""
        for process in reversed(self.running.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    elsewhere = shutil.which("initdb")
    if not elsewhere:
        pytest.fail("PostgreSQL's programs are missing: install Debian's package `postgresql`, as `.ci/run` does.")
    return Path(elsewhere).parent


def start_postgres(machine: Machine) -> None:
    """Do what the postgres image does on its first start: make the cluster, the user and the databases, then serve."""
    data, password = machine.directory / "postgres", machine.directory / "password"
    password.write_text(PASSWORD)
    data.mkdir()
    user = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        for path in (data, password):
            shutil.chown(path, "postgres", "postgres")
    initdb = ["initdb", "-D", str(data), "-U", "mft", "--pwfile", str(password), "--auth=scram-sha-256", "--no-sync"]
    environment = machine.environment("postgres")
    subprocess.run([*user, *initdb], env=environment, check=True, capture_output=True)
    port = machine.ports["5432"]
    serve = [*user, "postgres", "-D", str(data), "-p", port, "-c", "listen_addresses=127.0.0.1"]
    serve += ["-c", "unix_socket_directories="]
    first = subprocess.Popen(serve, env=environment, stderr=subprocess.DEVNULL)
    at = ["-h", "127.0.0.1", "-p", port]
    try:
        while subprocess.run(["pg_isready", "-q", *at], env=environment).returncode != 0:
            assert first.poll() is None
            time.sleep(0.1)
        script = ["psql", *at, "-U", "mft", "-d", "postgres", "-v", "ON_ERROR_STOP=1"]
        script += ["-f", str(DOCKER / "create-databases.sql")]
        subprocess.run(script, env=environment | {"PGPASSWORD": PASSWORD}, check=True, capture_output=True)
    finally:
        first.send_signal(signal.SIGINT)
        first.wait(timeout=20)
    machine.start("postgres", serve)


@pytest.fixture
def machine() -> Iterator[Machine]:
    programs = postgres_programs()
    directory = Path(tempfile.mkdtemp(prefix="mft-compose-"))  # not tmp_path: the user postgres must get in
    directory.chmod(0o755)
    machine = Machine(directory, programs)
    try:
        yield machine
    finally:
        machine.stop()
        shutil.rmtree(directory)


def get(url: str, host: str | None = None) -> bytes:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return bytes(reply.read())


def count_tables(machine: Machine, database: str) -> int:
    with contextlib.closing(
        psycopg2.connect(host="127.0.0.1", port=machine.ports["5432"], user="mft", password=PASSWORD, dbname=database)
    ) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        return int(cursor.fetchone()[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_services_command_starts_and_passes_its_health_check(machine: Machine) -> None:
    for name in ("artifacts", "data", "tmp"):
        (machine.directory / name).mkdir()
    start_postgres(machine)
    machine.start("prefect")
    machine.start("mlflow")
    machine.start("worker")
    machine.start("dask-scheduler")
    machine.start("dask-worker")

    with Client(f"tcp://127.0.0.1:{machine.ports['8786']}", timeout=60) as client:
        client.wait_for_workers(1, timeout=60)
        (worker,) = client.scheduler_info()["workers"].values()
        assert worker["resources"] == {"cpu": 1}  # what our stages ask for
        assert client.submit(os.getenv, "MFT_HOME", resources={"cpu": 1}).result(60) == f"{machine.directory}/data"

    api = f"http://127.0.0.1:{machine.ports['4200']}/api"
    deadline = time.monotonic() + 60
    expected = {"mft-ablation", "mft-pipeline", "prepare-data", "fine-tune", "learn-mask", "merge-mask", "evaluate"}
    while True:
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {b64encode(AUTH.encode()).decode()}"}
        request = urllib.request.Request(f"{api}/deployments/filter", data=b"{}", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            served = {deployment["name"] for deployment in json.load(reply)}
        if expected <= served:
            break
        assert time.monotonic() < deadline, served
        time.sleep(1)

    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(f"{api}/admin/version")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        get(f"{api}/health", host="elsewhere.example")
    assert get(f"{api}/health", host="prefect:4200")

    mlflow = f"http://127.0.0.1:{machine.ports['5000']}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    assert b"Default" in get(mlflow, host=f"127.0.0.1:{machine.ports['5000']}")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(mlflow, host="elsewhere.example")

    for database in ("prefect", "mlflow"):
        assert count_tables(machine, database) > 10, f"{database} does not use PostgreSQL"

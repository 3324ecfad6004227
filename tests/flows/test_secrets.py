"""Passwords and tokens of the environment are only there: not in files, logs, pages, outputs or process lists."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mft_core.processes import Family
from pipelines.servers import services
from tests.support.mini import write_profile, write_study

SECRET = """
    HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_TOKEN HUGGINGFACE_TOKEN
    OPENAI_API_KEY OPENAI_ADMIN_KEY AZURE_OPENAI_API_KEY ANTHROPIC_API_KEY
    AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
    MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN MLFLOW_FLASK_SERVER_SECRET_KEY
    PREFECT_API_KEY PREFECT_API_AUTH_STRING PREFECT_SERVER_API_AUTH_STRING PREFECT_API_DATABASE_PASSWORD
    PGPASSWORD POSTGRES_PASSWORD
""".split()  # noqa: SIM905
CANARY = "c4n4ry"


def canaries() -> dict[str, str]:
    found = {name: f"{CANARY}-{number}-of-{name.lower()}" for number, name in enumerate(SECRET)}
    return found | {"DATABASE_URL": f"postgresql://me:{CANARY}-of-the-database@127.0.0.1:9/db"}


def in_process_lists(parent: int) -> list[str]:
    """Return the command lines of a process and all that it started in which a canary is."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = [psutil.Process(parent), *psutil.Process(parent).children(recursive=True)]
        return [line for process in processes if CANARY in (line := " ".join(process.cmdline()))]
    return []


def in_files(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("tracking", [{}, {"MLFLOW_TRACKING_URI": f"http://me:{CANARY}-of-mlflow@127.0.0.1:9"}])
def test_a_study_writes_prints_and_shows_no_secret_and_its_files_are_its_users_own(
    tracking: dict[str, str], tmp_path: Path
) -> None:
    write_profile(tmp_path)
    study = write_study(tmp_path, [{"method": "fft"}, {"method": "mft"}])
    home = tmp_path / "home"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    command = [sys.executable, "-m", "pipelines.cli", "run", str(study), "--profile", str(tmp_path / "mini.yaml")]
    with (tmp_path / "printed").open("wb") as printed:
        run = subprocess.Popen(
            command,
            stdout=printed,
            stderr=printed,
            env={**kept, **canaries(), **tracking, "OMP_NUM_THREADS": "1", "MFT_HOME": str(home)},
            umask=0o022,
        )
        shown: list[str] = []
        while run.poll() is None:
            shown += in_process_lists(run.pid)
            shown += in_files(home / "logs")  # some go when the run ends
            time.sleep(0.1)
    said = (tmp_path / "printed").read_text()
    assert run.returncode == 0, said
    assert ("cannot be used" in said) == bool(tracking)
    assert not shown
    assert in_files(tmp_path) == []
    modes = {stat.S_IMODE(path.lstat().st_mode) & 0o077 for path in [home, *home.rglob("*")] if not path.is_symlink()}
    assert modes == {0}


def test_the_address_of_mlflows_database_is_in_no_process_list_and_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql+psycopg2://me:{CANARY}-of-mlflow@127.0.0.1:9/db")
    family = Family()
    try:
        server = services.start_mlflow(tmp_path, family, services.free_port(None))
        deadline = time.monotonic() + 60
        while server.process.poll() is None and "refused" not in server.tail(100) and time.monotonic() < deadline:
            assert in_process_lists(server.process.pid) == []
            time.sleep(0.05)
        assert "refused" in server.tail(100), "it knew the address"
        assert in_files(tmp_path) == []
    finally:
        family.stop()

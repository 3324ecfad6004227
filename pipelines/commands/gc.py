"""What under `MFT_HOME` no kept study reaches, and its removal; called by `mft gc`.

A study is kept as long as its page lies in `reports/`: beside it stands which artifacts its result rests on (`ROOTS`,
written with the page). Kept are also comparisons, which later ones look back on, and what was made or asked for in the
last days, as by a run that was killed, with its inputs. While a run lives nothing is done, and none begins meanwhile; a
store that machines share is not touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from mft_core.errors import ConfigError
from mft_core.store import manifests
from mft_core.store.artifacts import ArtifactStore
from pipelines.servers.runs import LOCK, runs
from pipelines.servers.services import prefect_home
from tasks.mlflow.client import tracking_uri

ROOTS = "artifacts.json"
_HALF_MADE = ("artifacts/*/.*", "reports/*/.unf*", "models/.incomplete-*", ".fetch-*")
"""under `MFT_HOME`: what killed runs and fetches left"""
_ALL = 10**9
"""runs of MLflow"""
_ENDED = "state_type IN ('COMPLETED', 'FAILED', 'CRASHED', 'CANCELLED') AND end_time < :until"
_KILLED = "state_type IN ('RUNNING', 'PENDING', 'CANCELLING') AND coalesce(start_time, created) < :until"
"""what Prefect has of flow runs that nobody could tell it the end of: no run lives here"""


class _Root(BaseModel):
    result: str | None
    artifacts: list[str]


def keep(page: Path, command: str, result: str | None, artifacts: Sequence[str]) -> None:
    """Say beside a page what its result rests on; what other commands have written there stays kept.

    Where that is damaged it is left: what it kept would count as waste.

    Args:
        result: key by which MLflow knows it.
        artifacts: `stage/key` each.
    """
    path = page.with_name(ROOTS)
    try:
        before = _read_roots(path)
    except FileNotFoundError:
        before = {}
    except (OSError, ValueError):
        logging.getLogger("mft").warning("%s is damaged and is left as it is; `mft gc` says what to do", path)
        return
    unfinished = path.with_suffix(f".{os.getpid()}")
    roots = {**before, command: _Root(result=result, artifacts=sorted(artifacts))}
    text = json.dumps({name: root.model_dump() for name, root in roots.items()}, indent=1)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def _read_roots(path: Path) -> dict[str, _Root]:
    return TypeAdapter(dict[str, _Root]).validate_json(path.read_bytes())


@dataclass(frozen=True)
class Waste:
    """What nobody needs, by kind."""

    paths: Mapping[str, Sequence[Path]]
    sizes: Mapping[str, int]
    """bytes"""
    prefect_runs: int
    """flow runs, with their tasks and logs"""
    mlflow_runs: Sequence[str]

    def lines(self) -> Iterator[str]:
        """Tell it to people."""
        for kind, paths in self.paths.items():
            if paths:
                yield f"{self.sizes[kind] / 1e6:>12,.1f} MB  {len(paths):>6,}  {kind}"
        yield f"{'':>12}     {self.prefect_runs:>6,}  flow runs in Prefect's database"
        yield f"{'':>12}     {len(self.mlflow_runs):>6,}  runs in MLflow's database"
        yield f"{sum(self.sizes.values()) / 1e6:>12,.1f} MB          in all"


def collect(store: ArtifactStore, days: int, delete: bool) -> Waste:
    """Find what no kept study reaches and nobody has touched for so many days, and delete it if asked to.

    Raises:
        ConfigError: a run lives here, or a page does not say what its result rests on.
    """
    if not store.home.is_dir():
        raise ConfigError(f"MFT_HOME = {store.home}: there is no such directory; set MFT_HOME.")
    with store.lock(LOCK):
        living = [entry for entry in runs(store.home) if entry["state"] == "running"]
        if living:
            which = "\n".join(f"  {entry['command']} (process {entry['pid']} on {entry['host']})" for entry in living)
            raise ConfigError(f"a run needs what lies under MFT_HOME = {store.home}; wait for it, or stop it:\n{which}")
        waste = _find(store, time.time() - days * 86400)
        if delete:
            _delete(store, waste, days)
    return waste


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a directory."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size if path.is_symlink() or path.exists() else 0
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names)


def _find(store: ArtifactStore, before: float) -> Waste:
    home = store.home
    roots = _roots(home)

    def old(found: Iterator[Path]) -> list[Path]:
        return sorted(path for path in found if _touched(path) < before)

    artifacts = old(path.parent for path in (home / "artifacts").glob("[!.]*/[!.]*/manifest.json"))
    needed = _needed(home, {name for entry in roots for name in entry.artifacts}, set(artifacts))
    unreached = [path for path in artifacts if path not in needed and path.parent.name != "compare"]
    references = [home / "prefect" / "results" / path.name for path in unreached]
    paths = {
        "artifacts that no kept study reaches": unreached,
        "Prefect's references to them": [path for path in references if path.exists()],
        "states of unfinished work": old((home / "work").glob("*")),
        "what killed runs left half made": [path for what in _HALF_MADE for path in old(home.glob(what))],
        "logs": old((home / "logs").glob("*.log")),
        "records of runs": old((home / "runs").glob("*")),
    }
    results = {entry.result for entry in roots if entry.result}
    sizes = {kind: sum(map(size, found)) for kind, found in paths.items()}
    return Waste(paths, sizes, _prefect_runs(home, before), _mlflow_runs(home, before, results))


def _touched(path: Path) -> float:
    """Return when a file, or anything directly within a directory, was last written."""
    within = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
    return max(each.lstat().st_mtime for each in (path, *within))


def _roots(home: Path) -> list[_Root]:
    found: list[_Root] = []
    for page in sorted((home / "reports").glob("*/report.html")):
        try:
            found += _read_roots(page.with_name(ROOTS)).values()
        except (OSError, ValueError) as error:
            text = page.with_suffix(".md").read_text("utf-8", "replace") if page.with_suffix(".md").is_file() else ""
            ran = re.search(r"\bmft run ([^`\n]+)", text)
            do = "Write it" if isinstance(error, FileNotFoundError) else (
                f"Its {ROOTS} is damaged: remove that, and write it for each run of this study that you keep"
            )  # fmt: skip
            raise ConfigError(
                f"{page.parent}: does not say which artifacts it rests on. {do}: mft report "
                f"{ran[1].strip() if ran else 'STUDY --profile PROFILE'}; or remove the folder if nobody needs it."
            ) from None
    return found


def _needed(home: Path, roots: set[str], old: set[Path]) -> set[Path]:
    """Return the artifacts that are roots, or young, and the inputs of all these."""
    read = {path: manifests.read(path) for path in (home / "artifacts").glob("[!.]*/[!.]*")}
    there = {path: manifest for path, manifest in read.items() if manifest}
    made = {manifest["digest"]: path for path, manifest in there.items()}
    to_see = [path for path in there if path not in old or f"{path.parent.name}/{path.name}" in roots]
    needed: set[Path] = set()
    while to_see:
        path = to_see.pop()
        if path not in needed:
            needed.add(path)
            to_see += [made[digest] for digest in there[path]["inputs"].values() if digest in made]
    return needed


def _prefect_runs(home: Path, before: float) -> int:
    database = home / "prefect" / "prefect.db"
    if not database.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        rows = f"SELECT count(*) FROM flow_run WHERE parent_task_run_id IS NULL AND ({_ENDED} OR {_KILLED})"
        try:
            return int(connection.execute(rows, _until(before)).fetchone()[0])
        except sqlite3.DatabaseError:  # no server has filled it yet; or it is damaged, and the next one makes it anew
            return 0


def _until(before: float) -> dict[str, str]:
    return {"until": datetime.fromtimestamp(before, UTC).strftime("%Y-%m-%d %H:%M:%S")}


def _mlflow_runs(home: Path, before: float, results: set[str]) -> list[str]:
    """Return the runs of old results that are not kept, with the runs nested in them, and those deleted before."""
    if not (home / "mlflow.db").is_file() or not tracking_uri(home).startswith("sqlite:"):
        return []
    import mlflow
    from mlflow.entities import ViewType

    mlflow.set_tracking_uri(tracking_uri(home))
    try:
        experiments = [experiment.experiment_id for experiment in mlflow.search_experiments(view_type=ViewType.ALL)]
        found = mlflow.search_runs(experiments, "", ViewType.ALL, max_results=_ALL, output_format="list")
    except Exception as error:  # MLflow and what it stands on raise whatever they meet in a damaged file
        raise ConfigError(
            f"{home / 'mlflow.db'} cannot be read ({type(error).__name__}: {str(error).strip():.100}); move it away: "
            "`mft report STUDY --sync` writes the numbers of finished studies to a new one."
        ) from error
    kept = {run.info.run_id for run in found if run.data.tags.get("mft.result") in results
            and run.info.lifecycle_stage == "active"}  # fmt: skip

    def goes(run: Any) -> bool:
        written = max(run.info.start_time or 0, run.info.end_time or 0) / 1000
        return written < before and run.data.tags.get("mlflow.parentRunId", run.info.run_id) not in kept

    return [run.info.run_id for run in found if goes(run)]


def _delete(store: ArtifactStore, waste: Waste, days: int) -> None:
    for kind, paths in waste.paths.items():
        for path in paths:
            if kind.startswith("artifacts"):
                with store.lock(path.name):
                    manifests.discard(path)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if waste.mlflow_runs:
        _delete_from_mlflow(waste.mlflow_runs)
        _shrink(store.home / "mlflow.db")
    if waste.prefect_runs:
        _delete_from_prefect(store.home, days)
        _shrink(store.home / "prefect" / "prefect.db")


def _delete_from_mlflow(run_ids: Sequence[str]) -> None:
    """Delete runs for good, with their files and the models that they have logged, by MLflow's own command."""
    from mlflow.cli import cli
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient, get_tracking_uri

    client = MlflowClient()
    for run_id in run_ids:
        run = client.get_run(run_id)
        for model in run.outputs.model_outputs if run.outputs else ():
            try:
                client.delete_logged_model(model.model_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # it is gone, and its run is not
                    raise
        if run.info.lifecycle_stage == "active":
            client.delete_run(run_id)
    with contextlib.redirect_stdout(io.StringIO()):
        for at in range(0, len(run_ids), 500):
            some = ",".join(run_ids[at : at + 500])
            cli.main(["gc", "--backend-store-uri", get_tracking_uri(), "--run-ids", some], standalone_mode=False)


def _delete_from_prefect(home: Path, days: int) -> None:
    """Delete old flow runs by the server's own clean-up, called here: no server need run."""
    with contextlib.closing(sqlite3.connect(home / "prefect" / "prefect.db")) as connection, connection:
        end = "state_type = 'CRASHED', state_name = 'Crashed', end_time = coalesce(start_time, created)"
        connection.execute(f"UPDATE flow_run SET {end} WHERE {_KILLED}", _until(time.time() - days * 86400))
    os.environ["PREFECT_HOME"] = str(prefect_home(home))
    os.environ["PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD"] = str(days * 86400)
    from prefect.server.database import provide_database_interface
    from prefect.server.services.db_vacuum import vacuum_old_flow_runs

    asyncio.run(vacuum_old_flow_runs(db=provide_database_interface()))


def _shrink(database: Path) -> None:
    """Give the room of deleted rows back, unless a server has the database open."""
    with contextlib.closing(sqlite3.connect(database)) as connection, contextlib.suppress(sqlite3.OperationalError):
        connection.execute("VACUUM")

"""Immutable results on disk, addressed by what they are made of; an artifact exists whole or not at all.

    $MFT_HOME/artifacts/<stage>/<key>/manifest.json   sizes and sha256 of the payload, recipe, inputs, provenance
    $MFT_HOME/artifacts/<stage>/<key>/...             the payload
    $MFT_HOME/work/<key>/                             resumable state of unfinished work
    $MFT_HOME/locks/<key>                             held with flock while the key is computed

A stage writes into a temporary directory; payload and manifest are fsynced, then the directory is renamed into place.
flock is released by the kernel when its holder dies, so a killed run never blocks the next. Used by `tasks` and by
anyone who wants a cached stage without Prefect.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from mft_core import provenance
from mft_core.errors import ConfigError
from mft_core.identity import digest, digest_file, stage_key
from mft_core.recipes import Recipe, Runtime
from mft_core.stages import Progress, Stage, StageContext

MANIFEST = "manifest.json"


class Input(Protocol):
    """Anything a stage can take in: an artifact or a source, known by its digest."""

    @property
    def digest(self) -> str: ...

    def local_path(self, store: ArtifactStore) -> Path: ...


class ArtifactRef(BaseModel):
    """A small, serialisable reference to a finished artifact; what Prefect caches instead of the payload."""

    model_config = ConfigDict(frozen=True)

    stage: str
    key: str
    digest: str
    part: str = ""
    """path inside the payload that a consumer is given, e.g. 'model'"""

    def at(self, part: str) -> ArtifactRef:
        """Return the same artifact, pointing at one part of its payload."""
        return self.model_copy(update={"part": part})

    def local_path(self, store: ArtifactStore) -> Path:
        """Return where the payload (or its part) lies."""
        return store.directory(self.stage, self.key) / self.part


@dataclass(frozen=True)
class Built:
    """The outcome of `ArtifactStore.build`: the reference, and whether anything was computed."""

    ref: ArtifactRef
    computed: bool
    manifest: dict[str, Any]


class ArtifactStore:
    """The artifacts under one `MFT_HOME`."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self._verified: dict[Path, tuple[int, int, int]] = {}

    @classmethod
    def from_environment(cls) -> ArtifactStore:
        """Open the store at `$MFT_HOME`, by default `.mft` in the working directory."""
        return cls(Path(os.environ.get("MFT_HOME") or ".mft"))

    def check_writable(self) -> None:
        """Raise a ConfigError when nothing can be written under the home."""
        probe = self.home / f".write-test-{os.getpid()}"
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"MFT_HOME = {self.home}: not writable ({error.strerror}); "
                "set MFT_HOME to a directory that you can write to."
            ) from error

    def directory(self, stage: str, key: str) -> Path:
        """Return where the artifact lies or would lie."""
        return self.home / "artifacts" / stage / key

    def work(self, key: str) -> Path:
        """Return the directory of the key's resumable state."""
        return self.home / "work" / key

    def key(self, stage: Stage, recipe: Recipe, inputs: Mapping[str, Input]) -> str:
        """Return the key of the artifact that the stage makes of recipe and inputs."""
        return stage_key(stage.name, stage.version, recipe, {name: ref.digest for name, ref in inputs.items()})

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return the manifest without looking at the payload, or None when there is no readable one."""
        try:
            loaded = json.loads((self.directory(stage, key) / MANIFEST).read_text())
        except (OSError, ValueError):
            return None
        return loaded if isinstance(loaded, dict) and isinstance(loaded.get("files"), dict) else None

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """Return the artifact if it is there and whole, else None."""
        return None if self.damage(stage, key) else self._ref(stage, key)

    def damage(self, stage: str, key: str) -> str | None:
        """Say what is wrong with the artifact ("missing", "model/config.json: 3 bytes, not 7"), or None if whole."""
        directory = self.directory(stage, key)
        if not directory.exists():
            return "missing"
        manifest = self.manifest(stage, key)
        if manifest is None:
            return f"{MANIFEST}: missing or unreadable"
        if manifest.get("digest") != digest(manifest["files"]) or manifest.get("key") != key:
            return f"{MANIFEST}: does not match its own digest or key"
        for name, entry in manifest["files"].items():
            problem = self._file_damage(directory / name, entry)
            if problem:
                return f"{name}: {problem}"
        return None

    def _file_damage(self, path: Path, entry: Mapping[str, Any]) -> str | None:
        try:
            stat = path.stat()
        except OSError:
            return "missing"
        if stat.st_size != entry["size"]:
            return f"{stat.st_size} bytes, not {entry['size']}"
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
        if self._verified.get(path) != seen:
            if digest_file(path) != entry["sha256"]:
                return "content altered (sha256 differs)"
            self._verified[path] = seen
        return None

    def _ref(self, stage: str, key: str) -> ArtifactRef | None:
        manifest = self.manifest(stage, key)
        return ArtifactRef(stage=stage, key=key, digest=manifest["digest"]) if manifest else None

    def build(
        self,
        stage: Stage,
        recipe: Recipe,
        inputs: Mapping[str, Input],
        runtime: Runtime,
        *,
        report: Callable[[Progress], None] = lambda progress: None,
        log: logging.Logger | None = None,
        force: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> Built:
        """Return the artifact of (stage, recipe, inputs), computing it once if it is missing or damaged.

        Args:
            report: receives the stage's progress.
            force: compute again even if a whole artifact is there (`--rerun`).
            notes: further provenance, e.g. the MLflow run id.

        Raises:
            ConfigError, StageError: from the stage; nothing is committed, the resumable state is kept.
        """
        log = log or logging.getLogger("mft")
        key = self.key(stage, recipe, inputs)
        with self.lock(key, log):
            problem = "rerun asked for" if force else self.damage(stage.name, key)
            if problem is None:
                manifest = self.manifest(stage.name, key)
                assert manifest is not None
                return Built(ArtifactRef(stage=stage.name, key=key, digest=manifest["digest"]), False, manifest)
            if problem != "missing":
                log.warning("%s %s is computed again: %s", stage.name, key[:12], problem)
            if force:
                shutil.rmtree(self.work(key), ignore_errors=True)
            return self._compute(stage, key, recipe, inputs, runtime, report, log, notes or {})

    def _compute(
        self,
        stage: Stage,
        key: str,
        recipe: Recipe,
        inputs: Mapping[str, Input],
        runtime: Runtime,
        report: Callable[[Progress], None],
        log: logging.Logger,
        notes: Mapping[str, Any],
    ) -> Built:
        final = self.directory(stage.name, key)
        temporary = final.parent / f".incomplete-{key}"
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed run: the lock is ours
        temporary.mkdir(parents=True)
        work = self.work(key)
        work.mkdir(parents=True, exist_ok=True)
        log.info("computing %s %s", stage.name, key)
        started = time.perf_counter()
        paths = {name: ref.local_path(self) for name, ref in inputs.items()}
        try:
            summary = stage.run(recipe, paths, temporary, StageContext(runtime, work, report, log))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        files = {
            str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": digest_file(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        manifest = {
            "stage": stage.name,
            "version": stage.version,
            "key": key,
            "digest": digest(files),
            "files": files,
            "recipe": recipe.model_dump(mode="json"),
            "inputs": {name: ref.digest for name, ref in inputs.items()},
            "summary": summary,
            "provenance": {
                **provenance.describe(),
                **notes,
                "runtime": runtime.model_dump(mode="json"),
                "seconds": round(time.perf_counter() - started, 3),
            },
        }
        self._commit(temporary, final, manifest)
        log.info("finished %s %s", stage.name, key)
        shutil.rmtree(work, ignore_errors=True)
        return Built(ArtifactRef(stage=stage.name, key=key, digest=manifest["digest"]), True, manifest)

    def _commit(self, temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n")
        for path in temporary.rglob("*"):
            _fsync(path)
        _fsync(temporary)
        if final.exists():
            self._discard(final)
        temporary.rename(final)
        _fsync(final.parent)

    def _discard(self, directory: Path) -> None:
        """Remove a damaged artifact in one step: never leave a half-deleted one under its own name."""
        doomed = directory.parent / f".discarded-{directory.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)

    @contextlib.contextmanager
    def lock(self, name: str, log: logging.Logger | None = None) -> Iterator[None]:
        """Hold the lock of that name, waiting (and saying so) while another process or thread holds it."""
        path = self.home / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                (log or logging.getLogger("mft")).info("waiting for another run that computes %s", name[:12])
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

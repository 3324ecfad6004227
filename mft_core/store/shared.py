"""Artifacts that machines share, at any URL of fsspec: `MFT_STORE=s3://bucket/folder`, `gs://…`, a path all can see.

    URL/artifacts/<stage>/<key>.json          the manifest and the name of its payload; written last, and only if absent
    URL/artifacts/<stage>/<key>/<attempt>/…   a payload; every attempt has a folder of its own, so two never mix
    URL/locks/<key>                           a lease, into which its holder writes a new beat every few seconds

A machine's `$MFT_HOME/artifacts` is then its copy of what it has used; resumable state stays with the machine. The
lease saves work, the manifest decides: where two machines did compute one key, the first manifest stands and the other
takes its payload. No clocks are compared: a lease is lost when nobody has seen it change for `LOST_SECONDS`. Used by
`mft_core.store.artifacts` alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mft_core.cache_key import digest_file
from mft_core.errors import ConfigError, StageError
from mft_core.stage import Progress
from mft_core.store import manifests

BEAT_SECONDS = 10.0
LOST_SECONDS = 60.0


class SharedStore:
    """The artifacts and leases under one URL."""

    def __init__(self, url: str) -> None:
        """Open it; nothing is read or written yet.

        Raises:
            ConfigError: the URL is of no file system that is installed here.
        """
        self.url = url
        try:
            self._files, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # of whichever library; fsspec says which package it misses
            raise ConfigError(
                f"MFT_STORE = {url}: {error}. Valid is any URL of fsspec, e.g. s3://bucket/folder (package s3fs)."
            ) from error

    def check_writable(self) -> None:
        """Raise a ConfigError where nothing can be written, read back or removed."""
        probe = f"{self._root}/.write-test-{uuid.uuid4().hex}"
        with self._reached("written to"):
            self._create(probe, b"x")
            self._files.rm_file(probe)

    @contextlib.contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whichever library speaks to that store
            raise ConfigError(
                f"MFT_STORE = {self.url}: cannot be {what} ({error or type(error).__name__}); "
                "it must exist, and the usual variables of that service must name somebody who may write there."
            ) from error

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return an artifact's manifest, or None where there is none that holds what its seal says."""
        with self._reached("read"):
            entry = self._entry(stage, key)
        return entry["manifest"] if entry else None

    def keys(self, stage: str) -> set[str]:
        """Return the keys of a stage's artifacts."""
        with self._reached("read"):
            return {Path(str(path)).stem for path in self._files.glob(f"{self._root}/artifacts/{stage}/*.json")}

    def push(self, stage: str, key: str, payload: Path, manifest: Mapping[str, Any], replace: bool) -> bool:
        """Upload a payload, then its manifest; returns whether it is this one that stands.

        Args:
            replace: write over a manifest that is there; else the first one stands.
        """
        attempt = uuid.uuid4().hex
        for name in manifest["files"]:
            target = f"{self._folder(stage, key)}/{attempt}/{name}"
            self._make_parent(target)
            self._files.put_file(str(payload / name), target)
        text = json.dumps({"payload": attempt, "manifest": manifest}, allow_nan=False).encode()
        path = self._folder(stage, key) + ".json"
        if replace or (self._files.exists(path) and self._entry(stage, key) is None):  # damaged: not to be kept
            self._files.pipe_file(path, text)
        elif not self._create(path, text):
            self._files.rm(f"{self._folder(stage, key)}/{attempt}", recursive=True)
            return False
        return True

    def pull(self, stage: str, key: str, final: Path, log: logging.Logger) -> None:
        """Make this machine's copy of an artifact, verified.

        Raises:
            StageError: its payload is not what its manifest lists; the manifest is removed, so it is computed again.
        """
        entry = self._entry(stage, key)
        if entry is None:
            raise StageError(f"{stage} {key[:12]} is no longer in MFT_STORE = {self.url}; run the same command again.")
        manifest = entry["manifest"]
        temporary = final.parent / f".incomplete-{key}"
        shutil.rmtree(temporary, ignore_errors=True)
        log.info("fetching %s %s from %s", stage, key, self.url)
        for name, listed in manifest["files"].items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._files.get_file(f"{self._folder(stage, key)}/{entry['payload']}/{name}", str(temporary / name))
            if not (temporary / name).is_file() or digest_file(temporary / name) != listed["sha256"]:
                shutil.rmtree(temporary)
                self._files.rm_file(self._folder(stage, key) + ".json")
                raise StageError(
                    f"{stage} {key[:12]} in MFT_STORE = {self.url} is damaged: {name} is missing or altered. "
                    "It has been taken out; run the same command again, and it is computed anew."
                )
        temporary.mkdir(parents=True, exist_ok=True)  # of an artifact without files
        manifests.commit(temporary, final, manifest)

    @contextlib.contextmanager
    def lease(self, key: str, note: Path, log: logging.Logger, report: Callable[[Progress], None]) -> Iterator[None]:
        """Hold the lease of a key, waiting (and saying so) while another machine does; a dead holder loses it.

        Args:
            note: file in which whoever holds this machine's own lock of the key keeps the name of his lease: one that
                is there belongs to a process that was killed, and is not waited for.
        """
        path = f"{self._root}/locks/{key}"
        mine = f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex}"
        self._make_parent(path)
        if note.exists() and (self._read(path) or b"-").split(b", beat")[0] == note.read_bytes():
            with contextlib.suppress(FileNotFoundError):  # another machine was faster
                self._files.rm_file(path)
        note.write_text(mine)
        self._wait_for(path, mine, key, log, report)
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(path, mine, ended, log), name="lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            if (self._read(path) or b"").startswith(mine.encode()):
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(path)
            note.unlink(missing_ok=True)

    def _wait_for(
        self, path: str, mine: str, key: str, log: logging.Logger, report: Callable[[Progress], None]
    ) -> None:
        seen: bytes | None = None
        since = time.monotonic()
        while not self._create(path, mine.encode()):
            now = self._read(path)
            if now is not None:
                who = now.decode(errors="replace").split(", ")[:2]
                report(Progress(0, 0, doing=f"waiting for another machine that computes {key[:12]} ({', '.join(who)})"))
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > LOST_SECONDS:
                log.warning(
                    "the holder of %s has been silent for %.0f s: its work is taken over", key[:12], LOST_SECONDS
                )
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(path)
                continue
            time.sleep(min(1.0, BEAT_SECONDS / 4))

    def _beat(self, path: str, mine: str, ended: threading.Event, log: logging.Logger) -> None:
        beat = 0
        while not ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                if not (self._read(path) or b"").startswith(mine.encode()):
                    return  # taken over meanwhile; the manifest decides whose work stands
                self._files.pipe_file(path, f"{mine}, beat {beat}".encode())
            except Exception as error:  # of the network
                log.warning("the lease %s could not be renewed: %s", path, error)

    def _folder(self, stage: str, key: str) -> str:
        return f"{self._root}/artifacts/{stage}/{key}"

    def _entry(self, stage: str, key: str) -> dict[str, Any] | None:
        text = self._read(self._folder(stage, key) + ".json")
        try:
            entry = json.loads(text or b"null")
            manifest = manifests.of_right_shape(entry["manifest"])
            sound = manifest is not None and not manifests.broken_seal(manifest, stage, key)
            return entry if sound and isinstance(entry["payload"], str) else None
        except (ValueError, TypeError, LookupError, RecursionError):
            return None

    def _read(self, path: str) -> bytes | None:
        try:
            found: bytes = self._files.cat_file(path)
        except FileNotFoundError:
            return None
        return found

    def _create(self, path: str, data: bytes) -> bool:
        """Write a file that is not there yet; returns False where it is. In one step on S3, GCS and local disks."""
        try:
            if isinstance(self._files, LocalFileSystem):  # fsspec looks first and writes then; a link is one step
                unfinished = f"{path}.{uuid.uuid4().hex}"
                self._make_parent(path)
                self._files.pipe_file(unfinished, data)
                try:
                    os.link(unfinished, path)
                finally:
                    os.unlink(unfinished)
            else:
                self._files.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    def _make_parent(self, path: str) -> None:
        if isinstance(self._files, LocalFileSystem):  # object stores have no folders
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)

"""Artifacts that machines share, at any URL of fsspec: `MFT_STORE=s3://bucket/folder`, `gs://…`, a path all can see.

    URL/artifacts/<stage>/<key>.json          the manifest and the name of its payload; written last, and only if absent
    URL/artifacts/<stage>/<key>/<attempt>/…   a payload; every attempt has a folder of its own, so two never mix
    URL/locks/<key>                           a lease, into which its holder writes a new beat every few seconds
    URL/locks/<key>.<digest of a holder>      the lease of who took that holder's over; the last of such a chain holds

A machine's `$MFT_HOME/artifacts` is then its copy of what it has used; resumable state stays with the machine. The
lease saves work, the manifest decides: where two machines did compute one key, the first manifest stands and the other
takes its payload. No clocks are compared: a lease is lost when nobody has seen it change for `LOST_SECONDS`; of those
who then take it over one wins, since a holder is unique and so is the name of what comes after him. Used by
`mft_core.store.artifacts` alone.
"""

from __future__ import annotations

import contextlib
import errno
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

from mft_core.cache_key import digest, digest_file
from mft_core.errors import ConfigError, StageError
from mft_core.stage import Progress
from mft_core.store import manifests

BEAT_SECONDS = 10.0
LOST_SECONDS = 60.0
_BEAT = ", beat "

log = logging.getLogger("mft")


class SharedStore:
    """The artifacts and leases under one URL."""

    def __init__(self, url: str) -> None:
        """Open it; nothing is read or written yet.

        Raises:
            ConfigError: the URL is of no file system that is installed here.
        """
        try:
            self._files, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # of whichever library; fsspec says which package it misses
            raise ConfigError(
                f"MFT_STORE = {url}: {error}. Valid is any URL of fsspec, e.g. s3://bucket/folder (package s3fs)."
            ) from error
        # workers have working directories of their own
        self.url = str(self._root) if isinstance(self._files, LocalFileSystem) else url

    def check_writable(self) -> None:
        """Raise a ConfigError where nothing can be written, read back or removed; say what the service cannot do."""
        probe = f"{self._root}/.write-test-{uuid.uuid4().hex}"
        with self._reached("written to"):
            self._create(probe, b"first")
            exclusive = not self._create(probe, b"second")
            self._files.rm_file(probe)
        if not exclusive:
            log.warning(
                "MFT_STORE = %s: this service writes over a file that it was asked only to create (If-None-Match). "
                "Machines may now and then compute one artifact twice; they never mix.",
                self.url,
            )

    @contextlib.contextmanager
    def _reached(self, what: str, kind: type[ConfigError | StageError] = ConfigError) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whichever library speaks to that store
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # perhaps of this machine's disk; says so itself
            raise kind(
                f"MFT_STORE = {self.url}: cannot be {what} ({error or type(error).__name__}); "
                "it must exist, and the usual variables of that service must name somebody who may write there."
                + (" Then the same command goes on." if kind is StageError else "")
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

    def read(self, stage: str, key: str, name: str) -> bytes | None:
        """Return one file of an artifact, to be shown: it is not verified; None where the artifact has no such file."""
        with self._reached("read"):
            entry = self._entry(stage, key)
            listed = entry is not None and name in entry["manifest"]["files"]
            return self._read(f"{self._folder(stage, key)}/{entry['payload']}/{name}") if entry and listed else None

    def push(self, stage: str, key: str, payload: Path, manifest: Mapping[str, Any], replace: bool) -> bool:
        """Upload a payload, then its manifest; returns whether it is this one that stands.

        Args:
            replace: write over a manifest that is there; else the first one stands, unless it is damaged.

        Raises:
            StageError: the store cannot be written to.
        """
        attempt, path = uuid.uuid4().hex, self._folder(stage, key) + ".json"
        with self._reached("written to", StageError):
            for name in manifest["files"]:
                target = f"{self._folder(stage, key)}/{attempt}/{name}"
                self._make_parent(target)
                self._files.put_file(str(payload / name), target)
            text = json.dumps({"payload": attempt, "manifest": manifest}, allow_nan=False).encode()
            before = self._entry(stage, key)
            damaged = before is None and self._files.exists(path) and self._entry(stage, key) is None
            if replace or damaged:  # not to be kept
                self._files.pipe_file(path, text)
                stands = True
            else:
                stands = before is None and self._create(path, text)
        superseded = attempt if not stands else before and before["payload"]
        if superseded:
            try:
                self._files.rm(f"{self._folder(stage, key)}/{superseded}", recursive=True)
            except FileNotFoundError:  # it had no files
                pass
            except Exception as error:  # of the network; the result stands
                log.warning("%s/%s: a payload that no manifest names stays in MFT_STORE: %s", key, superseded, error)
        return stands

    def pull(self, stage: str, key: str, final: Path) -> None:
        """Make this machine's copy of an artifact, verified.

        Raises:
            StageError: the store cannot be read; or the payload is not what its manifest lists: the manifest is
                removed, so that whoever has a whole copy shares it, or it is computed again.
        """
        with self._reached("read", StageError):
            while (entry := self._entry(stage, key)) is not None:
                damaged = self._fetch(stage, key, entry, final)
                if damaged is None:
                    return
                if self._entry(stage, key) == entry:  # nobody has put another into its place meanwhile
                    self._files.rm_file(self._folder(stage, key) + ".json")
                    break
        where = f"{stage} {key[:12]} in MFT_STORE = {self.url}"
        if entry is None:
            raise StageError(f"{where} is no longer there; run the same command again.")
        raise StageError(
            f"{where} is damaged: {damaged} is missing or altered. It has been taken out; run the same command again: "
            "a machine that has a whole copy shares it, else it is computed anew."
        )

    def _fetch(self, stage: str, key: str, entry: Mapping[str, Any], final: Path) -> str | None:
        """Make an entry's payload the artifact of this machine, or return which of its files is not as it should be."""
        temporary = final.parent / f".fetched-{key}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        log.info("fetching %s %s from %s", stage, key, self.url)
        for name, listed in entry["manifest"]["files"].items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._files.get_file(f"{self._folder(stage, key)}/{entry['payload']}/{name}", str(temporary / name))
            if not (temporary / name).is_file() or digest_file(temporary / name) != listed["sha256"]:
                shutil.rmtree(temporary)
                return str(name)
        manifests.commit(temporary, final, entry["manifest"])
        return None

    @contextlib.contextmanager
    def lease(self, key: str, note: Path, report: Callable[[Progress], None]) -> Iterator[None]:
        """Hold the lease of a key, waiting (and saying so) while another machine does; a dead holder loses it.

        Args:
            note: file in which whoever holds this machine's own lock of the key keeps the name of his lease: one that
                is there belongs to a process that was killed, and is not waited for.

        Raises:
            StageError: the store cannot be reached. Once the lease is held, that is no more than a warning.
        """
        mine = f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex}"
        killed = note.read_text() if note.exists() else None
        note.write_text(mine)
        self._wait_for(key, mine, killed, report)
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(key, mine, ended), name="lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            try:
                for lease, _ in self._mine(key, mine):  # the first one first: none in between is there to be taken over
                    self._remove(lease)
                note.unlink(missing_ok=True)
            except Exception as error:  # of the network
                log.warning("the lease of %s could not be given back, and others wait for it: %s", key[:12], error)

    def _wait_for(self, key: str, mine: str, killed: str | None, report: Callable[[Progress], None]) -> None:
        """Take the lease, as soon as nobody has it or who has it is known to be dead."""
        seen: str | None = None
        since = time.monotonic()
        while True:
            with self._reached("written to", StageError):
                held, free = self._leases(key)
                holder = held[-1][1] if held else None
                if holder != seen:
                    seen, since = holder, time.monotonic()
                silent = holder is not None and time.monotonic() - since > LOST_SECONDS
                if (holder is None or silent or _who(holder) == killed) and self._create(free, mine.encode()):
                    if self._leases(key)[0] == [*held, (free, mine)]:
                        if silent:
                            log.warning("%s: %s was silent for %.0f s, and loses it", key[:12], holder, LOST_SECONDS)
                        return
                    self._remove(free)  # what it comes after is not there any more, or beats again
            if holder is not None:
                who = ", ".join(holder.split(", ")[:2])
                report(Progress(0, 0, doing=f"waiting for another machine that computes {key[:12]} ({who})"))
            time.sleep(min(1.0, BEAT_SECONDS / 4))

    def _beat(self, key: str, mine: str, ended: threading.Event) -> None:
        beat = 0
        while not ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                if held := self._mine(key, mine):  # else it was taken over; the manifest decides whose work stands
                    self._files.pipe_file(held[-1][0], f"{mine}{_BEAT}{beat}".encode())
            except Exception as error:  # of the network
                log.warning("the lease of %s could not be renewed: %s", key[:12], error)

    def _mine(self, key: str, mine: str) -> list[tuple[str, str]]:
        """Return the leases of a key if the last one is mine, else none."""
        held, _ = self._leases(key)
        return held if held and _who(held[-1][1]) == mine else []

    def _leases(self, key: str) -> tuple[list[tuple[str, str]], str]:
        """Return path and text of each lease of a key, after the one that it took over, and the path of the next."""
        path, held = f"{self._root}/locks/{key}", list[tuple[str, str]]()
        while (found := self._read(path)) is not None:
            text = found.decode(errors="replace")
            held.append((path, text))
            path = f"{self._root}/locks/{key}.{digest(_who(text))}"
        return held, path

    def _folder(self, stage: str, key: str) -> str:
        return f"{self._root}/artifacts/{stage}/{key}"

    def _entry(self, stage: str, key: str) -> dict[str, Any] | None:
        text = self._read(self._folder(stage, key) + ".json")
        try:
            entry = json.loads(text or b"null")
            manifest = manifests.of_right_shape(entry["manifest"])
            sound = manifest is not None and not manifests.broken_seal(manifest, stage, key)
            return entry if sound and entry["payload"].isalnum() else None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None

    def _read(self, path: str) -> bytes | None:
        try:
            found: bytes = self._files.cat_file(path)
        except FileNotFoundError:
            return None
        return found

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(path)

    def _create(self, path: str, data: bytes) -> bool:
        """Write a file if there is none, in one step on S3, GCS and local disks; returns whether this is there now.

        "There is one already" has many names (s3fs: EINVAL too, and EIO for two at one time), and may be the answer to
        the repetition of a request that was carried out: what is there tells.
        """
        for wait in (0.1, 0.3, None):
            try:
                self._write_new(path, data)
                return True
            except OSError:
                found = self._read(path)
                if found is not None:
                    return found == data
                if wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError

    def _write_new(self, path: str, data: bytes) -> None:
        if not isinstance(self._files, LocalFileSystem):
            self._files.pipe_file(path, data, mode="create")
            return
        unfinished = f"{path}.{uuid.uuid4().hex}"  # fsspec looks first and writes then; a link is one step
        self._make_parent(path)
        self._files.pipe_file(unfinished, data)
        try:
            os.link(unfinished, path)
        finally:
            os.unlink(unfinished)

    def _make_parent(self, path: str) -> None:
        if isinstance(self._files, LocalFileSystem):  # object stores have no folders
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)


def _who(lease: str) -> str:
    """Return the holder whom the text of a lease names."""
    return lease.split(_BEAT)[0]

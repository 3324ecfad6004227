"""Immutable results on disk, addressed by what they are made of; an artifact exists whole or not at all.

    $MFT_HOME/artifacts/<stage>/<key>/manifest.json   sizes and sha256 of the payload, recipe, inputs, provenance
    $MFT_HOME/artifacts/<stage>/<key>/...             the payload
    $MFT_HOME/work/<key>/                             resumable state of unfinished work
    $MFT_HOME/work/<key>/.rerun                       that work began with `force`; a later `force` goes on with it.
                                                      Its lines: the digest of the shared result that it is to replace,
                                                      and its own once it is finished and only could not be shared
    $MFT_HOME/locks/<key>                             held with flock while the key is computed; names who holds it

A stage writes into a temporary directory; payload and manifest are fsynced, then the directory is renamed into place.
flock is released by the kernel when its holder dies, so a killed run never blocks the next. Where `MFT_STORE` names a
store that machines share (`mft_core.store.shared`), what is finished goes there before it gets its name here, and what
is there counts as there; its payload is fetched when somebody reads it. Inputs are checked against
their digests before and after the stage has read them, so that a key never stands for other content. Used by `tasks`
and by anyone who wants a cached stage without Prefect.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import logging
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from pydantic import BaseModel, ConfigDict

from mft_core.cache_key import digest_file, stage_key
from mft_core.errors import ConfigError, StageError
from mft_core.recipes import Recipe, Runtime
from mft_core.stage import Progress, Stage, StageContext
from mft_core.store import manifests, provenance
from mft_core.store.manifests import MANIFEST
from mft_core.store.outdated import outdated
from mft_core.store.shared import SharedStore
from mft_core.store.sources import Source
from mft_core.store.usage import Meter, compare

_RERUN = ".rerun"
_SECONDS_TO_LOOK = 1.0
"""while waiting for a lock: who holds it, and whether to go on waiting"""
_FOLDERS = ("artifacts", "work", "locks", "logs", "prefect", "reports")


class Input(Protocol):
    """Anything a stage can take in: an artifact or a source, known by its digest."""

    @property
    def digest(self) -> str: ...

    def local_path(self, store: ArtifactStore) -> Path: ...

    def problem(self, store: ArtifactStore) -> str | None: ...


class ArtifactRef(BaseModel):
    """A small, serialisable reference to a finished artifact; what Prefect caches instead of the payload."""

    model_config = ConfigDict(frozen=True)

    stage: str
    key: str
    digest: str
    part: str = ""
    """path inside the payload that a consumer is given, e.g. 'model'"""

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> ArtifactRef:
        """Return the reference to the artifact that a manifest describes."""
        return cls(stage=manifest["stage"], key=manifest["key"], digest=manifest["digest"])

    def at(self, part: str) -> ArtifactRef:
        """Return the same artifact, pointing at one part of its payload."""
        return self.model_copy(update={"part": part})

    def local_path(self, store: ArtifactStore) -> Path:
        """Return where the payload (or its part) lies, fetched if only the shared store has it."""
        return store.fetched(self.stage, self.key, self.digest) / self.part

    def problem(self, store: ArtifactStore) -> str | None:
        """Say why the artifact is no longer what the digest names, or None if it is."""
        damage, manifest = store.look(self.stage, self.key)
        if manifest is not None and manifest["digest"] != self.digest:  # it was computed again elsewhere, perhaps
            self.local_path(store)
            damage, manifest = store.look(self.stage, self.key)
        changed = manifest is not None and manifest["digest"] != self.digest
        return damage or ("another result has taken its place" if changed else None)


@dataclass(frozen=True)
class Built:
    """The outcome of `ArtifactStore.build`: the reference, and whether anything was computed."""

    ref: ArtifactRef
    computed: bool
    manifest: dict[str, Any]


class ArtifactStore:
    """The artifacts under one `MFT_HOME`, and those of the store that it shares with other machines, if any."""

    def __init__(self, home: Path, shared: str | None = None, holder: str | None = None) -> None:
        """Open the store; nothing is read or written yet.

        Args:
            home: where this machine's artifacts and resumable state lie.
            shared: a URL of fsspec.
            holder: PID and machine of the run that locks are held for; by default this process.

        Raises:
            ConfigError: the URL cannot be understood here.
        """
        self.home = home.absolute()
        self.shared = SharedStore(shared) if shared else None
        self.holder = holder or f"{os.getpid()} {platform.node()}"
        self._verified: dict[Path, tuple[int, int, int]] = {}

    @classmethod
    def from_environment(cls) -> ArtifactStore:
        """Open the store at `$MFT_HOME`, by default `.mft` in the working directory, and at `$MFT_STORE` if set."""
        return cls(Path(os.environ.get("MFT_HOME") or ".mft"), os.environ.get("MFT_STORE"))

    def check_writable(self) -> None:
        """Raise a ConfigError when nothing can be written under the home, or in a folder of it that is there.

        What is made from here on is its user's own: the mask of file modes is the process's and its children's, so
        that it holds for the databases of libraries too.
        """
        os.umask(0o077)
        for folder in (self.home, *(self.home / name for name in _FOLDERS if (self.home / name).exists())):
            probe = folder / f".write-test-{os.getpid()}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe.write_text("x")
                probe.unlink()
            except OSError as error:
                if probe.is_file():  # on a full disk
                    probe.unlink()
                which = "" if folder == self.home else f"{folder.name}: "
                raise ConfigError(
                    f"MFT_HOME = {self.home}: not writable ({which}{error.strerror}); "
                    "set MFT_HOME to a directory that you can write to."
                ) from error
        if self.shared:
            self.shared.check_writable()

    @property
    def models(self) -> Path:
        """Where models lie that were fetched for a profile."""
        return self.home / "models"

    def directory(self, stage: str, key: str) -> Path:
        """Return where the artifact lies or would lie on this machine."""
        return self.home / "artifacts" / stage / key

    def fetched(self, stage: str, key: str, digest: str | None = None) -> Path:
        """Return where the artifact lies on this machine, fetched from the shared store if it did not.

        Args:
            digest: of the result that is meant: another one here gives way to it, if the shared store has it.

        Raises:
            StageError: what the shared store holds is damaged, or gone.
        """
        final = self.directory(stage, key)

        def lacks(shared: SharedStore) -> bool:
            if self._own_damage(stage, key):
                return True
            own = manifests.read(final)
            if digest is None or own is None or own["digest"] == digest:
                return False
            there = shared.manifest(stage, key)
            return there is not None and there["digest"] == digest

        if self.shared and lacks(self.shared):
            with self.lock(key):
                if lacks(self.shared):  # no other process has done it meanwhile
                    self.shared.pull(stage, key, final)
        return final

    def read(self, stage: str, key: str, name: str) -> bytes | None:
        """Return one file of an artifact, to be shown, without fetching the others; None: it has no such file."""
        own = self.directory(stage, key) / name
        if self.shared and not own.parent.exists():
            return self.shared.read(stage, key, name)
        return own.read_bytes() if own.is_file() else None

    def work(self, key: str) -> Path:
        """Return the directory of the key's resumable state."""
        return self.home / "work" / key

    def key(self, stage: Stage, recipe: Recipe, inputs: Mapping[str, Input]) -> str:
        """Return the key of the artifact that the stage makes of recipe and inputs."""
        return stage_key(stage.name, stage.version, recipe, {name: ref.digest for name, ref in inputs.items()})

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return the manifest without looking at the payload, or None when there is no readable one."""
        own = manifests.read(self.directory(stage, key))
        return own or (self.shared.manifest(stage, key) if self.shared else None)

    def manifests(self, stage: str) -> list[dict[str, Any]]:
        """Return the manifests of all artifacts of a stage, by key, whether they lie here or in the shared store."""
        keys = {path.name for path in (self.home / "artifacts" / stage).glob("[!.]*")}
        keys |= self.shared.keys(stage) if self.shared else set()
        return [found for key in sorted(keys) if (found := self.manifest(stage, key))]

    def find(self, stage: str, key: str, inputs: Mapping[str, Input] = {}) -> ArtifactRef | None:
        """Return the artifact if it is there, whole and not outdated (see `look`), else None."""
        manifest = self.whole(stage, key, inputs)
        return ArtifactRef.of(manifest) if manifest else None

    def whole(self, stage: str, key: str, inputs: Mapping[str, Input] = {}) -> dict[str, Any] | None:
        """Return the manifest of an artifact that is there, whole and not outdated, else None.

        It is touched: `mft gc` goes by when somebody last asked for it.
        """
        damage, manifest = self.look(stage, key, inputs)
        if damage:
            return None
        with contextlib.suppress(OSError):  # it lies in the shared store alone, or may only be read
            os.utime(self.directory(stage, key) / MANIFEST)
        return manifest

    def share(self, stage: str, key: str, inputs: Mapping[str, Input] = {}) -> ArtifactRef | None:
        """Return as `find` does, for a run: what is whole here is also in the shared store then.

        Where that has another result under the key, it is what all machines take.

        Raises:
            StageError: the shared store cannot be written to.
        """
        found = self.find(stage, key, inputs)
        if found is None or self.shared is None or not self.directory(stage, key).exists():
            return found
        there = self.shared.manifest(stage, key)
        if there is not None and there["digest"] == found.digest and len(self._rerun(key)) < 2:
            return found
        with self.lock(key):
            damage, manifest = self.look(stage, key, inputs, held=True)
            return None if damage or manifest is None else ArtifactRef.of(self._shared(manifest, inputs))

    def _shared(self, manifest: dict[str, Any], inputs: Mapping[str, Input]) -> dict[str, Any]:
        """Return the manifest that stands on all machines in place of a whole artifact's, whose lock is held."""
        stage, key = manifest["stage"], manifest["key"]
        own = self.directory(stage, key)
        if self.shared is None or not own.exists():
            return manifest
        there = self.shared.manifest(stage, key)
        mark = self._rerun(key)
        # what took the place of the one that was to be replaced is newer than the one here
        rerun = there is not None and mark == [there["digest"], manifest["digest"]]
        differs = there is not None and there["digest"] != manifest["digest"]
        if there is None or (differs and (rerun or self._outdated(there, inputs, self.shared))):
            pushed = self.shared.push(stage, key, own, manifest, replace=there is not None)
            there = manifest if pushed else self.shared.manifest(stage, key)
        if there is not None and there["digest"] != manifest["digest"]:
            logging.getLogger("mft").warning(
                "%s %s: the shared store has another result, which is taken in place of the one here", stage, key[:12]
            )
            self.shared.pull(stage, key, own)  # verified before it takes the place of a whole copy
            manifest = there
        if len(mark) == 2:  # it waits no more; the state of a rerun that was killed stays
            shutil.rmtree(self.work(key), ignore_errors=True)
        return manifest

    def damage(self, stage: str, key: str, inputs: Mapping[str, Input] = {}) -> str | None:
        """Say what is wrong with the artifact ("missing", "model/config.json: 3 bytes, not 7"), or None if whole."""
        return self.look(stage, key, inputs)[0]

    def look(
        self, stage: str, key: str, inputs: Mapping[str, Input] = {}, held: bool = False
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Return what is wrong with the artifact (None if it is whole), and its manifest if there is a sound one.

        Whole is what has every file of the manifest, and no other. What the shared store has is whole unless its
        manifest is not: files are verified when they are fetched. Of a whole one, what a mended fault left in it.

        Args:
            inputs: what the key was made of; without them, some faults cannot be told.
            held: the caller holds the key's lock, which is not to be waited for.
        """
        problem = self._own_damage(stage, key)
        own = manifests.read(self.directory(stage, key))
        problem = problem or ("missing" if own is None else self._outdated(own, inputs))
        shared = self.shared.manifest(stage, key) if problem and self.shared else None
        if shared is None:
            return problem, None if problem else own
        if wrong := self._outdated(shared, inputs, self.shared):
            return wrong, shared
        if problem != "missing":
            with contextlib.nullcontext() if held else self.lock(key):
                own = manifests.read(self.directory(stage, key))
                if self._own_damage(stage, key) or self._outdated(own, inputs):  # nobody has fetched it again meanwhile
                    manifests.discard(self.directory(stage, key))
        return None, shared

    def _outdated(
        self, manifest: dict[str, Any] | None, inputs: Mapping[str, Input], shared: SharedStore | None = None
    ) -> str | None:
        """Say what a mended fault left in this machine's artifact, or in that of the shared store if it is given."""
        if manifest is None:
            return None

        def given(name: str) -> Path | None:
            ref = inputs.get(name)
            if isinstance(ref, Source) and ref.kind == "model":  # of which no more than the tokenizer is looked at
                ref = ref.model_copy(update={"kind": "tokenizer"})
            return ref.local_path(self) if ref else None

        return outdated(manifest, partial((shared or self).read, manifest["stage"], manifest["key"]), given)

    def _own_damage(self, stage: str, key: str) -> str | None:
        directory = self.directory(stage, key)
        if not directory.exists():
            return "missing"
        manifest = manifests.read(directory)
        if manifest is None:
            return f"{MANIFEST}: missing or unreadable"
        if manifests.broken_seal(manifest, stage, key):
            return f"{MANIFEST}: does not match its own digest or key"
        for name, entry in manifest["files"].items():
            problem = self._file_damage(directory / name, entry)
            if problem:
                return f"{name}: {problem}"
        added = manifests.unlisted(directory, manifest)
        return added and f"{added}: not in the manifest, added since"

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
            StageError: an input is not, or no longer, what its digest names; nothing is committed.
        """
        log = log or logging.getLogger("mft")
        key = self.key(stage, recipe, inputs)
        note = self.home / "locks" / f"{key}.lease"
        held = self.shared.lease(key, note, report) if self.shared else contextlib.nullcontext()
        with self.lock(key, report), held:
            problem, manifest = ("rerun asked for", None) if force else self.look(stage.name, key, inputs, held=True)
            if problem is None:
                assert manifest is not None
                manifest = self._shared(manifest, inputs)
                return Built(ArtifactRef.of(manifest), False, manifest)
            if problem != "missing":
                log.warning("%s %s is computed again: %s", stage.name, key[:12], problem)
            if force:
                self._begin_rerun(stage.name, key)
            replace = force or manifest is not None  # that of the shared store, which is outdated
            context = StageContext(runtime, self.work(key), report, log)
            return self._compute(stage, key, recipe, inputs, context, notes or {}, replace)

    def _compute(
        self,
        stage: Stage,
        key: str,
        recipe: Recipe,
        inputs: Mapping[str, Input],
        context: StageContext,
        notes: Mapping[str, Any],
        replace: bool,
    ) -> Built:
        context.report(Progress(0, 0))
        work, log = context.work, context.log
        final = self.directory(stage.name, key)
        temporary = final.parent / f".incomplete-{key}"
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed run: the lock is ours
        temporary.mkdir(parents=True)
        work.mkdir(parents=True, exist_ok=True)
        os.utime(work)  # `mft gc` takes what nobody has used for long
        log.info("computing %s %s", stage.name, key)
        try:
            with Meter(work) as meter:
                summary = self._run(stage, recipe, inputs, temporary, context)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        content = {
            "stage": stage.name,
            "version": stage.version,
            "key": key,
            "files": manifests.list_files(temporary),
            "recipe": recipe.model_dump(mode="json"),
            "inputs": {name: ref.digest for name, ref in inputs.items()},
            "summary": summary,
            "provenance": {
                **provenance.describe(),
                **notes,
                "runtime": context.runtime.model_dump(mode="json"),
                **meter.used,
            },
        }
        compare(notes.get("promised"), meter.used, f"{stage.name} {key[:12]}", log)
        manifest = manifests.seal(content)
        try:
            stands = self.shared is None or self.shared.push(stage.name, key, temporary, manifest, replace)
            if self.shared and not stands:
                log.info("another machine has finished %s %s meanwhile: its artifact is taken", stage.name, key)
                self.shared.pull(stage.name, key, final)
                shutil.rmtree(temporary)
                manifest = manifests.read(final) or manifest
        except Exception:  # of the shared store: what was computed is kept here, and the next run shares it
            manifests.commit(temporary, final, manifest)
            begun = self._rerun(key)
            shutil.rmtree(work, ignore_errors=True)
            if begun:
                work.mkdir(exist_ok=True)  # for the mark alone, without a state that a later rerun would go on from
                (work / _RERUN).write_text(f"{begun[0]}\n{manifest['digest']}")
            raise
        if stands:
            manifests.commit(temporary, final, manifest)
        log.info("finished %s %s", stage.name, key)
        shutil.rmtree(work, ignore_errors=True)
        return Built(ArtifactRef.of(manifest), True, manifest)

    def _begin_rerun(self, stage: str, key: str) -> None:
        """Drop the state of earlier work, unless that work is a rerun which was cut short: then it goes on."""
        there = self.shared.manifest(stage, key) if self.shared else None
        if len(self._rerun(key)) != 1:
            shutil.rmtree(self.work(key), ignore_errors=True)
            self.work(key).mkdir(parents=True)
        (self.work(key) / _RERUN).write_text(there["digest"] if there else "")

    def _rerun(self, key: str) -> list[str]:
        """Return the lines of the mark of a rerun: none, one while it is unfinished, two until it is shared."""
        try:
            return (self.work(key) / _RERUN).read_text().split("\n")
        except FileNotFoundError:
            return []

    def _run(
        self, stage: Stage, recipe: Recipe, inputs: Mapping[str, Input], out: Path, context: StageContext
    ) -> dict[str, Any]:
        """Run the stage on inputs that are what their digests say, when it begins and still when it ends."""
        self._check(stage, inputs)
        paths = {name: ref.local_path(self) for name, ref in inputs.items()}
        failure: Exception | None = None
        summary: dict[str, Any] = {}
        try:
            summary = stage.run(recipe, paths, out, context)
        except Exception as error:  # of a broken input, perhaps; then that is what has to be told
            failure = error
        here = copy.copy(self)
        here.shared = None  # it would answer for a copy that was altered while the stage read it
        try:
            here._check(stage, inputs)
        except StageError as changed:
            shutil.rmtree(context.work, ignore_errors=True)  # state made of other content must not be resumed
            raise changed from failure
        if failure is not None:
            raise failure
        return summary

    def _check(self, stage: Stage, inputs: Mapping[str, Input]) -> None:
        for name, ref in inputs.items():
            problem = ref.problem(self)
            if problem:
                where = ref.local_path(self)
                raise StageError(
                    f"{stage.name}: its input '{name}' ({where}) is not what the plan says: {problem}. "
                    "Nothing of this stage was kept; run the same command again."
                )

    @contextlib.contextmanager
    def lock(self, name: str, report: Callable[[Progress], None] | None = None) -> Iterator[None]:
        """Hold the lock of that name, waiting while another process or thread holds it.

        Args:
            report: told again and again whom it waits for, and ends the waiting by raising; None: it is logged once.
        """
        path = self.home / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._wait(handle, report)
            with contextlib.suppress(OSError):  # the name is for people: a full disk must not stop the work
                handle.truncate(0)
                handle.write(self.holder)
                handle.flush()
            yield

    def holder_of(self, name: str) -> str:
        """Return the `holder` who has the lock of that name, or had it last."""
        return (self.home / "locks" / name).read_text()

    def _wait(self, handle: IO[str], report: Callable[[Progress], None] | None) -> None:
        """Take one's turn among those who wait; in a thread, since nothing ends a call of flock but the lock."""
        taken, told = threading.Event(), False

        def take() -> None:
            fcntl.flock(handle, fcntl.LOCK_EX)  # where nobody waits any more, it ends with the closed file
            taken.set()

        threading.Thread(target=take, daemon=True).start()
        while not taken.wait(_SECONDS_TO_LOOK if told else 0.05):
            pid, _, machine = self.holder_of(Path(handle.name).name).partition(" ")
            where = "" if machine in ("", platform.node()) else f" on {machine}"
            text = f"waiting for the lock of PID {pid or '(not known yet)'}{where}"
            if report:
                report(Progress(0, 0, doing=text))
            elif not told:
                logging.getLogger("mft").warning("%s: %s", text, Path(handle.name).name)
            told = True

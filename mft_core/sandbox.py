"""Templates and code from outside, a model's or a benchmark's: they neither act nor hang, and say the same tomorrow.

Benchmarks' templates and chat templates (transformers is given it) are rendered in one immutable sandbox; what differs
from day to day or from draw to draw is refused. `Apart` and `limited` render in a process of its own, which the system
ends when it takes too long or too much memory, whatever it is at. All rows are rendered so; of an evaluation the
rehearsal is, and what it has rendered the evaluation renders again without a limit.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import re
import resource
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from io import BufferedRWPair
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jinja2
import psutil
from jinja2 import Environment, TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mft_core.errors import ConfigError

SECONDS = 10.0
"""of one rendering, which takes milliseconds"""
MEMORY = 4_000_000_000
"""bytes by which a rendering may make its process grow"""
FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""what rendering a template of somebody else's raises"""
_IDLE = 2
"""seconds after which a process that is asked nothing ends"""
_PATIENCE = 20
"""milliseconds that one is given to end by itself when it is asked no more"""
_apart = False
"""whether this process is one that renders for another"""
T = TypeVar("T")


class Apart:
    """A function that renders templates, called in a forked process, with `SECONDS` for each rendering.

    The process is forked at a call and stays for the next ones, since a fork takes as long as hundreds of renderings.
    It ends by itself when nothing is asked for a moment, as it keeps the memory that this one had, and with this one.
    """

    def __init__(self, what: str, function: Callable[[Any], Any]) -> None:
        """Take a function.

        Args:
            what: names the templates in errors.
            function: takes and returns what JSON can hold; nothing else that it does is seen here.
        """
        self._what, self._function = what, function
        self._lock = threading.Lock()
        self._end: weakref.finalize[Any, Any] | None = None
        self._owner = 0

    def __call__(self, question: Any) -> Any:
        """Return what the function returns; a process that is lost (idle, or killed) is replaced once.

        Raises:
            ConfigError: raised by the function, or it took too long, too much memory, or failed otherwise.
        """
        if _apart:
            return self._function(question)
        with self._lock:
            asked = json.dumps(question).encode() + b"\n"
            for _ in range(2):
                said, status = self._ask(asked)
                if said or status not in (0, -signal.SIGKILL):
                    break
        if status == -signal.SIGALRM:
            raise ConfigError(
                f"{self._what}: not done after {SECONDS:g} s; it loops on and on. Mend it, or take it from elsewhere."
            )
        if status == -signal.SIGKILL:
            raise ConfigError(
                f"{self._what}: the system ended its process twice, most likely for want of memory; free some, or take "
                "another."
            )
        if not said:
            raise ConfigError(f"{self._what}: it ended its process (status {status}); take another.")
        found = json.loads(said)
        if "fault" in found:
            raise ConfigError(found["fault"])
        return found["value"]

    def close(self) -> int:
        """End the process, if there is one; returns its status."""
        end, self._end = self._end, None
        status: int | None = end() if end else 0
        return status or 0

    def _ask(self, asked: bytes) -> tuple[bytes, int]:
        """Return the answer; or nothing, and how the process has ended."""
        if self._end is None or self._owner != os.getpid():
            self._fork()
        try:
            with contextlib.suppress(ConnectionError):
                self._channel.write(asked)
                self._channel.flush()
                if (said := self._channel.readline()).endswith(b"\n"):
                    return said, 0
        except BaseException:
            self.close()
            raise
        return b"", self.close()

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        child = os.fork()
        if not child:
            _answer(theirs.detach(), self._what, self._function)
        theirs.close()
        self._owner, self._channel = os.getpid(), ours.makefile("rwb")
        ours.close()
        self._end = weakref.finalize(self, _ended, child, self._owner, self._channel)


def _ended(child: int, owner: int, channel: BufferedRWPair) -> int:
    """End a process that was forked by this one; returns its status."""
    if owner != os.getpid():
        return 0
    with contextlib.suppress(OSError):  # what it was not told any more
        channel.close()
    with contextlib.suppress(ChildProcessError):  # somebody has had it waited for
        for _ in range(_PATIENCE):
            waited, status = os.waitpid(child, os.WNOHANG)
            if waited:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 0


def limited(what: str, function: Callable[[], T]) -> T:
    """Return what a function returns that is called once in a process apart; see `Apart`."""
    apart = Apart(what, lambda _: function())
    try:
        value: T = apart(None)
        return value
    finally:
        apart.close()


def next_rendering() -> None:
    """Begin to count the seconds of one more rendering."""
    if _apart:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # what was rendered may have set another
        signal.setitimer(signal.ITIMER_REAL, SECONDS)


def rendered_all() -> None:
    """Count no more: what follows is ours, and takes as long as it takes."""
    if _apart:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(end: int, what: str, function: Callable[[Any], Any]) -> NoReturn:
    """Write what the function returns or raises for each question, in the forked process, and end it.

    It keeps no file of the other's open, so no lock and no connection; and collects no garbage of the other's.
    """
    global _apart
    status = 1
    try:
        _apart = True
        gc.freeze()
        gc.enable()
        os.closerange(3, end)
        os.closerange(end + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        for stream in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other ends it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        most, hard = psutil.Process().memory_info().vms + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]
        with contextlib.suppress(ValueError, OSError):  # a lower limit is there already, or the system has none
            resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
        asked = select.poll()
        asked.register(end, select.POLLIN)
        with open(end, "rb") as questions, open(os.dup(end), "wb") as answers:
            while asked.poll(1_000 * _IDLE) and (line := questions.readline()):
                answers.write(_said(what, function, json.loads(line)).encode() + b"\n")
                answers.flush()
        status = 0
    finally:
        os._exit(status)


def _said(what: str, function: Callable[[Any], Any], question: Any) -> str:
    next_rendering()
    try:
        return json.dumps({"value": function(question)})
    except ConfigError as error:
        return json.dumps({"fault": str(error)})
    except MemoryError:
        return json.dumps({"fault": f"{what}: it takes more than {MEMORY / 1e9:g} GB of memory; mend it."})
    except Exception as error:
        return json.dumps({"fault": f"{what}: {type(error).__name__}: {str(error)[:200]}"})
    finally:
        rendered_all()


@jinja2.pass_context
def _as_it_is(_: Context, value: Any) -> Any:
    return value


_sandboxed = functools.partial(ImmutableSandboxedEnvironment, optimized=False, finalize=_as_it_is)
"""Jinja's own, but that reading a template reckons nothing yet, however constant: rendering does, within limits"""


def environment(like: Environment | None = None) -> Environment:
    """Return a sandbox for benchmarks' templates, which has lm-eval's rules.

    Args:
        like: lm-eval's own environment, whose filters it takes over; None: those are the ones of lm-eval 0.4.
    """
    sandbox = _sandboxed(loader=jinja2.BaseLoader(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= like.filters if like else {"regex_replace": _regex_replace}
    del sandbox.filters["random"], sandbox.globals["lipsum"]
    sandbox.from_string = functools.lru_cache(maxsize=512)(sandbox.from_string)  # type: ignore[method-assign, assignment]
    return sandbox


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    return re.sub(pattern, repl, string, count=count)


def render(sandbox: Environment, template: str, variables: Mapping[str, Any]) -> str:
    """Render a benchmark's template; whoever cannot trust it yet does so within `limited`."""
    next_rendering()
    return sandbox.from_string(template).render(**variables)


def check_chat_template(template: str) -> None:
    """Make a chat template that shows the date or something drawn raise a ConfigError when it does.

    Raises:
        ConfigError: it cannot be read.
    """
    _give_to_transformers()
    from transformers.utils.chat_template_utils import _compile_jinja_template  # cached; what is rendered later

    try:
        compiled = _compile_jinja_template(template)
    except (*FAULTS, SyntaxError) as error:
        raise ConfigError(f"chat template: it cannot be read ({error}); mend it, or give another.") from error
    compiled.environment.globals.update(strftime_now=_today, lipsum=_drawn)
    compiled.environment.filters["random"] = _drawn


@functools.cache
def _give_to_transformers() -> None:
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = _sandboxed  # type: ignore[misc, assignment]
    chat_template_utils._compile_jinja_template.cache_clear()


def _today(form: str = "") -> str:
    raise ConfigError(
        "chat template: it writes today's date (strftime_now), so that the same study would be another one tomorrow; "
        "set model.chat_template to a copy with a fixed date in its place."
    )


def _drawn(*_: Any, **__: Any) -> str:
    raise ConfigError("chat template: it shows something drawn at random, which is not the same the next time.")


def asks_for_code(directory: Path, name: str) -> ConfigError | None:
    """Return the error for a checkpoint that transformers itself cannot read and whose file asks for code of its own.

    (A family that transformers has may carry such code besides: it is not run, and not needed.)
    """
    try:
        asked = json.loads((directory / name).read_text(encoding="utf-8")).get("auto_map")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if not asked:
        return None
    return ConfigError(
        f"model = {directory}: its {name} asks for code of its own (auto_map: {json.dumps(asked):.120}). Code of "
        "a checkpoint's own is never run here; give a model and a tokenizer of a family that transformers has itself."
    )

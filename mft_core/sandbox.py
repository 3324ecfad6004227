"""Templates and code from outside, a model's or a benchmark's: they neither act nor hang, and say the same tomorrow.

Benchmarks' templates are rendered in an immutable sandbox made here, chat templates in transformers' own, which is one
too. What differs from day to day or from draw to draw is refused. `TimeLimit` ends a rendering that loops on and on, in
any thread; it waits for a single operation in C (`10 ** 10 ** 8`), which no thread can interrupt.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateError, TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mft_core.errors import ConfigError

SECONDS = 10.0
"""of one rendering, which takes milliseconds"""
_EVERY = 0.05
"""seconds from one look at the clock to the next"""
FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""what rendering a template of somebody else's raises"""


class UnstableTemplateError(TemplateRuntimeError):
    """The template shows what is not the same tomorrow."""


class _Overdue(BaseException):
    """Raised in the thread whose time is up; no handler of errors takes it for one."""


class TimeLimit:
    """A context whose thread is stopped with a ConfigError when it takes longer than allowed."""

    def __init__(self, what: str, seconds: float = SECONDS) -> None:
        self._what, self._seconds = what, seconds
        self._deadline, self._fired = math.inf, False
        self._lock = threading.Lock()

    def renew(self) -> None:
        """Begin to count anew, for the next one of many."""
        self._deadline = time.monotonic() + self._seconds

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        _WATCH.add(self)
        self.renew()  # last: nothing above is the template's time, or can be stopped half done
        return self

    def stop_if_overdue(self) -> None:
        """Raise in the context's thread, if its time is up and it is still within."""
        with self._lock:
            if self._deadline <= time.monotonic():
                self._fired, self._deadline = True, math.inf
                raised = ctypes.py_object(_Overdue)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), raised)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._lock:
                self._deadline = math.inf
            while self._fired and kind is not _Overdue:  # it is on its way
                time.sleep(0.001)
        except _Overdue:
            pass
        _WATCH.discard(self)
        if self._fired:
            raise ConfigError(
                f"{self._what}: not done after {self._seconds:g} s; it loops on and on. Mend the template, or take it "
                "from somewhere else."
            ) from None


class _Watch:
    """One thread that looks after all contexts of this process; one for each would take longer than its rendering."""

    def __init__(self) -> None:
        self._within: dict[TimeLimit, None] = {}
        self._thread: threading.Thread | None = None
        self._starting, self._some = threading.Lock(), threading.Event()

    def add(self, limit: TimeLimit) -> None:
        self._within[limit] = None
        self._some.set()
        if self._thread is None or not self._thread.is_alive():  # none is in a process that was forked
            with self._starting:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._look, daemon=True, name="template-time-limit")
                    self._thread.start()

    def discard(self, limit: TimeLimit) -> None:
        self._within.pop(limit, None)

    def _look(self) -> None:
        while self._some.wait():
            self._some.clear()
            while within := list(self._within):
                for limit in within:
                    limit.stop_if_overdue()
                time.sleep(_EVERY)


_WATCH = _Watch()


def environment(like: Environment | None = None) -> Environment:
    """Return a sandbox for benchmarks' templates, which has lm-eval's rules.

    Args:
        like: lm-eval's own environment, whose filters it takes over; None: those are the ones of lm-eval 0.4.
    """
    sandbox = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= like.filters if like else {"regex_replace": _regex_replace}
    del sandbox.filters["random"], sandbox.globals["lipsum"]
    sandbox.from_string = functools.lru_cache(maxsize=512)(sandbox.from_string)  # type: ignore[method-assign, assignment]
    return sandbox


def _regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)


def render(sandbox: Environment, template: str, variables: Mapping[str, Any]) -> str:
    """Render a benchmark's template within the time limit."""
    with TimeLimit(f"benchmark template {template!r:.80}"):
        return sandbox.from_string(template).render(**variables)


def steady_chat_template(template: str) -> None:
    """Make a chat template that shows the date or something drawn raise an `UnstableTemplateError` when it does.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template  # cached; what is rendered later

    try:
        compiled = _compile_jinja_template(template)
    except FAULTS as error:
        raise ConfigError(f"chat template: it cannot be read ({error}); mend it, or give another.") from error
    compiled.environment.globals.update(strftime_now=_today, lipsum=_drawn)
    compiled.environment.filters["random"] = _drawn


def _today(form: str = "") -> str:
    raise UnstableTemplateError(
        "it writes today's date (strftime_now), so that the same study would be another one tomorrow; set "
        "model.chat_template to a copy with a fixed date in its place"
    )


def _drawn(*_: Any, **__: Any) -> str:
    raise UnstableTemplateError("it shows something drawn at random, which is not the same the next time")


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

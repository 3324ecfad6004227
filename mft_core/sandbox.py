"""Templates and code from outside, a model's or a benchmark's: they neither act nor hang, and say the same tomorrow.

Benchmarks' templates are rendered in an immutable sandbox made here, chat templates in transformers' own, which is one
too. What differs from day to day or from draw to draw is refused. `TimeLimit` ends a rendering that loops on and on, in
any thread; it waits for a single operation in C (`10 ** 10 ** 8`), which no thread can interrupt.
"""

from __future__ import annotations

import ctypes
import functools
import json
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


class UnstableTemplateError(TemplateRuntimeError):
    """The template shows what is not the same tomorrow."""


class _Overdue(BaseException):
    """Raised in the thread whose time is up; no handler of errors takes it for one."""


class TimeLimit:
    """A context whose thread is stopped with a ConfigError when it takes longer than allowed."""

    def __init__(self, what: str, seconds: float = SECONDS) -> None:
        self._what, self._seconds = what, seconds
        self._deadline = time.monotonic() + seconds
        self._over, self._fired = threading.Event(), False
        self._lock = threading.Lock()

    def renew(self) -> None:
        """Begin to count anew, for the next one of many."""
        self._deadline = time.monotonic() + self._seconds

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        with self._lock:  # a busy machine may take long to start a thread, which is none of the template's time
            threading.Thread(target=self._watch, daemon=True, name="template-time-limit").start()
            self.renew()
        return self

    def _watch(self) -> None:
        while not self._over.wait(max(0.0, self._deadline - time.monotonic())):
            with self._lock:
                if self._deadline <= time.monotonic() and not self._over.is_set():
                    self._fired = True
                    raised = ctypes.py_object(_Overdue)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), raised)
                    return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._lock:
                self._over.set()
            while self._fired and kind is not _Overdue:  # it is on its way
                time.sleep(0.001)
        except _Overdue:
            pass
        if self._fired:
            raise ConfigError(
                f"{self._what}: not done after {self._seconds:g} s; it loops on and on. Mend the template, or take it "
                "from somewhere else."
            ) from None


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
    except TemplateError as error:
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
    except (OSError, ValueError, AttributeError):
        return None
    if not asked:
        return None
    return ConfigError(
        f"model = {directory}: its {name} asks for code of its own (auto_map: {json.dumps(asked):.120}). Code of "
        "a checkpoint's own is never run here; give a model and a tokenizer of a family that transformers has itself."
    )

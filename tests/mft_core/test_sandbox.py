"""Templates from outside can neither act nor hang, and say the same tomorrow."""

import threading
import time
from pathlib import Path

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from mft_core.data.assistant_tokens import encode
from mft_core.data.chat_template import chat_prompt
from mft_core.data.rows import Message
from mft_core.errors import ConfigError
from mft_core.sandbox import TimeLimit, environment, render
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


def test_a_loop_is_ended_in_any_thread_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []

    def loop() -> None:
        try:
            with TimeLimit("a template", 0.2):
                environment().from_string(LOOPS).render()
        except ConfigError as error:
            said.append(str(error))

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    loop()
    for thread in threads:
        thread.join()
    assert [text.split(":")[0] for text in said] == ["a template"] * 3
    with TimeLimit("another", 0.5) as limit:
        for _ in range(4):
            limit.renew()
            time.sleep(0.2)  # each in time, all together not
    time.sleep(0.6)


def test_a_machine_that_is_slow_to_start_the_clock_takes_no_time_from_the_template(monkeypatch: pytest.MonkeyPatch):
    started = threading.Thread.start

    def slowly(thread: threading.Thread) -> None:
        started(thread)
        for _ in range(40):
            time.sleep(0.01)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    with TimeLimit("a template", 0.2):
        pass


def test_a_chat_template_that_loops_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TimeLimit.__init__, "__defaults__", (0.3,))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LOOPS + tokenizer.chat_template
    with pytest.raises(ConfigError, match="chat template: not done after"):
        encode([(Message("user", "a"), Message("assistant", "b"))], tokenizer, 100)
    with pytest.raises(ConfigError, match="chat template: not done after"):
        chat_prompt(tokenizer, [{"role": "user", "content": "a"}])


def test_a_long_conversation_has_the_time_of_each_of_its_renderings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TimeLimit.__init__, "__defaults__", (0.5,))
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

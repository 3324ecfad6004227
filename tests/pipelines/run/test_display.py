"""What a run says where there is no terminal, and in its log: stages that run, wait and go on."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from mft_core.stage import Progress
from pipelines.run import display
from pipelines.run.display import Display
from pipelines.run.logs import log_to


def soon(condition: Callable[[], bool]) -> bool:
    """Wait until the condition holds; False if it does not in time."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("terminal", [False, True])
def test_every_running_stage_says_again_and_again_what_it_is_at(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.05)
    printed = io.StringIO()
    wanted = (
        r"learn-mask: step 41 of 900, loss 1.250, 1,234 tokens/s, \d+:\d\d:\d\d left",
        r"evaluate: begun, running for \d:\d\d:\d\d",
        r"merge: waiting for the lock of PID 12, running for",
        r"prepare-data: reading rows.jsonl, row 20,000, running for",
    )
    with (
        log_to(tmp_path, "mini") as path,
        Display(3, Console(file=printed, force_terminal=terminal, width=300)) as shown,
    ):
        shown.update("learn-mask", Progress(0, 0))
        shown.update("learn-mask", Progress(40, 900, doing="resuming after step 40 of 900"))
        shown.update("learn-mask", Progress(41, 900, metrics={"loss": 1.25, "tokens_per_second": 1234.4}))
        shown.update("evaluate", Progress(0, 0))
        shown.update("prepare-data", Progress(20_000, 0, "row", doing="reading rows.jsonl"))
        for _ in range(5):
            shown.update("merge", Progress(0, 0, doing="waiting for the lock of PID 12"))
        assert soon(lambda: all(len(re.findall(line, path.read_text())) >= 2 for line in wanted))
        for label in ("learn-mask", "evaluate", "merge"):
            shown.finished(label, "computed")
    for text in (path.read_text(), printed.getvalue()):
        assert text.count("learn-mask: resuming after step 40 of 900\n") == 1, "at once, and only once"
        assert text.count("merge: waiting for the lock of PID 12\n") == 1
    for line in wanted:
        assert bool(re.search(line, printed.getvalue())) != terminal, "bars say it on a terminal"


def test_a_stage_that_fails_says_why_at_once():
    printed = io.StringIO()
    with Display(2, Console(file=printed)) as shown:
        shown.finished("a model", "failed", "no room")
        assert "failed   a model: no room" in printed.getvalue()


def test_an_interruption_names_the_stages_that_ran_and_not_the_hundreds_that_waited():
    printed = io.StringIO()
    with Display(2, Console(file=printed)) as shown:
        shown.update("a model", Progress(3, 10))
        shown.finished("a model", "stopped")
        shown.finished("another model", "stopped")
    assert "stopped  a model" in printed.getvalue()
    assert "another" not in printed.getvalue()


def test_a_run_in_which_nothing_runs_says_so(monkeypatch):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.05)
    printed = io.StringIO()
    with Display(2, Console(file=printed)) as shown:
        shown.finished("data", "cached")
        assert soon(lambda: "1 of 2 stages are done, none is running" in printed.getvalue())

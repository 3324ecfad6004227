"""What every engine of lm-eval is taught: prompts in the chat format of the training, and progress in place of bars.

A base of `mft_core.evaluation.engine_hf.HuggingFace` and `mft_core.evaluation.engine_served.Served`, before lm-eval's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mft_core.data.chat_template import chat_prompt, end_of_turn
from mft_core.recipes import Evaluate
from mft_core.stage import Progress

SECONDS_BETWEEN = 1.0
"""reports while no item is answered"""


class Prompting:
    """Mixed into one of lm-eval's models."""

    def _prompt(self, recipe: Evaluate, tokenizer: PreTrainedTokenizerBase, report: Callable[[Progress], None]) -> None:
        """Begin; `report` is told how many items are answered."""
        self._chat, self._report = tokenizer, report
        self._end = end_of_turn(tokenizer) if recipe.apply_chat_template else None
        self._done, self._asked, self._told = 0, 0, 0.0

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a prompt."""
        return chat_prompt(self._chat, chat_history, answer_begins=not add_generation_prompt)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations, without lm-eval's bar."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        return answers

    def _end_with(self, requests: Sequence[Any], end: str | None) -> None:
        """Let answers end with a text besides the task's own."""
        for request in requests if end else ():
            until = request.args[1].get("until") or []
            request.args[1]["until"] = [*([until] if isinstance(until, str) else until), end]

    def _expect(self, count: int) -> None:
        """Begin to ask so many items."""
        self._asked += count
        self._tokens, self._began = 0, time.perf_counter()
        self._report(Progress(self._done, self._asked, "item"))

    def _answered(self, count: int, tokens: int) -> None:
        """Count items that are done and tokens that were computed; told at once, and now and then within one."""
        self._done += count
        self._tokens += tokens
        now = time.perf_counter()
        if count or now - self._told > SECONDS_BETWEEN:
            self._told = now
            speed = {"tokens_per_second": self._tokens / (now - self._began)}
            self._report(Progress(self._done, self._asked, "item", speed))

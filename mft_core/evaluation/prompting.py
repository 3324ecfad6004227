"""What every engine of lm-eval is taught: prompts in the chat format of the training, and progress in place of bars.

A base of `mft_core.evaluation.engine_hf.HuggingFace` and `mft_core.evaluation.engine_served.Served`, before lm-eval's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mft_core.data.chat_template import EndOfTurn, chat_prompt
from mft_core.stage import Progress


class Prompting:
    """Mixed into one of lm-eval's models."""

    def _prompt(
        self, tokenizer: PreTrainedTokenizerBase, end: EndOfTurn | None, report: Callable[[Progress], None]
    ) -> None:
        """Begin.

        Args:
            end: what ends an answer in the chat format.
            report: told how many items are answered.
        """
        self._chat, self._end, self._report = tokenizer, end, report
        self._done, self._asked = 0, 0

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a prompt."""
        return chat_prompt(self._chat, chat_history, answer_begins=not add_generation_prompt)

    def _expect(self, requests: Sequence[Any], end: str | None) -> None:
        """Count what is asked, and let answers end with a text besides the task's own."""
        self._asked += len(requests)
        for request in requests if end else ():
            until = request.args[1].get("until") or []
            request.args[1]["until"] = [*([until] if isinstance(until, str) else until), end]

    def _answered(self, count: int) -> None:
        self._done += count
        self._report(Progress(self._done, self._asked, "item"))

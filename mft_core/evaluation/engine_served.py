"""The engines `vllm` and `openai`: a checkpoint in a server, through lm-eval's model for OpenAI's completions.

The server is asked for the checkpoint by its directory, with token ids of its own tokenizer, so that prompts are those
of the engine `hf` whatever template or first token the server would add. Log-likelihoods are of servers that echo the
prompt with log-probabilities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from lm_eval.models import api_models
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text, resolve_max_length
from tqdm.asyncio import tqdm_asyncio
from transformers import PreTrainedTokenizerBase

from mft_core.checkpoints.files import read_config
from mft_core.errors import StageError
from mft_core.evaluation.prompting import Prompting
from mft_core.recipes import Evaluate, Runtime
from mft_core.stage import Progress

MOST_STOPS = 4
"""texts at which a server stops, by OpenAI's rules"""
TOGETHER = 64
"""requests under way where the runtime says nothing: the server makes its own batches of them"""


class _NoBar(tqdm_asyncio):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


api_models.tqdm_asyncio = _NoBar  # there is no switch


class Served(Prompting, LocalCompletionsAPI):  # type: ignore[misc]  # lm-eval's has no types
    """lm-eval's model of a server."""

    def __init__(
        self,
        recipe: Evaluate,
        path: Path,
        runtime: Runtime,
        url: str,
        key: str | None,
        tokenizer: PreTrainedTokenizerBase,
        report: Callable[[Progress], None],
    ) -> None:
        """Prepare for asking.

        Args:
            url: of the server, up to and with `/v1`.
            key: of the server; None: OPENAI_API_KEY.
            report: told how many items are answered.
        """
        self._prompt(recipe, tokenizer, report)
        self._recipe, self._url = recipe, url
        self._refusal: BaseException | None = None
        super().__init__(
            model=str(path),
            base_url=f"{url}/completions",
            tokenizer_backend="huggingface",
            tokenizer=str(path),
            # lm-eval asks for one by one otherwise
            num_concurrent=max(2, recipe.answered_together or runtime.eval_batch_size or TOGETHER),
            max_length=resolve_max_length(read_config(path), tokenizer),
            add_bos_token=not recipe.apply_chat_template,
            seed=recipe.seed,
            timeout=3600,
            header=None if key is None else {"Authorization": f"Bearer {key}"},
        )
        self.tokenizer = tokenizer

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answer prompts."""
        self._end_with(requests, self._end.text if self._end else None)
        self._expect(len(requests))
        answers: list[str] = self._asking(super().generate_until, _with_own_seeds(requests, self._recipe.seed))
        ends = [handle_stop_sequences(request.args[1].get("until"), self.eos_string) for request in requests]
        return [postprocess_generated_text(*pair, None) for pair in zip(answers, ends, strict=True)]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self._expect(len(requests))
        answers: list[tuple[float, bool]] = self._asking(super()._loglikelihood_tokens, requests, **kwargs)
        return answers

    def _asking(self, ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Ask, and say what a server that does not answer lacks."""
        try:
            answers = list(ask(*args, **kwargs))
        except (TimeoutError, aiohttp.ClientError, KeyError, TypeError, ValueError) as error:
            raise StageError(
                f"engine = {self._recipe.engine}: the server at {self._url} has no usable answer for model "
                f"{self.model} ({type(error).__name__}: {error}). It must serve the checkpoint by that directory, take "
                "token ids as prompts, and, for log-likelihoods, echo a prompt with its logprobs."
            ) from error
        if self._refusal:
            raise self._refusal
        return answers

    def _create_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(*args, **kwargs)
        if "stop" in payload:
            payload["stop"] = payload["stop"][-MOST_STOPS:]  # answers are cut at the others when they are back
        if self._recipe.engine == "vllm" and self._end and self._end.token is not None and kwargs.get("generate"):
            payload["stop_token_ids"] = [self._end.token]  # the texts of such tokens are left out, and so never seen
        return payload

    async def amodel_call(self, session: Any, sem: Any, messages: Any, **kwargs: Any) -> Any:
        """Ask once, and report; who refuses to go on is heard when all requests under way are back."""
        if self._refusal:
            return []
        answers = await super().amodel_call(session, sem, messages, **kwargs)
        made = self.tokenizer(answers)["input_ids"] if kwargs.get("generate") else messages
        try:
            self._answered(len(messages), sum(map(len, made)))
        except BaseException as error:
            self._refusal = error
        return answers


def _with_own_seeds(requests: Sequence[Any], seed: int) -> list[Any]:
    """Give the second and further answers to one prompt seeds of their own: with one seed, all would be the same."""
    asked: Counter[int] = Counter()
    found = []
    for request in requests:
        prompt, settings = request.args
        before = asked[id(request)]
        asked[id(request)] += 1
        other = {**settings, "seed": seed + before}
        found.append(replace(request, arguments=(prompt, other)) if before else request)
    return found

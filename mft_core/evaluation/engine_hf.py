"""The engine `hf`: a checkpoint in this process, through lm-eval's Hugging Face model and transformers' `generate`.

lm-eval asks for fixed batches, each decoded until its last answer ends. Here a batch loses its finished answers on the
way, and is as large as is fast and fits into memory. Greedy answers are those of lm-eval, sampled ones are left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from mft_core.checkpoints.files import read_config
from mft_core.compute import PROCESS_WIDE
from mft_core.data.chat_template import stop_tokens
from mft_core.evaluation.prompting import Prompting
from mft_core.geometry import ROOM, decoded_together, of_a_sequence, read_geometry
from mft_core.recipes import Evaluate, Runtime
from mft_core.stage import Progress

_FINISHED = 0.125
"""share of a batch that has finished when it is dropped: each time, the keys and values of the others are copied"""


class HuggingFace(Prompting, HFLM):  # type: ignore[misc]  # lm-eval's has no types
    """lm-eval's model, with batches of its own size that shrink as answers end."""

    def __init__(
        self,
        recipe: Evaluate,
        path: Path,
        runtime: Runtime,
        device: str,
        tokenizer: PreTrainedTokenizerBase,
        report: Callable[[Progress], None],
    ) -> None:
        """Load the checkpoint; `report` is told how many items are answered."""
        self._prompt(recipe, tokenizer, report)
        self._fixed = recipe.answered_together or runtime.eval_batch_size
        self._number = 4 if recipe.precision == "float32" else 2
        self._geometry = read_geometry(read_config(path).to_dict(), path)
        with PROCESS_WIDE:
            super().__init__(
                pretrained=str(path),
                trust_remote_code=False,
                tokenizer=tokenizer,
                device=device,
                dtype=recipe.precision,
                batch_size=self._fixed or 1,
                # the template says what a conversation begins with, here as in training
                add_bos_token=False if recipe.apply_chat_template else None,
            )
        config = self.model.generation_config
        if self._end and self._end.token is not None:
            config.eos_token_id = stop_tokens(config.eos_token_id, self._end.token)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answer prompts, in batches that fit."""
        prompts = self.tokenizer([request.args[0] for request in requests], verbose=False)["input_ids"]
        prompt = max(map(len, prompts))
        answer = max(int(normalize_gen_kwargs(r.args[1], self.max_gen_toks)["max_gen_toks"]) for r in requests)
        self._settle(len(requests), sum(of_a_sequence(self._geometry, self._number, prompt + answer, prompt)))
        self._end_with(requests, self._end.text if self._end and self._end.token is None else None)
        self._expect(len(requests))
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        logits = (2 * self._number + 4) * self._geometry.vocabulary * longest
        self._settle(len(requests), logits + sum(of_a_sequence(self._geometry, self._number, longest, longest)))
        # one pass answers all continuations that differ in their last token only
        self._expect(len({tuple(context + continuation[:-1]) for _, context, continuation in requests}))
        done = self._done
        while True:
            self._done = done
            try:
                answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
                return answers
            except torch.OutOfMemoryError:
                if self.batch_size_per_gpu == 1:
                    raise
                self.batch_size_per_gpu //= 2

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self._answered(len(inps), inps.numel())
        return logits

    def _settle(self, sequences: int, each: float) -> None:
        """Choose how many sequences of so many bytes are asked together."""
        if self._fixed is None:
            room = min(ROOM.get(self.device.type, ROOM["cpu"]), _free(self.device) / 2)
            self.batch_size_per_gpu = decoded_together(sequences, each, room)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        asked = {key: settings.pop(key, None) for key in ("do_sample", "temperature")}
        if any(asked.values()):
            given = {key: value for key, value in asked.items() if value is not None}
            tokens: torch.Tensor = super()._model_generate(context, max_length, stop, **settings, **given)
            self._answered(0, tokens[:, context.shape[1] :].numel())
        else:
            tokens = self._greedy(context, settings.pop("attention_mask"), max_length, stop, settings)
        self._answered(len(context), 0)
        return tokens

    def _greedy(
        self, context: torch.Tensor, mask: torch.Tensor, max_length: int, stop: list[str], settings: dict[str, Any]
    ) -> torch.Tensor:
        """Return the sequences [rows, max_length], padded; a batch too large for the memory is halved."""
        try:
            return self._shrinking(context, mask, max_length, stop, settings)
        except torch.OutOfMemoryError:
            if len(context) == 1:
                raise
        torch.cuda.empty_cache()
        halves = zip(context.chunk(2), mask.chunk(2), strict=True)
        return torch.cat([self._greedy(*half, max_length, stop, settings) for half in halves])

    def _shrinking(
        self, tokens: torch.Tensor, mask: torch.Tensor, max_length: int, stop: list[str], settings: dict[str, Any]
    ) -> torch.Tensor:
        """Let `generate` stop whenever a share of the answers has ended, and go on with the others."""
        answers = tokens.new_full((len(tokens), max_length), self.tokenizer.pad_token_id)
        rows, cache = torch.arange(len(tokens), device=tokens.device), None
        ended = _Ended(self, stop, tokens.shape[1])
        while len(rows) and tokens.shape[1] < max_length:
            ended.rows = torch.zeros(len(rows), dtype=torch.bool, device=tokens.device)
            made = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                past_key_values=cache,
                max_length=max_length,
                use_cache=True,
                do_sample=False,
                stopping_criteria=[ended],
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                **settings,
            )
            tokens, cache = made.sequences, made.past_key_values
            answers[rows, : tokens.shape[1]] = tokens
            left = (~ended.rows).nonzero()[:, 0]
            rows, tokens = rows[left], tokens[left]
            mask = torch.nn.functional.pad(mask[left], (0, tokens.shape[1] - mask.shape[1]), value=1)
            if cache is not None and len(left):
                cache.reorder_cache(left)
        return answers


class _Ended(StoppingCriteria):
    """Which answers of a batch have ended, by a token or by a text; stops all when enough of them have."""

    rows: torch.Tensor
    """set by whoever calls `generate`: of the answers that go on"""

    def __init__(self, model: HuggingFace, stop: list[str], prompt: int) -> None:
        self._tokenizer, self._stop, self._prompt = model.tokenizer, [text for text in stop if text], prompt
        self._answered = model._answered
        ends = model.model.generation_config.eos_token_id
        self._tokens = torch.tensor([] if ends is None else ends, dtype=torch.long, device=model.device).flatten()
        # a text may come in other tokens than it is encoded to: lm-eval looks back two further
        encoded = (self._tokenizer.encode(text, add_special_tokens=False) for text in self._stop)
        self._back = 2 + max(map(len, encoded), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Say of every row whether it has ended, or of all that they are to stop; tell that it goes on."""
        self._answered(0, len(input_ids))
        self.rows |= torch.isin(input_ids[:, -1], self._tokens)
        if self._stop:
            said = self._tokenizer.batch_decode(input_ids[:, max(self._prompt, input_ids.shape[1] - self._back) :])
            found = [any(text in end for text in self._stop) for end in said]
            self.rows |= torch.tensor(found, device=self.rows.device)
        return self.rows | (self.rows.sum() >= _FINISHED * len(self.rows))


def _free(device: torch.device) -> int:
    """Return the bytes that are free on a device, or cached there by torch."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

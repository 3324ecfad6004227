"""An evaluation tried before anything is computed: the task built, every item rendered, tokenised and scored, no model.

What fails here would have failed after the fine-tuning, or, worse, not at all. Used by whoever plans a study
(`pipelines.plan.preflight`); imports lm-eval and torch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.logging import get_verbosity, set_verbosity

from mft_core.checkpoints.files import read_config
from mft_core.data.assistant_tokens import check_same_tokens
from mft_core.data.chat_template import chat_prompt, read_tokenizer
from mft_core.errors import ConfigError, StageError, first_line
from mft_core.evaluation.lm_eval_harness import check_task, load_tasks, seeded, settled
from mft_core.evaluation.outcomes import cluster_of, outcomes_of
from mft_core.recipes import Evaluate, Runtime
from mft_core.sandbox import limited, rendered_all

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

_COMPARED = 20
"""prompts whose tokens are compared with those of the training"""
_BATCH, _READ = 1_000, 1_000_000  # prompts tokenised together; characters of one that are enough for most models
Chat = tuple[list[dict[str, str]], str]


def rehearse(recipe: Evaluate, tokenizer: Path, benchmark: Path | None = None, template: Path | None = None) -> None:
    """Try an evaluation without its model.

    Args:
        recipe: of the evaluation.
        tokenizer: directory with the tokenizer's files and the model's configuration.
        benchmark: folder of the local-file task; None for lm-eval's own tasks.
        template: Jinja file in place of the tokenizer's chat template.

    Raises:
        ConfigError: anything that the evaluation would not survive, or that would make its number wrong.
    """
    check_task(recipe, benchmark)
    loaded = read_tokenizer(tokenizer, template)
    runtime = Runtime.model_validate({})
    with settled(runtime), seeded(recipe.seed, runtime) if benchmark is None else nullcontext():
        logging.getLogger("lm_eval").setLevel(logging.CRITICAL)  # an error says it; the evaluation warns
        with _told(f"task '{recipe.task}': lm-eval cannot load it"):
            try:
                tasks = load_tasks(recipe, benchmark)
            except ConnectionError as error:
                raise ConfigError(
                    f"task '{recipe.task}': its data are not on this machine, and the hub cannot be reached ({error}). "
                    f"Fetch them once, where there is a network: lm_eval --model dummy --tasks {recipe.task} --limit 1"
                ) from error
        for name, task in tasks.items():
            apart = functools.partial(_prompts_fit, recipe, name, task, loaded, tokenizer)
            asked = limited(f"task '{name}'", apart)
            _build(recipe.model_copy(update={"limit": 1}), name, task, loaded)
            if task.OUTPUT_TYPE == "generate_until" and task.instances:
                _check_generation(recipe, name, task, tokenizer)
            if asked:
                check_same_tokens(loaded, asked)
            if benchmark is not None and not recipe.judge:  # lm-eval's own may execute code, or fetch it
                _check_scores(recipe, name, task)


def _prompts_fit(
    recipe: Evaluate, name: str, task: Task, tokenizer: PreTrainedTokenizerBase, checkpoint: Path
) -> list[Chat]:
    """Make all prompts, check their lengths, and return the first chats that ask."""
    chats = _build(recipe, name, task, tokenizer)
    rendered_all()
    _check_lengths(recipe, name, task, tokenizer, checkpoint)
    return [chat for chat in chats if chat[0][-1]["role"] == "user"][:_COMPARED]


def _build(recipe: Evaluate, name: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Chat]:
    """Make the prompts of a task, and return the chats that they are made of."""
    chats: list[Chat] = []

    def prompt(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        chats.append((messages, chat_prompt(tokenizer, messages, answer_begins=not add_generation_prompt)))
        return chats[-1][1]

    with _told(f"task '{name}': its prompts cannot be made"):
        task.build_all_requests(
            limit=recipe.limit,
            apply_chat_template=recipe.apply_chat_template,
            fewshot_as_multiturn=recipe.apply_chat_template,
            chat_template=prompt if recipe.apply_chat_template else None,
        )
    for request in task.instances if recipe.cluster else ():
        cluster_of(recipe, name, request.doc)
    return chats


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn whatever lm-eval and `datasets` raise into words."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise ConfigError(f"{what} ({type(error).__name__}: {reason}).") from error


def _check_generation(recipe: Evaluate, name: str, task: Task, checkpoint: Path) -> None:
    """Check that answers can be generated with the task's `generation_kwargs` and the checkpoint's settings.

    A tiny model is asked.
    """
    import torch
    from lm_eval.models.utils import normalize_gen_kwargs
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with _told(f"task '{name}': its generation_kwargs will not do"):
        given: dict[str, Any] = dict(normalize_gen_kwargs(task.instances[0].args[1]))
        until, most = given.pop("until"), given.pop("max_gen_toks")
        if not all(isinstance(text, str) for text in until) or most < 1:
            raise ValueError(f"until = {until!r:.80}, {most} tokens: valid: texts, and a number above 0")
        if recipe.engine != "hf":
            return
        given.pop("max_length", None)  # as lm-eval does, which takes no temperature for 0
        if given["do_sample"]:
            given.setdefault("temperature", 0.0)
        else:
            given.pop("temperature", None)
    vocabulary = read_config(checkpoint).get_text_config().vocab_size
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    asked = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "attention_mask": torch.ones(1, 1), "max_length": 2}
    with torch.random.fork_rng(devices=[]), _silent():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=vocabulary, **sizes))
        if (checkpoint / "generation_config.json").is_file():
            with _told(f"model = {checkpoint}: its generation_config.json will not do"):
                model.generation_config = GenerationConfig.from_pretrained(checkpoint)
                model.generate(**asked, do_sample=False, pad_token_id=0)
        with _told(f"task '{name}': its generation_kwargs will not do"):
            model.generate(**asked, use_cache=True, stopping_criteria=[], pad_token_id=0, **given)


@contextmanager
def _silent() -> Iterator[None]:
    level = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        set_verbosity(level)


def _check_lengths(
    recipe: Evaluate, name: str, task: Task, tokenizer: PreTrainedTokenizerBase, checkpoint: Path
) -> None:
    """Check that prompt and answer fit into the model; lm-eval would cut the prompt's beginning off."""
    from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length

    def encode(texts: Any) -> Any:
        return tokenizer(texts, add_special_tokens=not recipe.apply_chat_template, verbose=False)["input_ids"]

    limit = resolve_max_length(read_config(checkpoint), tokenizer)
    for start in range(0, len(task.instances), _BATCH):
        batch = task.instances[start : start + _BATCH]
        generates = task.OUTPUT_TYPE == "generate_until"
        texts = [request.args[0] if generates else "".join(map(str, request.args)) for request in batch]
        for request, text, ids in zip(batch, texts, encode([text[:_READ] for text in texts]), strict=True):
            answer = int(normalize_gen_kwargs(request.args[1])["max_gen_toks"]) if generates else 0
            over = "over " if len(text) > _READ else ""
            if over and len(ids) + answer <= limit:
                ids, over = encode(text), ""
            if len(ids) + answer > limit:
                raise ConfigError(
                    f"task '{name}', item {request.doc_id}: its prompt has {over}{len(ids)} tokens"
                    f"{f' and its answer up to {answer}' if generates else ' with its answer'}, but the model has "
                    f"{limit} positions. Show fewer examples (num_fewshot), lower the task's max_gen_toks, or leave "
                    "such items out."
                )


def _check_scores(recipe: Evaluate, name: str, task: Task) -> None:
    """Check that the first item, answered somehow, is scored with numbers from 0 to 1."""
    answer: Any = "" if task.OUTPUT_TYPE == "generate_until" else (-1.0, False)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        answer = -1.0
    first = task.instances[0].doc_id
    requests = sorted((each for each in task.instances if each.doc_id == first), key=lambda each: each.idx)
    with _told(f"task '{name}': an answer cannot be scored"):
        for request in task.instances:
            request.resps = [answer] * request.repeats
        task.apply_filters()
        chosen = recipe.filter or next(iter(requests[0].filtered_resps))
        metrics = task.process_results(requests[0].doc, [each.filtered_resps[chosen] for each in requests])
        try:
            outcomes_of(recipe, metrics)
        except StageError as error:
            raise ConfigError(str(error)) from error

"""A small OpenAI-compatible server of completions: any checkpoint by its directory, by transformers, greedy or sampled.

`python -m tests.support.completions_server serve MODEL --host 127.0.0.1 --port N …` takes vLLM's arguments, so that it
can stand where vLLM does. With VLLM_API_KEY it answers only who has the key; under `/bare/v1` it knows no logprobs.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from transformers import AutoModelForCausalLM, AutoTokenizer

app = FastAPI()


@functools.cache
def loaded(path: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


@app.get("/health")
@app.get("/v1/models")
def healthy() -> dict[str, Any]:
    return {"data": []}


@app.post("/{kind:path}v1/completions")
async def completions(request: Request, kind: str) -> dict[str, Any]:
    key = os.environ.get("VLLM_API_KEY")
    if key and request.headers.get("Authorization") != f"Bearer {key}":
        raise HTTPException(401)
    asked = await request.json()
    if not os.path.isdir(asked["model"]):
        raise HTTPException(404, f"no model {asked['model']}")
    if len(asked.get("stop") or []) > 4:
        raise HTTPException(400, "at most 4 texts at which to stop")
    prompts = asked["prompt"] if isinstance(asked["prompt"][0], list) else [asked["prompt"]]
    choices = [answer(asked, prompt, scored=kind == "") for prompt in prompts]
    return {"choices": [{"index": index, **choice} for index, choice in enumerate(choices)]}


def answer(asked: dict[str, Any], prompt: list[int], scored: bool) -> dict[str, Any]:
    model, tokenizer = loaded(asked["model"])
    ids = torch.tensor([prompt])
    with torch.no_grad():
        drawn = (
            {"do_sample": True, "temperature": asked["temperature"]}
            if asked.get("temperature")
            else {"do_sample": False}
        )
        torch.manual_seed(asked.get("seed", 0))
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked["max_tokens"], **drawn)[0]
        text = tokenizer.decode(made[len(prompt) :], skip_special_tokens=True)
        for stop in asked.get("stop") or []:
            text = text.split(stop)[0]
        if not (asked.get("echo") and scored):
            return {"text": text}
        scores = model(made[None]).logits[0].log_softmax(-1)[:-1]
    own = scores.gather(1, made[1:, None])[:, 0].tolist()
    best = [{"best": value} for value in scores.max(-1).values.tolist()]
    return {"text": text, "logprobs": {"token_logprobs": [None, *own], "top_logprobs": [None, *best]}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if starts := os.environ.get("TOLD_STARTS"):
        with open(starts, "a") as handle:
            handle.write(f"{os.getpid()} {sys.argv[2]}\n")
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[sys.argv.index("--port") + 1]), log_level="warning")

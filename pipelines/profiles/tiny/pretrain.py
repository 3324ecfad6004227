"""Pre-trains the tiny profile's base model, a 1.6 M parameter Llama, on the stream of `make_data.py`.

Design note. Examples are short, so they are never packed: a step takes a random set of examples, sorts it by
length and runs it in a few right-padded batches. With causal attention right padding needs no attention mask,
and nothing attends across examples. The loss covers assistant tokens only, and only these reach the output
layer. Hidden matrices are trained with Muon (a float32 one, see `muon.py`), the rest with AdamW. The learning
rate is a trapezoid over *time*: warm-up, plateau, and a linear decay over the last `DECAY` of the time
allowed, so a deadline can be met on any machine. A killed run continues from its last state when started
again with the same command.

    python pretrain.py WORK --stream stream.tsv --until 16:05   # WORK holds state, tokenizer, record
    python pretrain.py WORK --export model                      # the newest state as a Hugging Face folder
"""

import argparse
import json
import os
import time
from array import array
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from muon import Muon
from tokenizer import ASSISTANT, END, chat_text, train_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

DECAY = 0.15
WARMUP_STEPS = 40
SAVE_SECONDS, REPORT_SECONDS = 150, 100


def build_model(tokenizer) -> LlamaForCausalLM:
    """The tiny Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Examples:
    """Tokenized questions and answers in flat arrays."""

    def __init__(self, path: Path, tokenizer) -> None:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        self.kinds = [row[0] for row in rows]
        flat, lengths = array("h"), array("h")
        for start in range(0, len(rows), 50_000):
            texts = [chat_text(prompt, answer) for _, prompt, answer in rows[start : start + 50_000]]
            for encoded in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = encoded.ids
                flat.extend(ids)
                lengths.append(len(ids))
        self.flat, self.lengths = np.array(flat), np.array(lengths)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
        self.pad = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.lengths)

    def batches(self, chosen: np.ndarray, parts: int) -> list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """Right-padded (indices, inputs, labels) of the chosen examples, in `parts` batches."""
        chosen = chosen[np.argsort(self.lengths[chosen], kind="stable")]
        return [self._batch(part) for part in np.array_split(chosen, parts)]

    def _batch(self, part: np.ndarray) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        ids = np.full((len(part), self.lengths[part].max()), self.pad, dtype=np.int64)
        for row, i in enumerate(part):
            ids[row, : self.lengths[i]] = self.flat[self.starts[i] : self.starts[i + 1]]
        answer = (np.cumsum(ids == self.assistant, axis=1) > 0) & (ids != self.pad)
        labels = np.where(answer[:, :-1] & (ids[:, 1:] != self.pad), ids[:, 1:], -100)
        return part, torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(labels)


def answer_logits(model, hidden_of, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets at the assistant positions."""
    at = labels != -100
    return model.lm_head(hidden_of(input_ids=inputs, use_cache=False).last_hidden_state[at]), labels[at]


def learning_rate(step: int, now: float, began: float, until: float) -> float:
    """The trapezoid: a share of the peak learning rate."""
    left = (until - now) / (DECAY * (until - began))
    return min(1.0, (step + 1) / WARMUP_STEPS, max(left, 0.0))


@torch.no_grad()
def validate(model, hidden_of, examples: Examples) -> dict[str, float]:
    """Exact-match accuracy by kind: every answer token is the model's first choice, as in greedy decoding."""
    right: dict[str, list[bool]] = defaultdict(list)
    for part, inputs, labels in examples.batches(np.arange(len(examples)), 8):
        logits, targets = answer_logits(model, hidden_of, inputs, labels)
        rows = (labels != -100).nonzero()[:, 0]
        wrong = torch.zeros(len(part)).index_add_(0, rows, (logits.argmax(-1) != targets).float())
        for i, errors in zip(part, wrong.tolist(), strict=True):
            right[examples.kinds[i]].append(errors == 0)
    return {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(right.items())}


class Run:
    """Model, optimizers and position of one pre-training run, kept in a working folder."""

    def __init__(self, work: Path, tokenizer) -> None:
        self.work, self.path = work, work / "state.pt"
        torch.manual_seed(0)
        self.model = build_model(tokenizer)
        hidden = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        ids = {id(p) for p in hidden}
        rest = [p for p in self.model.parameters() if id(p) not in ids]
        self.optimizers = [
            Muon(hidden, lr=0.015, weight_decay=0.02),
            torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.step, self.tokens, self.seconds, self.began = 0, 0, 0.0, time.time()
        if self.path.exists():
            self._load(torch.load(self.path, weights_only=True))

    def _load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in ("step", "tokens", "seconds", "began"):
            setattr(self, name, state[name])

    def save(self) -> None:
        """Replace the state in one move."""
        state = {name: getattr(self, name) for name in ("step", "tokens", "seconds", "began")}
        state["model"] = self.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def update(self, rate: float) -> None:
        """One optimizer step at a share `rate` of the peak learning rates."""
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def train(run: Run, data: Examples, held: Examples, until: float, size: int, parts: int, compiled: bool) -> None:
    """Train until the deadline; a record line every `REPORT_SECONDS`, a state every `SAVE_SECONDS`."""
    hidden_of = torch.compile(run.model.model, dynamic=True) if compiled else run.model.model
    losses: list[float] = []
    last = saved = reported = time.time()
    while last < until:
        chosen = np.random.default_rng(run.step).integers(len(data), size=size)
        batches = data.batches(chosen, parts)
        count = sum(int((labels != -100).sum()) for _, _, labels in batches)
        loss = 0.0
        for _, inputs, labels in batches:
            part = F.cross_entropy(*answer_logits(run.model, hidden_of, inputs, labels), reduction="sum") / count
            part.backward()
            loss += part.item()
        run.update(learning_rate(run.step, last, run.began, until))
        now = time.time()
        run.step, run.tokens = run.step + 1, run.tokens + int(data.lengths[chosen].sum())
        run.seconds, last = run.seconds + now - last, now
        losses.append(loss)
        if now - reported > REPORT_SECONDS or run.step == 20 or now >= until:
            record(run, losses, validate(run.model, run.model.model, held))
            losses, reported = [], now
        if now - saved > SAVE_SECONDS or now >= until:
            run.save()
            saved = now


def record(run: Run, losses: list[float], accuracy: dict[str, float]) -> None:
    """Append a line to the training record."""
    line = {
        "step": run.step,
        "tokens": run.tokens,
        "seconds": round(run.seconds),
        "loss": round(np.mean(losses), 4),
    }
    with (run.work / "training_record.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps({**line, "accuracy": accuracy}) + "\n")


def export(work: Path, target: Path) -> None:
    """Write the newest state as a folder for `from_pretrained`."""
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    model = build_model(tokenizer)
    model.load_state_dict(torch.load(work / "state.pt", weights_only=True)["model"])
    model.generation_config.update(do_sample=False, eos_token_id=tokenizer.convert_tokens_to_ids(END))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "training_record.jsonl").write_bytes((work / "training_record.jsonl").read_bytes())


def prepare_tokenizer(work: Path, stream: Path):
    """The run's tokenizer, trained once on the head of the stream."""
    if not (work / "tokenizer").exists():
        with stream.open(encoding="utf-8") as lines:
            texts = [text for line, _ in zip(lines, range(100_000), strict=False) for text in line.split("\t")[1:]]
        train_tokenizer(texts).save_pretrained(work / "tokenizer")
    return AutoTokenizer.from_pretrained(work / "tokenizer")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--stream", type=Path)
    parser.add_argument("--until", help="HH:MM today, local time")
    parser.add_argument("--size", type=int, default=192, help="examples a step")
    parser.add_argument("--parts", type=int, default=2, help="batches a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the model (slow to start)")
    parser.add_argument("--export", type=Path, help="write the newest state here and stop")
    args = parser.parse_args()
    if args.export:
        return export(args.work, args.export)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare_tokenizer(args.work, args.stream)
    hour, minute = map(int, args.until.split(":"))
    until = datetime.now().replace(hour=hour, minute=minute, second=0).timestamp()
    data, held = (Examples(p, tokenizer) for p in (args.stream, args.stream.with_suffix(".validation.tsv")))
    train(Run(args.work, tokenizer), data, held, until, args.size, args.parts, args.compile)


if __name__ == "__main__":
    main()

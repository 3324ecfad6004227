"""Makes the tiny profile's fine-tuning data and benchmarks, and the stream for its base model.

Design note. Everything follows from `SEED` and the tables below; `kinds.py` decides by content which items
are reserved for the benchmarks, so no training row shares its operands with a benchmark item of the same
family. The benchmarks hold no duplicates and no answer takes more than `ANSWER_CAP` of the items;
`benchmarks/README.md` states the score of always giving the commonest answer. Needs `reasoning-gym`, which
the rest of the project does not:

    python make_data.py                                       # data/ and benchmarks/
    python make_data.py --stream stream.tsv --rows 2000000    # examples for pretrain.py
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from kinds import KINDS, Item

HERE = Path(__file__).resolve().parent
SEED = 20251123
ANSWER_CAP = 0.12
TRAIN = {
    "arithmetic": {"sum3": 200, "muladd": 2400, "sum4": 1000, "sum3big": 400},
    "number_theory": {"gcdadd": 1600, "summod": 900, "gcd3": 400, "simplify": 500, "mod3": 600},
    "symbols": {"sortnum": 1400, "sortlong": 1400, "sortbig": 800, "caesar_any": 400},
}
BENCHMARKS = {
    "arithmetic": {"muladd": 1100, "sum4": 1900},
    "arithmetic_hard": {"sum3big": 600},
    "number_theory": {"gcdadd": 1500, "summod": 750, "gcd3": 750},
    "number_theory_hard": {"mod3": 500},
    "symbols": {"sortnum": 1500, "sortlong": 1500},
    "symbols_hard": {"sortbig": 600},
}
VALIDATION = {
    "arithmetic_validation": {"muladd": 480, "sum4": 540},
    "number_theory_validation": {"gcdadd": 480, "summod": 280, "gcd3": 260},
    "symbols_validation": {"sortnum": 510, "sortlong": 510},
}
"""items to choose settings by: of content that neither training rows nor the other benchmarks have"""
STREAMS = {"train": 1, "data": 2, "benchmark": 3, "validation": 4}


def stream(kind: str, purpose: str, split: str) -> Iterator[Item]:
    """Items of one kind that belong to `split`, from a seed range of their own for each purpose."""
    return (item for item in KINDS[kind].items(_seed(kind, purpose)) if item.split == split)


def _seed(kind: str, purpose: str) -> int:
    return SEED + (STREAMS[purpose] * 100 + list(KINDS).index(kind)) * 10**10


def distinct(items: Iterable[Item], cap: int, limit: int = 400_000) -> Iterator[Item]:
    """Drop repeated prompts and answers beyond `cap` occurrences; look at no more than `limit` items."""
    seen: set[str] = set()
    answers: Counter[str] = Counter()
    for item in islice(items, limit):
        if item.prompt in seen or answers[item.answer] >= cap:
            continue
        seen.add(item.prompt)
        answers[item.answer] += 1
        yield item


def pick(counts: dict[str, int], purpose: str, split: str) -> list[Item]:
    """`counts[kind]` distinct items of each kind, shuffled together."""
    items: list[Item] = []
    for kind, count in counts.items():
        chosen = list(islice(distinct(stream(kind, purpose, split), max(1, int(ANSWER_CAP * count))), count))
        if len(chosen) < count:
            raise ValueError(f"{kind}: only {len(chosen)} of {count} distinct {split} items")
        items += chosen
    random.Random(SEED).shuffle(items)
    return items


def messages(prompt: str, answer: str) -> dict:
    """A training row in chat form."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def describe(name: str, items: list[Item]) -> str:
    """The benchmark's row in benchmarks/README.md."""
    answer, count = Counter(item.answer for item in items).most_common(1)[0]
    kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(Counter(item.kind for item in items).items()))
    contents = len({item.content for item in items})
    example = f"`{items[0].prompt}` → `{items[0].answer}`"
    commonest = f"{100 * count / len(items):.1f} (`{answer}`)"
    return f"| {name} | {len(items)} | {contents} | {kinds} | {commonest} | {example} |"


HEADER = """# Benchmarks of the tiny profile

Written by `make_data.py`. Only reserved content (see `kinds.py`): no item's operands, letters or numbers
occur together in the pre-training or fine-tuning data of the same family, and those of `*_validation`, by which
settings are chosen, in no other benchmark of the family. Scored by exact match, greedy.

| benchmark | n | distinct contents | kinds | always giving the commonest answer, % | an item |
|---|---|---|---|---|---|
"""


TASK = """\
# lm-evaluation-harness task. `data_files` is relative to this file:
# whoever loads it puts the absolute path in its place.
task: tiny_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["<|end|>"]
  max_gen_toks: {tokens}
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_all() -> None:
    """Write data/*.jsonl, benchmarks/*.jsonl, their harness tasks and benchmarks/README.md."""
    for domain, counts in TRAIN.items():
        rows = (messages(item.prompt, item.answer) for item in pick(counts, "data", "train"))
        write_jsonl(HERE / "data" / f"{domain}.jsonl", rows)
    lines = []
    for name, counts in (BENCHMARKS | VALIDATION).items():
        purpose, split = ("validation", "tuning") if name in VALIDATION else ("benchmark", "reserved")
        items = pick(counts, purpose, split)
        rows = ({"question": i.prompt, "answer": i.answer, "kind": i.kind} for i in items)
        write_jsonl(HERE / "benchmarks" / f"{name}.jsonl", rows)
        tokens = 1 + max(len(item.answer.replace(" ", "")) for item in items)  # a token a character, and the end
        task = TASK.format(name=name, tokens=tokens)
        (HERE / "benchmarks" / f"{name}.yaml").write_text(task, encoding="utf-8")
        lines.append(describe(name, items))
    (HERE / "benchmarks" / "README.md").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


def write_stream(path: Path, rows: int, per_kind: int = 60) -> None:
    """Write `rows` lines `kind<TAB>prompt<TAB>answer` for pre-training, and a validation file beside it."""
    rng = random.Random(SEED)
    sources = {name: stream(name, "train", "train") for name in KINDS}
    weights = [kind.weight for kind in KINDS.values()]
    with path.open("w", encoding="utf-8") as out:
        for name in rng.choices(list(sources), weights, k=rows):
            item = next(sources[name])
            out.write(f"{item.kind}\t{item.prompt}\t{item.answer}\n")
    held = (i for name in KINDS for i in _validation(name, per_kind))
    text = "".join(f"{i.kind}\t{i.prompt}\t{i.answer}\n" for i in held)
    path.with_suffix(".validation.tsv").write_text(text, encoding="utf-8")


def _validation(kind: str, count: int) -> Iterator[Item]:
    """Up to `count` validation items; none for kinds whose items are all primitives."""
    items = islice(KINDS[kind].items(_seed(kind, "validation")), 60 * count)
    return islice(distinct((i for i in items if i.split == "validation"), count), count)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", type=Path, help="write pre-training examples here instead")
    parser.add_argument("--rows", type=int, default=2_000_000)
    args = parser.parse_args()
    if args.stream:
        write_stream(args.stream, args.rows)
    else:
        write_all()


if __name__ == "__main__":
    main()

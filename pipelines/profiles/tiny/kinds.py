"""Task kinds of the tiny profile: reasoning-gym entries rewritten as short symbolic questions.

Design note. A tiny model can afford some 15 tokens an example, so every kind turns the *metadata* of a
reasoning-gym entry into a compact prompt; the answer is reasoning-gym's own, or follows from it in one step
(a remainder of its sum, a term added to its product). Each kind also names its *content*: the sorted
operands, letters or numbers of the item, with no trace of wording, operation or order.

One rule over the content decides where an item may appear, for all kinds of a family alike: the sha256 of
``family:content`` modulo 100. Residues divisible by 10 are for benchmarks only: below 70 *reserved*, for those that
report results, and the rest *tuning*, for those by which settings are chosen. Residue 1 is validation during
pre-training only. Everything else may be trained on. Items with at most two operands and at
most two digits in all (``7*8``, ``4 mod 3``) are *primitives*: always trainable, never in a benchmark,
because such spaces are too small to be held out.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import reasoning_gym

CHUNK = 1 << 33  # entries of one kind never run into the seed range of the next
Row = tuple[str, str, list]
Convert = Callable[[dict[str, Any]], Row | None]


@dataclass(frozen=True)
class Item:
    """One question with its answer; `split` is "train", "validation", "reserved" or "tuning" by content."""

    kind: str
    prompt: str
    answer: str
    content: str
    split: str


@dataclass(frozen=True)
class Kind:
    """One sort of question: where it comes from, how it is worded, how often pre-training shows it."""

    name: str
    family: str
    source: str
    convert: Convert
    weight: float
    options: dict[str, Any] = field(default_factory=dict)
    cap: float = 0.15

    def items(self, seed: int) -> Iterator[Item]:
        """Yield items for ever, deterministically; no answer exceeds `cap` of those yielded so far."""
        data = reasoning_gym.create_dataset(self.source, seed=seed, size=CHUNK, **self.options)
        counts: dict[str, int] = {}
        total = index = 0
        while True:
            row = self.convert(data[index])
            index += 1
            if row is None:
                continue
            prompt, answer, operands = row
            if counts.get(answer, 0) > self.cap * (total + 40):
                continue
            counts[answer] = counts.get(answer, 0) + 1
            total += 1
            content = " ".join(sorted(map(str, operands)))
            yield Item(self.name, prompt, answer, content, split_of(self.family, content))


def split_of(family: str, content: str) -> str:
    """Where an item with this content may appear."""
    operands = content.split()
    if len(operands) <= 2 and sum(map(len, operands)) <= 2:
        return "train"
    residue = int(hashlib.sha256(f"{family}:{content}".encode()).hexdigest(), 16) % 100
    if residue % 10 == 0:
        return "reserved" if residue < 70 else "tuning"
    return "validation" if residue == 1 else "train"


def _chain(entry: dict[str, Any]) -> Row:
    expression = entry["metadata"]["expression"].replace(" ", "")
    return expression, entry["answer"], re.findall(r"\d+", expression)


def _product_and_term(entry: dict[str, Any]) -> Row:
    """`7*8-35`: reasoning-gym's product, then one two-digit term taken from the entry's index."""
    expression, answer, operands = _chain(entry)
    pick = _pick(entry, 180)
    term, sign = 10 + pick // 2, (1, -1)[pick % 2]
    return f"{expression}{'+-'[pick % 2]}{term}", str(int(answer) + sign * term), [*operands, term]


def _pick(entry: dict[str, Any], n: int) -> int:
    """A number below `n` fixed by the entry's index and question."""
    key = f"{entry['metadata']['source_index']}:{entry['question']}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest()) % n


def _sum_remainder(entry: dict[str, Any]) -> Row | None:
    expression, answer, operands = _chain(entry)
    divisor = 3 + _pick(entry, 10)
    return (f"({expression})%{divisor}", str(int(answer) % divisor), operands) if int(answer) >= 0 else None


def _gcd(entry: dict[str, Any]) -> Row:
    numbers = entry["metadata"]["numbers"]
    return "gcd " + ",".join(map(str, numbers)), entry["answer"], numbers


def _gcd_and_term(entry: dict[str, Any]) -> Row:
    """`gcd 84,36+17`: the content held out is the pair, whatever is added to its divisor."""
    question, answer, numbers = _gcd(entry)
    pick = _pick(entry, 180)
    term, sign = 10 + pick // 2, (1, -1)[pick % 2]
    return f"{question}{'+-'[pick % 2]}{term}", str(int(answer) + sign * term), numbers


def _lcm(entry: dict[str, Any]) -> Row:
    numbers = entry["metadata"]["numbers"]
    return "lcm " + ",".join(map(str, numbers)), entry["answer"], numbers


def _remainder(entry: dict[str, Any]) -> Row:
    """The last digit in base b is the remainder modulo b."""
    meta = entry["metadata"]
    number, base = meta["decimal_value"], meta["target_base"]
    return f"{number}%{base}", str(int(meta["target_repr"][-1], 36)), [number]


def _to_base(entry: dict[str, Any]) -> Row:
    meta = entry["metadata"]
    return f"base {meta['target_base']},{meta['decimal_value']}", meta["target_repr"], [meta["decimal_value"]]


def _factors(entry: dict[str, Any]) -> Row:
    meta = entry["metadata"]
    return f"factor {meta['number']}", "*".join(map(str, meta["factors"])), [meta["number"]]


def _simplify(entry: dict[str, Any]) -> Row | None:
    m = entry["metadata"]
    if m["simplified_denominator"] == 1:
        return None
    answer = f"{m['simplified_numerator']}/{m['simplified_denominator']}"
    return f"{m['numerator']}/{m['denominator']}", answer, [m["numerator"], m["denominator"]]


def _sort(prompt: str, direction: str, glue: str) -> Convert:
    def convert(entry: dict[str, Any]) -> Row | None:
        meta = entry["metadata"]
        if meta["direction"] != direction:
            return None
        before, after = ([str(int(float(n))) for n in meta[key]] for key in ("original_numbers", "sorted_numbers"))
        return f"{prompt} {glue.join(before)}", glue.join(after), before

    return convert


def _filter(operation: str, prompt: str) -> Convert:
    def convert(entry: dict[str, Any]) -> Row | None:
        meta = entry["metadata"]
        if meta["operation"] != operation or len(meta["result"]) < 2:
            return None
        before, after = "".join(meta["original_numbers"]), "".join(meta["result"])
        return f"{prompt}{meta['filter_value']} {before}", after, list(before)

    return convert


def _reverse(entry: dict[str, Any]) -> Row | None:
    word = entry["metadata"]["word"].lower()
    return (f"reverse {' '.join(word)}", " ".join(entry["answer"].lower()), list(word)) if word.isalpha() else None


def _caesar(low: int, high: int) -> Convert:
    """Six consecutive letters of the text; the wording gives the rotation to undo."""

    def convert(entry: dict[str, Any]) -> Row | None:
        meta = entry["metadata"]
        clear, cipher = (meta[k].replace(" ", "").lower() for k in ("clear_text", "cipher_text"))
        at = _pick(entry, max(1, len(clear) - 6))
        clear, cipher = clear[at : at + 6], cipher[at : at + 6]
        if len(clear) < 6 or not low <= meta["rotation"] <= high:
            return None
        return f"caesar {meta['rotation']} {' '.join(cipher)}", " ".join(clear), list(clear)

    return convert


def _turn(entry: dict[str, Any]) -> Row:
    meta = entry["metadata"]
    rows = ("".join(map(str, row)) for row in meta["matrix"])
    answer = "".join(str(n) for row in meta["solution"] for n in row)
    return f"turn {' '.join(rows)}", answer, [n for row in meta["matrix"] for n in row]


def _digits(count: int, low: int | None = None) -> dict[str, Any]:
    return {"min_numbers": low or count, "max_numbers": count, "min_value": 0, "max_value": 9,
            "min_decimals": 0, "max_decimals": 0}  # fmt: skip


def _terms(terms: int, low: int, high: int) -> dict[str, Any]:
    return {"min_terms": terms, "max_terms": terms, "min_digits": low, "max_digits": high}


def _base(high: int, bases: int, low: int = 2) -> dict[str, Any]:
    return {"min_base": 2, "max_base": bases, "min_value": low, "max_value": high}


ARITHMETIC, NUMBERS, SYMBOLS = "arithmetic", "number_theory", "symbols"
_TEXT = {"min_words": 2, "max_words": 40}
_ALL = (
    Kind("add1", ARITHMETIC, "chain_sum", _chain, 5, _terms(2, 1, 1)),
    Kind("add2", ARITHMETIC, "chain_sum", _chain, 14, _terms(2, 2, 2)),
    Kind("sum3", ARITHMETIC, "chain_sum", _chain, 3, _terms(3, 1, 2)),
    Kind("sum4", ARITHMETIC, "chain_sum", _chain, 1, _terms(4, 1, 2)),
    Kind("sum3big", ARITHMETIC, "chain_sum", _chain, 0.7, _terms(3, 3, 3)),
    Kind("add3", ARITHMETIC, "chain_sum", _chain, 1.5, _terms(2, 3, 3)),
    Kind("mul", ARITHMETIC, "products", _chain, 4, _terms(2, 1, 1)),
    Kind("muladd", ARITHMETIC, "products", _product_and_term, 2, _terms(2, 1, 1)),
    Kind("gcd", NUMBERS, "gcd", _gcd, 8, {"min_value": 2, "max_value": 99}),
    Kind("gcd3", NUMBERS, "gcd", _gcd, 1.5,
         {"min_numbers": 3, "max_numbers": 3, "min_value": 2, "max_value": 99}),
    Kind("lcm", NUMBERS, "lcm", _lcm, 1, {"min_value": 2, "max_value": 30}),
    Kind("mod", NUMBERS, "base_conversion", _remainder, 8, _base(99, 12)),
    Kind("mod3", NUMBERS, "base_conversion", _remainder, 1.5, _base(999, 12, 100)),
    Kind("summod", NUMBERS, "chain_sum", _sum_remainder, 2.5, _terms(2, 2, 2)),
    Kind("simplify", NUMBERS, "fraction_simplification", _simplify, 2,
         {"min_value": 1, "max_value": 50, "min_factor": 2, "max_factor": 12, "styles": ("plain",)}),
    Kind("base", NUMBERS, "base_conversion", _to_base, 1, _base(99, 12)),
    Kind("factor", NUMBERS, "prime_factorization", _factors, 1, {"min_value": 2, "max_value": 199}),
    Kind("sort", SYMBOLS, "number_sorting", _sort("sort", "ascending", ""), 7, _digits(7, 4)),
    Kind("sortdown", SYMBOLS, "number_sorting", _sort("sort down", "descending", ""), 1.5, _digits(7)),
    Kind("sortnum", SYMBOLS, "number_sorting", _sort("sort down", "descending", ","), 1,
         {**_digits(4), "max_value": 99}),
    Kind("drop", SYMBOLS, "number_filtering", _filter("remove_smaller", "drop <"), 5, _digits(8, 5)),
    Kind("keep", SYMBOLS, "number_filtering", _filter("keep_larger", "keep >"), 1.5, _digits(8, 7)),
    Kind("reverse", SYMBOLS, "spell_backward", _reverse, 4, {"min_word_len": 3, "max_word_len": 7}),
    Kind("caesar", SYMBOLS, "caesar_cipher", _caesar(1, 3), 5, {**_TEXT, "max_rotation": 3}),
    Kind("caesar7", SYMBOLS, "caesar_cipher", _caesar(7, 7), 1,
         {**_TEXT, "min_rotation": 7, "max_rotation": 7}),
    Kind("caesar_any", SYMBOLS, "caesar_cipher", _caesar(4, 25), 1, {**_TEXT, "min_rotation": 4}),
    Kind("turn", SYMBOLS, "rotate_matrix", _turn, 1,
         {"min_n": 3, "max_n": 3, "min_rotations": 1, "max_rotations": 1}),
    # at the end, since a kind's seeds follow from its place; the pre-training has not seen these
    Kind("sortlong", SYMBOLS, "number_sorting", _sort("sort down", "descending", ","), 0,
         {**_digits(6), "max_value": 99}),
    Kind("gcdadd", NUMBERS, "gcd", _gcd_and_term, 0, {"min_value": 2, "max_value": 99}),
    Kind("sortbig", SYMBOLS, "number_sorting", _sort("sort down", "descending", ","), 0,
         {**_digits(4), "min_value": 100, "max_value": 999}),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _ALL}

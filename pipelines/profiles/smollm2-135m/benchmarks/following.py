"""Whether an answer follows instructions that can be checked: a rule is a name with numbers or words.

The rules from `unique_words` on are worded as IFBench has them (Pyatkin et al. 2025) and checked by their words; an
answer counts if it follows every rule of its item. Used by lm-eval as `!function following.score`, and by
`make_instruction.py` to check the answers that are trained on.
"""

import re
import string
from collections import Counter
from itertools import pairwise

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_VOWELS = "aeiou"
_PRIMES = {2, 3, 5, 7, 11, 13, 17, 19, 23, 29}


def _bare(text: str) -> list[str]:
    return text.lower().translate(_PUNCTUATION).split()


def _nested(text: str, depth: int) -> bool:
    pairs, opened, deepest = {")": "(", "]": "[", "}": "{"}, [], 0
    for sign in text:
        if sign in "([{":
            opened.append(sign)
            deepest = max(deepest, len(opened))
        elif sign in pairs:
            if not opened or opened.pop() != pairs[sign]:
                opened, deepest = [], 0
            elif deepest >= depth:
                return True
    return False


def _next_letter(one: str, other: str) -> bool:
    letters = string.ascii_lowercase
    return one[0] in letters and other[0] == letters[(letters.index(one[0]) + 1) % 26]


def _indents(text: str) -> list[int]:
    return [len(line) - len(line.lstrip(" ")) for line in text.split("\n") if line.strip()]


RULES = {
    "sentences": lambda text, n: len(re.findall(r"[.!?](?=[\s\"]|$)", text)) == n,
    "words": lambda text, least, most: least <= len(text.split()) <= most,
    "keyword": lambda text, word, n: _bare(text).count(word) == n,
    "lowercase": lambda text: text == text.lower(),
    "uppercase": lambda text: text == text.upper(),
    "title_case": lambda text: all(word[:1] == word[:1].upper() for word in text.split()),
    "no_comma": lambda text: "," not in text,
    "bullets": lambda text, n: len(re.findall(r"^\* ", text, re.MULTILINE)) == n,
    "end": lambda text, phrase: text.rstrip('" \n').lower().endswith(phrase.lower()),
    "quoted": lambda text: len(text) > 2 and text[0] == text[-1] == '"',
    "first": lambda text, word: _bare(text)[:1] == [word],
    "numbers": lambda text, n: len(re.findall(r"\d+", text.translate(_PUNCTUATION))) == n,
    "unique_words": lambda text, n: len({word.strip(string.punctuation) for word in text.lower().split()}) >= n,
    "repeats": lambda text, n: max(Counter(_bare(text)).values(), default=0) <= n,
    "alphabet": lambda text: bool(_bare(text)) and all(_next_letter(*pair) for pair in pairwise(_bare(text))),
    "three_vowels": lambda text: "\n" not in text.strip() and len({one for one in text.lower() if one in _VOWELS}) <= 3,
    "consonants": lambda text: all(re.search(r"[b-df-hj-np-tv-z]{2}", word) for word in text.lower().split()),
    "palindromes": lambda text, n: sum(word == word[::-1] and len(word) >= 5 for word in _bare(text)) >= n,
    "nested": _nested,
    "prime_lengths": lambda text: all(len(word) in _PRIMES for word in text.translate(_PUNCTUATION).split()),
    "no_consecutive": lambda text: all(one[0] != other[0] for one, other in pairwise(_bare(text))),
    "stairs": lambda text: all(one < other for one, other in pairwise(_indents(text))),
    "no_whitespace": lambda text: not re.search(r"\s", text),
    "counts": lambda text, *pairs: all(text.lower().count(word.lower()) == n for word, n in pairs),
}


def follows(text: str, rules: list) -> bool:
    """Whether a text follows every rule, `[name, value, …]` each; an empty one follows none."""
    return bool(text.strip()) and all(RULES[name](text.strip(), *values) for name, *values in rules)


def score(item: dict, answers: list[str]) -> dict:
    """What lm-eval asks for: the outcome of one item."""
    return {"followed": float(follows(answers[0], item["rules"]))}

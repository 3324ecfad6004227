"""What must not stand in the training data: the benchmarks' questions, and the same conversation twice.

Three tests against the benchmarks. A user turn that equals a question (after normalising case, width and
spaces) always counts, and so does a text that holds a whole question of eight words or more, however many
rows do. Longer texts also count when they share runs of 13 consecutive words with a question, the collision
rule of Brown et al. 2020 ("Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C; 8 is the least
length of theirs), which also passes over 13-grams found in more than ten training documents: those are
phrasing that tasks share, not copied items. Where rows and benchmark come from the same templates, one such run
says little: the share of the question's words that these runs must make up tells a copied item from another one.
"""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mft_core.data.row_files import read_json_lines
from mft_core.data.rows import Conversation, counted
from mft_core.errors import ConfigError

NGRAM_WORDS = 13
LEAST_WORDS = 8
"""of a question that is looked for within longer texts"""
COMMON_NGRAM_ROWS = 10
_QUESTION_FIELDS = ("question", "prompt", "problem", "instruction", "query", "input", "text")
_PUNCTUATION = ".,;:!?\"'()[]{}`*_"  # at the ends of words only; operators and signs carry meaning in sums


@dataclass(frozen=True)
class Cleaned:
    """Which rows may stay, and how many went for which reason."""

    kept: list[int]
    """positions in the rows given, ascending"""
    duplicates: int
    """conversations that had stood earlier in the mixture, word for word"""
    equal_questions: int
    """rows with a user turn that is a benchmark's question"""
    shared_ngrams: int
    """further rows that hold a benchmark's question, or share runs of 13 words with one"""


def normalise(text: str) -> str:
    """Return the text without differences of case, character width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def read_questions(benchmark: Path) -> list[str]:
    """Return the questions of a local benchmark, a JSONL file of items.

    Raises:
        ConfigError: no such file, or an item without a text in any of the usual fields.
    """
    questions = []
    for number, row in read_json_lines(benchmark):
        question = question_of(row)
        if question is None:
            raise ConfigError(
                f"{benchmark} line {number}: the benchmark item has no question, so training rows cannot be compared "
                f"with it. Valid: a text in one of the fields {', '.join(_QUESTION_FIELDS)}."
            )
        questions.append(question)
    return questions


def question_of(row: object) -> str | None:
    """Return an item's question by the fields that benchmarks use; an instruction goes with its input."""
    if not isinstance(row, dict):
        return None
    texts = {name: row[name] for name in _QUESTION_FIELDS if isinstance(row.get(name), str)}
    name = next(iter(texts), None)
    if name == "instruction" and texts.get("input", "").strip():
        return f"{texts['instruction']}\n\n{texts['input']}"
    return texts[name] if name else None


def has_runs(questions: Iterable[str]) -> bool:
    """Whether any question is long enough to share a run of 13 words with a row."""
    return any(len(_words(normalise(question))) >= NGRAM_WORDS for question in questions)


def clean(
    rows: Sequence[Conversation],
    questions: Iterable[str],
    share: float = 0.0,
    report: Callable[[int], None] = lambda rows: None,
) -> Cleaned:
    """Find the rows that repeat an earlier row or overlap with a benchmark.

    Args:
        rows: the sampled mixture, in order; of equal conversations the first stays.
        questions: the benchmarks' questions; may be empty.
        share: of a question's words, that shared runs of 13 words must make up for a row to go; 0: one run is enough.
        report: receives the number of rows compared so far, now and then.
    """
    known = sorted({normalise(question) for question in questions})
    wholes = _by_beginning(known)
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, question in enumerate(known):
        for start, gram in enumerate(_ngrams(_words(question), NGRAM_WORDS)):
            places[gram].append((number, start))
    lengths = [len(_words(question)) for question in known]
    digests = np.fromiter(map(_digest, rows), "S16", len(rows))
    distinct = sorted(np.unique(digests, return_index=True)[1].tolist())  # of equal ones the index of the first

    asked = set(known)
    sharing: dict[str, list[int]] = defaultdict(list)
    equal: set[int] = set()
    copied: set[int] = set()
    for index in counted(distinct if asked else (), report):
        row = rows[index]
        if any(normalise(message.content) in asked for message in row if message.role == "user"):
            equal.add(index)
        elif wholes:
            texts = [_words(normalise(message.content)) for message in row]
            if any(_holds(text, wholes) for text in texts):
                copied.add(index)
                continue
            for gram in places.keys() & {gram for text in texts for gram in _ngrams(text, NGRAM_WORDS)}:
                if len(sharing[gram]) <= COMMON_NGRAM_ROWS:
                    sharing[gram].append(index)
    covered: dict[tuple[int, int], set[int]] = defaultdict(set)
    for gram, indices in sharing.items():
        if len(indices) <= COMMON_NGRAM_ROWS:
            for index, (number, start) in itertools.product(indices, places[gram]):
                covered[index, number].update(range(start, start + NGRAM_WORDS))
    copied.update(index for (index, number), words in covered.items() if len(words) >= share * lengths[number])
    return Cleaned(
        kept=[index for index in distinct if index not in equal and index not in copied],
        duplicates=len(rows) - len(distinct),
        equal_questions=len(equal),
        shared_ngrams=len(copied),
    )


def _digest(row: Conversation) -> bytes:
    return hashlib.blake2b(repr(row).encode(errors="surrogatepass"), digest_size=16).digest()


def _by_beginning(questions: Iterable[str]) -> dict[str, list[list[str]]]:
    """Return the words of each question that is long enough to be looked for, by its first words."""
    found: dict[str, list[list[str]]] = {}
    for words in map(_words, questions):
        for beginning in _ngrams(words, LEAST_WORDS)[:1]:
            found.setdefault(beginning, []).append(words)
    return found


def _holds(text: list[str], wholes: dict[str, list[list[str]]]) -> bool:
    """Say whether a text holds one of the questions as a whole."""
    return any(
        text[start : start + len(whole)] == whole
        for start, gram in enumerate(_ngrams(text, LEAST_WORDS))
        for whole in wholes.get(gram, ())
    )


def _ngrams(words: list[str], length: int) -> list[str]:
    """Return the runs of so many words, in order; none if there are fewer."""
    return [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)]


def _words(text: str) -> list[str]:
    """Return the words of a normalised text."""
    return [word for word in (raw.strip(_PUNCTUATION) for raw in text.split()) if word]

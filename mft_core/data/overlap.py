"""What must not stand in the training data: the benchmarks' questions, and the same conversation twice.

Two tests against the benchmarks. A user turn that equals a question (after normalising case, width and
spaces) always counts. Longer texts also count when they share 13 consecutive words with a question, the
collision rule of Brown et al. 2020 ("Language Models are Few-Shot Learners", arXiv 2005.14165, appendix
C), which also passes over 13-grams found in more than ten training documents: those are phrasing that
tasks share, not copied items.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mft_core.data.rows import Conversation, read_json_lines
from mft_core.errors import ConfigError

NGRAM_WORDS = 13
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
    """further rows that share 13 consecutive words with a benchmark's question"""


def normalise(text: str) -> str:
    """Return the text without differences of case, character width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def read_questions(benchmark: Path) -> list[str]:
    """Return the questions of a local benchmark, a JSONL file of items.

    Raises:
        ConfigError: no such file, or an item without a text in any of the usual fields.
    """
    return [_question(row, f"{benchmark} line {number}") for number, row in read_json_lines(benchmark)]


def _question(row: object, where: str) -> str:
    if isinstance(row, dict):
        for field in _QUESTION_FIELDS:
            if isinstance(question := row.get(field), str):
                return question
    raise ConfigError(
        f"{where}: the benchmark item has no question, so training rows cannot be compared with it. "
        f"Valid: a text in one of the fields {', '.join(_QUESTION_FIELDS)}."
    )


def clean(rows: Sequence[Conversation], questions: Iterable[str]) -> Cleaned:
    """Find the rows that repeat an earlier row or overlap with a benchmark.

    Args:
        rows: the sampled mixture, in order; of equal conversations the first stays.
        questions: the benchmarks' questions; may be empty.
    """
    known = {normalise(question) for question in questions}
    grams_of_questions = {gram for question in known for gram in _ngrams(question)}
    first_place: dict[Conversation, int] = {}
    for index, row in enumerate(rows):
        first_place.setdefault(row, index)
    distinct = list(first_place.values())

    collisions: dict[int, set[str]] = {}
    equal: set[int] = set()
    for index in distinct:
        users = [normalise(message.content) for message in rows[index] if message.role == "user"]
        if known.intersection(users):
            equal.add(index)
        elif grams_of_questions:
            texts = (normalise(message.content) for message in rows[index])
            shared = {gram for text in texts for gram in _ngrams(text)} & grams_of_questions
            if shared:
                collisions[index] = shared
    frequency = Counter(gram for shared in collisions.values() for gram in shared)
    copied = {
        index for index, shared in collisions.items() if any(frequency[gram] <= COMMON_NGRAM_ROWS for gram in shared)
    }
    return Cleaned(
        kept=[index for index in distinct if index not in equal and index not in copied],
        duplicates=len(rows) - len(distinct),
        equal_questions=len(equal),
        shared_ngrams=len(copied),
    )


def _ngrams(text: str) -> set[str]:
    """Return the runs of 13 words of a normalised text; none if it is shorter."""
    words = [word for word in (raw.strip(_PUNCTUATION) for raw in text.split()) if word]
    return {" ".join(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}

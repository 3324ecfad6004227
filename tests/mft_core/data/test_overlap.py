"""What is kept out of the training data."""

from __future__ import annotations

import json

import pytest

from mft_core.data.overlap import COMMON_NGRAM_ROWS, clean, has_runs, normalise, question_of, read_questions
from mft_core.data.rows import Message
from mft_core.errors import ConfigError

LONG = "A farmer has twelve sheep and buys thirty more, then sells seven of them at the market on Monday."


def row(user, answer="a"):
    return (Message("user", user), Message("assistant", answer))


def test_the_same_conversation_twice_is_kept_once_and_counted():
    cleaned = clean([row("1+1", "2"), row("1+2", "3"), row("1+1", "2"), row("1+1", "two")], [])
    assert cleaned.kept == [0, 1, 3]
    assert cleaned.duplicates == 1


def test_a_row_that_asks_a_benchmarks_question_goes_whatever_its_case_and_spaces():
    rows = [row("What is  7 + 5 ?"), row("What is 7 - 5 ?"), row("WHAT IS 7 + 5 ?\n"), row("What is 7 + 55 ?")]
    cleaned = clean(rows, ["what is 7 + 5 ?"])
    assert cleaned.kept == [1, 3]
    assert cleaned.equal_questions == 2


def test_a_question_asked_in_a_later_turn_counts_too_but_the_assistants_words_do_not():
    later = (Message("user", "Hello"), Message("assistant", "Yes?"), *row("7+5", "12"))
    assert clean([later], ["7+5"]).kept == []
    assert clean([row("Hello", "7+5")], ["7+5"]).kept == [0]


def test_a_long_text_that_shares_thirteen_words_with_a_question_goes():
    words = LONG.split()
    thirteen, twelve = " ".join(words[2:15]), " ".join(words[2:14])
    rows = [row(f"So: {thirteen.upper()}! Right?"), row(f"So: {twelve}! Right?"), row("x", f"I quote: {thirteen}")]
    cleaned = clean(rows, [LONG])
    assert cleaned.kept == [1]
    assert cleaned.shared_ngrams == 2
    assert cleaned.equal_questions == 0


def test_phrasing_that_more_than_ten_rows_share_is_no_copy():
    template = "Sort these numbers in ascending order and answer with nothing but the sorted list please: {}"
    many = [row(template.format(i)) for i in range(COMMON_NGRAM_ROWS + 1)]
    assert clean(many, [template.format("99 3")]).shared_ngrams == 0
    assert clean(many[:-1], [template.format("99 3")]).shared_ngrams == COMMON_NGRAM_ROWS


def test_normalising_keeps_what_carries_meaning():
    assert normalise(" Straße\tＡ1\n+ -2 ") == "strasse a1 + -2"
    assert normalise("3-4") != normalise("3+4")


def test_questions_are_read_from_the_fields_that_benchmarks_use(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n" + json.dumps({"prompt": "def f():"}) + "\n")
    assert read_questions(path) == ["1+1", "def f():"]


@pytest.mark.parametrize(
    ("item", "said"),
    [({"answer": "2"}, ".*question.*prompt"), ({"question": 3}, ".*question.*prompt"), (["x"], "a JSON array")],
)
def test_an_item_without_a_question_is_named(tmp_path, item, said):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"question": "1+1"}) + "\n" + json.dumps(item) + "\n")
    with pytest.raises(ConfigError, match=rf"items\.jsonl line 2: {said}"):
        read_questions(path)


def test_a_whole_question_goes_however_often_it_comes_and_whatever_is_answered():
    many = [row(f"Solve it step by step.\n{LONG}", f"way {i}") for i in range(COMMON_NGRAM_ROWS + 3)]
    assert clean(many, [LONG]).kept == []
    eight = "How many sheep has the farmer now, exactly?"
    assert clean([row(f"Now then: {eight.lower()} Think.", str(i)) for i in range(20)], [eight]).kept == []
    seven = "How many sheep has the farmer now?"
    assert clean([row(f"Now then: {seven} Think.")], [seven]).kept == [0], "too short to be looked for within a text"


def test_an_instruction_is_a_question_together_with_its_input():
    assert question_of({"instruction": "Sum up.", "input": "A text.", "output": "x"}) == "Sum up.\n\nA text."
    assert question_of({"instruction": "Sum up.", "input": " "}) == "Sum up."
    assert question_of({"question": "Which?", "input": "A text."}) == "Which?"
    assert question_of({"ticket": "x"}) is None


def test_with_a_share_set_one_shared_run_of_words_is_not_enough_but_most_of_a_question_is():
    words = LONG.split()
    thirteen, most = " ".join(words[2:15]), " ".join(["Once", *words[1:]])
    rows = [row(thirteen), row(most), row(LONG), row(f"So: {LONG} Right?")]
    cleaned = clean(rows, [LONG], share=0.8)
    assert cleaned.kept == [0]
    assert (cleaned.equal_questions, cleaned.shared_ngrams) == (1, 2)
    assert clean(rows, [LONG], share=0.0).kept == []
    assert clean(rows[:1], [LONG], share=13 / len(words)).kept == []
    assert clean(rows[:1], [LONG], share=14 / len(words)).kept == [0]


def test_a_templated_corpus_is_not_eaten_by_items_of_its_own_templates_with_other_numbers():
    story = "{} has {} sheep on the farm by the river, buys {} more at the market, then sells {} on Monday to {}."
    rows = [row(story.format(f"Name{i}", i, 2 * i, 3 * i, f"Buyer{i}")) for i in range(100, 108)]
    item = story.format("Name1000", 7, 9, 11, "Buyer1000")
    copied = item.replace("on Monday", "on Tuesday")
    assert clean(rows, [item], share=0.8).kept == list(range(8))
    assert clean([*rows, row(item), row(copied)], [item], share=0.8).kept == list(range(8))


def test_only_questions_of_thirteen_words_can_share_a_run():
    words = LONG.split()
    assert has_runs(["1 + 1", " ".join(words[:13])])
    assert not has_runs(["1 + 1", " ".join(words[:12])])

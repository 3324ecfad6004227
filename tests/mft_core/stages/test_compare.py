"""The stage `compare` on made-up evaluations: which rows, which family, and that the table never shows a bare gain."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from mft_core.errors import StageError
from mft_core.recipes import Compare, Runtime
from mft_core.stage import StageContext
from mft_core.stages import get_stage
from mft_core.statistics.power import items_needed
from mft_core.statistics.tables import pooled

N = 200
COLUMNS = (
    "variant", "method", "domain", "layers", "modules", "sparsity", "seed", "benchmark", "metric", "n", "accuracy",
    "baseline", "gain", "gain_low", "gain_high", "p_value", "p_holm",
)  # fmt: skip


class Study:
    """Made-up evaluations, described as the pipeline describes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variants: list[dict[str, Any]] = []
        self.inputs: dict[str, Path] = {}

    def add(
        self, outcomes: np.ndarray, method: str, benchmark: str = "gcd", higher_is_better: bool = True, **columns: Any
    ) -> int:
        """Add one evaluation and return its index."""
        index = len(self.variants)
        directory = self.folder / f"eval-{index}"
        directory.mkdir(parents=True)
        items = [{"item": f"{benchmark}/{i}", "outcome": int(value)} for i, value in enumerate(outcomes)]
        (directory / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        summary = {"metric": "exact_match", "commonest_target_share": 0.125}
        summary |= {} if higher_is_better else {"higher_is_better": False}
        (directory / "summary.json").write_text(json.dumps(summary))
        described = {"variant": method, "method": method, "domain": "maths", "benchmark": benchmark}
        empty = dict.fromkeys(("layers", "modules", "sparsity", "seed", "baseline"))
        self.variants.append({**empty, **described, **columns})
        self.inputs[f"eval-{index}"] = directory
        return index

    def compare(self, out: Path, question: str = "Does it help?") -> list[dict[str, Any]]:
        """Run the stage and return its rows."""
        out.mkdir()
        recipe = Compare(question=question, variants=tuple(self.variants), bootstrap=500)
        self.summary = get_stage("compare").run(recipe, self.inputs, out, StageContext(Runtime(), out))
        return json.loads((out / "rows.json").read_text())


def changed(outcomes: np.ndarray, won: int, lost: int, seed: int = 0) -> np.ndarray:
    """Return outcomes with so many wrong ones made right, and right ones made wrong."""
    rng = np.random.default_rng(seed)
    new = outcomes.copy()
    new[rng.choice(np.flatnonzero(outcomes == 0), won, replace=False)] = 1
    new[rng.choice(np.flatnonzero(outcomes == 1), lost, replace=False)] = 0
    return new


def mask(sparsity: float, seed: int | None = None, method: str = "mft") -> dict[str, Any]:
    """Return the columns of a masked variant."""
    name = f"{method} sparsity={sparsity:g} layers=2-5" + ("" if seed is None else f" seed={seed}")
    return {"variant": name, "layers": "2-5", "modules": "both", "sparsity": sparsity, "seed": seed}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Base, FFT, continued FFT, two sparsities with two seeds each, and a control, on two benchmarks."""
    made = Study(tmp_path / "evaluations")
    for bench in ("gcd", "sums"):
        fft = np.repeat([1, 0], [120, 80])
        base = len(made.variants)
        made.add(changed(fft, 5, 60), "base", bench, baseline=base + 1)
        made.add(fft, "fft", bench)
        made.add(changed(fft, 8, 5), "continued-fft", bench, seed=0, baseline=base + 1)
        for seed in (0, 1):
            made.add(changed(fft, 30, 2, seed), "mft", bench, **mask(0.1, seed), baseline=base + 1)
            made.add(changed(fft, 10, 9, seed), "mft", bench, **mask(0.2, seed), baseline=base + 1)
        made.add(changed(fft, 0, 30), "magnitude", bench, **mask(0.1, method="magnitude"), baseline=base + 1)
    return made


def test_every_evaluation_has_a_row_and_seeds_have_a_pooled_one_beside(study: Study, tmp_path: Path):
    rows = study.compare(tmp_path / "out")
    assert all(set(COLUMNS) <= set(row) for row in rows)
    assert len([row for row in rows if row["seed"] != "all"]) == len(study.variants)
    together = [row for row in rows if row["seed"] == "all"]
    assert [(row["variant"], row["benchmark"], row["seeds"]) for row in together] == [
        (f"mft sparsity={sparsity} layers=2-5", bench, 2) for bench in ("gcd", "sums") for sparsity in (0.1, 0.2)
    ]
    first = together[0]
    assert (first["baseline"], first["accuracy"]) == (pytest.approx(0.6), pytest.approx(0.74))
    assert first["gain"] == pytest.approx(28 / N)
    assert first["gain_low"] < first["gain"] < first["gain_high"]
    assert (first["wins"], first["losses"], first["verdict"]) == (60, 4, "better")


def test_the_family_is_one_test_per_variant_and_benchmark_without_the_base(study: Study, tmp_path: Path):
    rows = study.compare(tmp_path / "out")
    family = [row for row in rows if row["family"] == "study"]
    assert {(row["method"], row["seed"]) for row in family} == {
        ("continued-fft", 0),
        ("mft", "all"),
        ("magnitude", None),
    }
    assert len(family) == 2 * 4
    expected = multipletests([row["p_value"] for row in family], method="holm")[1]
    assert [row["p_holm"] for row in family] == pytest.approx(list(expected))
    seeds = [row for row in rows if row["family"] == "seed"]
    assert [row["p_holm"] for row in seeds] == pytest.approx(
        list(multipletests([row["p_value"] for row in seeds], method="holm")[1])
    )
    base = next(row for row in rows if row["method"] == "base")
    assert base["gain"] < 0
    assert base["p_holm"] is None
    fft = next(row for row in rows if row["method"] == "fft")
    assert fft["gain"] is fft["p_value"] is fft["verdict"] is None
    assert study.summary == {"tests": 8, "better": 2, "worse": 2, "indistinguishable": 4}


def test_the_table_shows_no_gain_without_its_interval_and_what_it_means(study: Study, tmp_path: Path):
    rows = study.compare(tmp_path / "out", question="Does it help?")
    table = (tmp_path / "out" / "table.md").read_text()
    gains = re.findall(r"\([+-][^)]*\)", table)
    assert len(gains) == len([row for row in rows if row["gain"] is not None])
    pattern = r"\([+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\] (better|worse|noise|identical)\)"
    assert all(re.fullmatch(pattern, gain) for gain in gains)
    assert table.startswith("## Does it help?")
    assert "*noise*: not distinguishable from noise" in table
    assert "- MFT: of 4 gains 2 better, 0 worse, 2 not distinguishable from noise." in table
    line = next(line for line in table.splitlines() if line.startswith("| MFT | 10%"))
    assert line.startswith("| MFT | 10% | 2 | 74.0 (+14.0 [")
    assert "| always the commonest answer |  |  | 12.5 | 12.5 |" in table


def test_the_best_of_each_sweep_stands_under_the_table_and_in_a_file(study: Study, tmp_path: Path):
    study.compare(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "winners.json").read_text())
    assert [(row["method"], row["benchmark"], row["candidates"], row["sparsity"]) for row in found] == [
        ("mft", "gcd", 2, 0.1), ("mft", "sums", 2, 0.1), ("mft", "mean", 2, 0.1),
    ]  # fmt: skip
    table = (tmp_path / "out" / "table.md").read_text()
    section = table[table.index("### The best of each sweep") : table.index("### How many items would show it")]
    lines = [line for line in section.splitlines() if line.startswith("| MFT")]
    assert [line.split(" | ")[1] for line in lines] == [
        "gcd (n = 100 + 100)",
        "sums (n = 100 + 100)",
        "mean (n = 200 + 200)",
    ]
    gain = r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\] (better|worse|noise|identical)"
    assert all(re.search(rf"\| sparsity 10% \(of 2\) \| [+-]\d+\.\d \| {gain} \|", line) for line in lines)


def test_a_study_that_varies_nothing_has_no_winner(tmp_path: Path):
    study = Study(tmp_path / "evaluations")
    fft = np.repeat([1, 0], [120, 80])
    study.add(fft, "fft")
    study.add(changed(fft, 30, 2), "mft", **mask(0.1, seed=0), baseline=0)
    study.compare(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "winners.json").read_text()) == []
    assert "best of each sweep" not in (tmp_path / "out" / "table.md").read_text()
    assert "How many items" not in (tmp_path / "out" / "table.md").read_text(), "the only gain is shown"


def test_what_is_noise_has_the_number_of_items_that_would_show_it(study: Study, tmp_path: Path):
    rows = study.compare(tmp_path / "out")
    continued = next(row for row in rows if (row["method"], row["benchmark"]) == ("continued-fft", "gcd"))
    assert continued["items_for_80_power"] == items_needed(np.repeat([1.0, -1.0, 0.0], [8, 5, 187])[None]) > 1_000
    assert all((row["items_for_80_power"] is None) == (not row["gain"]) for row in rows)
    table = (tmp_path / "out" / "table.md").read_text()
    section = table[table.index("### How many items would show it") : table.index("### Each seed apart")]
    needed = f"{round(continued['items_for_80_power'], -1):,}"
    assert f"| continued FFT | - | 1 | {needed} | {needed} |" in section
    assert "| MFT | 10%" not in section


def test_a_method_of_few_trainings_has_the_noise_of_the_studys(tmp_path: Path):
    study = Study(tmp_path / "evaluations")
    fft = np.repeat([1, 0], [120, 80])
    study.add(fft, "fft")
    for seed in (0, 1):
        alike = changed(fft, 9, 2, seed)  # two trainings as good as each other, which says little
        study.add(alike, "continued-fft", seed=seed, baseline=0, variant=f"continued-fft seed={seed}")
        for sparsity in (0.1, 0.2, 0.3, 0.4):
            apart = changed(fft, int(50 * sparsity) + 12 * seed, 5, seed)
            study.add(apart, "mft", **mask(sparsity, seed), baseline=0)
    several = [row for row in study.compare(tmp_path / "out") if row["seed"] == "all"]
    assert [row["method"] for row in several] == ["continued-fft"] + ["mft"] * 4
    assert all(row["seed_sd"] > 0.01 for row in several)


def test_the_same_evaluations_give_the_same_bytes(study: Study, tmp_path: Path):
    study.compare(tmp_path / "one")
    study.compare(tmp_path / "two")
    files = ("rows.json", "winners.json", "table.md", "figure.png")
    assert [(tmp_path / "one" / f).read_bytes() for f in files] == [(tmp_path / "two" / f).read_bytes() for f in files]
    figure = (tmp_path / "one" / "figure.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert b"Software" not in figure


def test_one_seed_is_its_own_pooled_row(tmp_path: Path):
    study = Study(tmp_path / "evaluations")
    fft = np.repeat([1, 0], [120, 80])
    study.add(fft, "fft")
    study.add(changed(fft, 9, 2), "mft", **mask(0.1, seed=7), baseline=0)
    rows = study.compare(tmp_path / "out")
    assert [(row["seed"], row["family"]) for row in rows] == [(None, None), (7, "study")]
    assert pooled(rows) == rows
    assert "Each seed apart" not in (tmp_path / "out" / "table.md").read_text()


def test_layers_are_told_apart_where_the_study_varies_them(tmp_path: Path):
    study = Study(tmp_path / "evaluations")
    fft = np.repeat([1, 0], [120, 80])
    study.add(fft, "fft")
    for layers in ("0-3", "4-7"):
        columns = {**mask(0.1, seed=0), "layers": layers, "variant": f"mft layers={layers} seed=0"}
        study.add(changed(fft, 9, 2), "mft", **columns, baseline=0)
    study.compare(tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| method | layers | sparsity | seed | gcd (n = 200) |" in table
    assert "| MFT | 4-7 | 10% | 0 |" in table


def test_a_study_without_masks_has_a_table_and_a_figure_too(tmp_path: Path):
    study = Study(tmp_path / "evaluations")
    fft = np.repeat([1, 0], [120, 80])
    study.add(fft, "fft")
    study.add(changed(fft, 9, 2), "continued-fft", seed=0, baseline=0)
    study.compare(tmp_path / "out")
    assert "continued FFT" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "figure.png").stat().st_size > 1_000


def test_evaluations_of_different_items_are_refused_naming_both(study: Study, tmp_path: Path):
    path = study.inputs["eval-3"] / "items.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(StageError, match=r"'mft sparsity=0.1 .* seed=0' and its baseline 'fft'.*200 against 199"):
        study.compare(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_two_evaluations_described_alike_are_refused(study: Study, tmp_path: Path):
    study.variants[5] = dict(study.variants[3])
    with pytest.raises(StageError, match=r"described alike: mft sparsity=0.1 layers=2-5 seed=0"):
        study.compare(tmp_path / "out")


def test_responses_may_hold_any_line_separator_of_unicode(study: Study, tmp_path: Path) -> None:
    expected = study.compare(tmp_path / "plain")
    for directory in study.inputs.values():
        path = directory / "items.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        text = "".join(
            json.dumps({**row, "response": "a\u2028b\u2029c\u0085d"}, ensure_ascii=False) + "\n" for row in rows
        )
        path.write_text(text, encoding="utf-8")
    assert study.compare(tmp_path / "separated") == expected


@pytest.mark.parametrize("items", [1, 2, 3])
def test_a_quick_look_at_a_few_items_has_a_table_too(items: int, tmp_path: Path) -> None:
    study = Study(tmp_path / "evaluations")
    study.add(np.zeros(items, dtype=int), "fft")
    for seed in (0, 1):
        for sparsity in (0.1, 0.2):
            answers = np.arange(items) % 2 == seed if sparsity == 0.1 else np.ones(items, dtype=int)
            study.add(answers, "mft", **mask(sparsity, seed), baseline=0)
    rows = study.compare(tmp_path / "out")
    assert all(row["verdict"] in (None, "not distinguishable from noise", "identical") for row in rows)
    assert len(json.loads((tmp_path / "out" / "winners.json").read_text())) == (items > 1)


def test_where_less_is_better_a_rate_that_falls_is_a_gain(tmp_path: Path):
    study = Study(tmp_path)
    bad = np.repeat([1, 0], N // 2)
    fft = study.add(bad, "fft", higher_is_better=False, baseline=None)
    study.add(np.ones(N), "base", higher_is_better=False, baseline=fft)
    study.add(changed(bad, 0, 60), "mft", higher_is_better=False, sparsity=0.1, baseline=fft)
    rows = {row["method"]: row for row in study.compare(tmp_path / "out")}
    assert (rows["mft"]["verdict"], rows["base"]["verdict"]) == ("better", "worse")
    assert rows["mft"]["gain"] == pytest.approx(0.3)
    assert rows["mft"]["gain_low"] > 0 > rows["base"]["gain_high"]
    assert (rows["mft"]["accuracy"], rows["mft"]["wins"], rows["mft"]["losses"]) == (0.2, 60, 0)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "gcd (n = 200, less is better)" in table
    assert "20.0 (+30.0 [" in table
    assert "the points by which the number fell" in table


def test_where_more_is_better_nothing_is_said_of_it(tmp_path: Path):
    study = Study(tmp_path)
    fft = study.add(np.repeat([1, 0], N // 2), "fft")
    study.add(np.ones(N), "mft", sparsity=0.1, baseline=fft)
    assert all("higher_is_better" not in row for row in study.compare(tmp_path / "out"))
    assert "less is better" not in (tmp_path / "out" / "table.md").read_text()

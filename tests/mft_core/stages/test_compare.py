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
from mft_core.statistics.effects import Stratum, estimate, unit_variance
from mft_core.statistics.tables import pooled, without_seed

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

    def compare(self, out: Path, question: str = "Does it help?", **asked: Any) -> list[dict[str, Any]]:
        """Run the stage and return its rows; `contrasts` holds those."""
        out.mkdir()
        recipe = Compare(question=question, variants=tuple(self.variants), **asked)
        self.summary = get_stage("compare").run(recipe, self.inputs, out, StageContext(Runtime(), out))
        self.contrasts = json.loads((out / "contrasts.json").read_text())
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
    alone = [row for row in rows if row["benchmark"] != "mean"]
    assert len([row for row in alone if row["seed"] != "all"]) == len(study.variants)
    together = sorted((row for row in alone if row["seed"] == "all"), key=lambda row: row["benchmark"])
    assert [(row["variant"], row["benchmark"], row["seeds"]) for row in together] == [
        (f"mft sparsity={sparsity} layers=2-5", bench, 2) for bench in ("gcd", "sums") for sparsity in (0.1, 0.2)
    ]
    first = together[0]
    assert (first["baseline"], first["accuracy"]) == (pytest.approx(0.6), pytest.approx(0.74))
    assert first["gain"] == pytest.approx(28 / N)
    assert first["gain_low"] < first["gain"] < first["gain_high"]
    assert (first["wins"], first["losses"], first["verdict"]) == (60, 4, "better")


def test_every_variant_has_a_row_about_the_mean_over_its_benchmarks(study: Study, tmp_path: Path):
    rows = study.compare(tmp_path / "out")
    means = [row for row in rows if row["benchmark"] == "mean"]
    trainings = {(row["variant"], row["seed"]) for row in rows}
    assert sorted(((row["variant"], row["seed"]) for row in means), key=str) == sorted(trainings, key=str)
    for row in means:
        own = [one for one in rows if without_seed(one["variant"]) == without_seed(row["variant"])
               and (one["benchmark"], one["seed"]) != ("mean", row["seed"]) and one["seed"] == row["seed"]]  # fmt: skip
        assert (row["n"], len(own)) == (2 * N, 2)
        assert row["accuracy"] == pytest.approx(np.mean([one["accuracy"] for one in own]))
        if row["gain"] is not None:
            assert row["gain"] == pytest.approx(np.mean([one["gain"] for one in own]))
    header = (tmp_path / "out" / "table.md").read_text().splitlines()[2]
    assert header.endswith("| gcd (n = 200) | sums (n = 200) | mean (n = 400) |")


def test_what_no_contrast_declares_is_exploratory_without_the_base(study: Study, tmp_path: Path):
    rows = study.compare(tmp_path / "out")
    family = [row for row in rows if row["family"] == "exploratory"]
    assert {(row["method"], row["seed"]) for row in family} == {
        ("continued-fft", 0),
        ("mft", "all"),
        ("magnitude", None),
    }
    assert len(family) == 3 * 4
    for name in ("exploratory", "training"):
        own = [row for row in rows if row["family"] == name]
        expected = multipletests([row["p_value"] for row in own], method="fdr_bh")[1]
        assert [row["p_fdr"] for row in own] == pytest.approx(list(expected))
        assert {row["p_holm"] for row in own} == {None}
    base = next(row for row in rows if row["method"] == "base")
    assert base["gain"] < 0
    assert base["p_fdr"] is base["family"] is None
    fft = next(row for row in rows if row["method"] == "fft")
    assert fft["gain"] is fft["p_value"] is fft["verdict"] is None
    assert study.contrasts == []
    assert study.summary["tests"] == 12


def test_declared_contrasts_are_tested_on_the_mean_at_equal_sparsity(study: Study, tmp_path: Path):
    declared = ("mft sparsity=0.1 - fft", "mft - magnitude", "mft sparsity=0.1 - continued-fft")
    rows = study.compare(tmp_path / "out", contrasts=declared)
    primaries = [row for row in study.contrasts if row["family"] == "primary"]
    assert [row["contrast"] for row in primaries] == list(declared), "magnitude has a sparsity of 10% only"
    assert {row["benchmark"] for row in primaries} == {"mean"}
    expected = multipletests([row["p_value"] for row in primaries], method="holm")[1]
    assert [row["p_holm"] for row in primaries] == pytest.approx(list(expected))
    assert [row["verdict"] for row in primaries][1] == "better"
    gated = [row for row in study.contrasts if row["family"] == "gated"]
    assert [row["benchmark"] for row in gated] == ["gcd", "sums"] * 3
    own = next(
        row
        for row in rows
        if (row["method"], row["sparsity"], row["benchmark"], row["seed"]) == ("mft", 0.1, "mean", "all")
    )
    assert (own["family"], own["verdict"], own["p_holm"]) == (
        "primary",
        primaries[0]["verdict"],
        primaries[0]["p_holm"],
    )
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| mft - magnitude | primary | mean | +" in table


def test_what_a_contrast_names_on_both_sides_may_differ_and_all_else_is_equal(tmp_path: Path):
    study = Study(tmp_path / "in")
    fft = np.repeat([1, 0], [120, 80])
    for keep, right in (("last", fft), ("best", changed(fft, 30, 2))):
        study.add(right, "fft", **{"variant": f"fft keep={keep}", "fine_tune.keep": keep})
        study.add(changed(right, 12, 1), "mft", baseline=len(study.variants) - 1,
                  **mask(0.1, 0) | {"variant": f"mft sparsity=0.1 keep={keep}", "fine_tune.keep": keep})  # fmt: skip
    declared = ("fft keep=best - fft keep=last", "mft keep=last - fft")
    study.compare(tmp_path / "out", contrasts=declared)
    primaries = [row for row in study.contrasts if row["family"] == "primary"]
    assert [(row["contrast"], round(200 * row["gain"])) for row in primaries] == [(declared[0], 28), (declared[1], 11)]


def test_variants_that_are_added_change_no_primary_verdict(study: Study, tmp_path: Path):
    declared = ("mft sparsity=0.1 - fft", "mft sparsity=0.1 - continued-fft")
    study.compare(tmp_path / "few", contrasts=declared)
    before = study.contrasts
    for bench, fft in (("gcd", 1), ("sums", fft_of(study, "sums"))):
        for sparsity in (0.3, 0.4, 0.5):
            study.add(np.ones(N, dtype=int), "random", bench, **mask(sparsity, 0, "random"), baseline=fft)
    study.compare(tmp_path / "many", contrasts=declared)
    assert study.contrasts == before


def fft_of(study: Study, benchmark: str) -> int:
    return next(at for at, one in enumerate(study.variants) if (one["method"], one["benchmark"]) == ("fft", benchmark))


def test_a_contrast_that_the_study_lacks_is_refused(study: Study, tmp_path: Path):
    with pytest.raises(
        StageError, match="'mft - random': no two of these variants are so, and alike in all else: base"
    ):
        study.compare(tmp_path / "out", contrasts=("mft - random",))


def test_a_contrast_of_replicates_is_about_the_recipe_and_pairs_within_them(tmp_path: Path):
    study = Study(tmp_path / "in")
    differences = replicated(study, 5, seeds=2)
    study.compare(tmp_path / "out", contrasts=("mft - fft",))
    found = estimate([Stratum.of(differences)], "recipe")
    (row,) = [row for row in study.contrasts if row["family"] == "primary"]
    shown = row["gain"], row["gain_low"], row["gain_high"], row["p_value"]
    assert shown == pytest.approx((found.gain, found.low, found.high, found.p_value))
    assert row["detectable"] == pytest.approx(found.detectable)


def test_a_contrast_that_a_look_decided_stands_with_that_looks_fine_tunings(tmp_path: Path):
    study = Study(tmp_path / "in")
    differences = replicated(study, 5, gain=25)
    rows = study.compare(tmp_path / "out", contrasts=("mft - fft",), looks=(3, 5))
    (contrast,) = [row for row in study.contrasts if row["family"] == "primary"]
    assert (contrast["verdict"], contrast["replicates"]) == ("better", 3)
    assert contrast["confidence"] > 0.98
    assert contrast["gain"] == pytest.approx(differences[:3].mean())
    assert contrast["gain"] == pytest.approx(contrast["accuracy"] - contrast["baseline"])
    every = next(row for row in rows if row["method"] == "mft" and row["replicate"] == "all")
    assert every["gain"] == pytest.approx(differences.mean()), "a row of all fine-tunings is about all"


def test_several_treatments_of_the_same_fine_tunings_measure_these_once(tmp_path: Path):
    study = Study(tmp_path / "in")
    replicated(study, 5)
    for replicate in range(5):
        named = {"replicate": replicate} if replicate else {}
        study.add((np.arange(N) < 40 + replicate).astype(float), "mft", "gcd", sparsity=0.2, baseline=2 * replicate,
                  variant=f"mft sparsity=0.2 seed=0{f' replicate={replicate}' if replicate else ''}", seed=0,
                  **named)  # fmt: skip
    study.compare(tmp_path / "out")
    assert study.summary["unit_variance"]["mft over recipe on maths"][1] == 4


def test_of_two_replicates_a_contrast_is_about_both_and_the_row_of_the_first_shows_its_own_gain(tmp_path: Path):
    study = Study(tmp_path / "in")
    differences = replicated(study, 2)
    rows = study.compare(tmp_path / "out", contrasts=("mft - fft",))
    (contrast,) = [row for row in study.contrasts if row["family"] == "primary"]
    assert contrast["gain"] == pytest.approx(differences.mean())
    first = next(row for row in rows if row["method"] == "mft" and row["replicate"] == 0)
    assert first["gain"] == pytest.approx(differences[0].mean())
    assert first["gain"] == pytest.approx(first["accuracy"] - first["baseline"])
    assert first["family"] == "exploratory"


def test_what_trainings_differ_by_is_kept_and_pooled_with_what_earlier_studies_measured(tmp_path: Path):
    study = Study(tmp_path / "in")
    differences = replicated(study, 5)
    alone = study.compare(tmp_path / "out")
    relative, freedom = study.summary["unit_variance"]["mft over recipe on maths"]
    own = unit_variance([Stratum.of(differences)], "recipe")
    assert own is not None
    assert (relative, freedom) == (pytest.approx(own.relative), own.freedom)
    priors = {"mft over recipe on maths": (0.01, 20.0)}
    pooled_rows = study.compare(tmp_path / "pooled", priors=priors, contrasts=("mft - fft",))
    before, after = (next(row for row in rows if row["method"] == "mft" and row["replicate"] == "all")
                     for rows in (alone, pooled_rows))  # fmt: skip
    assert after["freedom"] > before["freedom"]
    assert study.contrasts[0]["freedom"] == after["freedom"]


def test_the_table_shows_no_gain_without_its_interval_and_what_it_means(study: Study, tmp_path: Path):
    rows = study.compare(tmp_path / "out", question="Does it help?")
    table = (tmp_path / "out" / "table.md").read_text()
    gains = re.findall(r"\([+-][^)]*\)", table)
    assert len(gains) == len([row for row in rows if row["gain"] is not None])
    assert len(gains) > 20
    pattern = r"\([+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\] (better|worse|equivalent|undecided)\)"
    assert all(re.fullmatch(pattern, gain) for gain in gains)
    assert table.startswith("## Does it help?")
    assert "*undecided*: too little data" in table
    assert "- MFT: of 6 gains 3 better, 0 worse, 0 equivalent, 3 undecided." in table
    line = next(line for line in table.splitlines() if line.startswith("| MFT | 10%"))
    assert line.startswith("| MFT | 10% | 2 | 74.0 (+14.0 [")
    assert "| always the commonest answer |  |  | 12.5 | 12.5 | - |" in table


def test_the_best_of_each_sweep_stands_under_the_table_and_in_a_file(study: Study, tmp_path: Path):
    study.compare(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "winners.json").read_text())
    assert [(row["method"], row["benchmark"], row["candidates"], row["sparsity"]) for row in found] == [
        ("mft", "gcd", 2, 0.1), ("mft", "sums", 2, 0.1), ("mft", "mean", 2, 0.1),
    ]  # fmt: skip
    table = (tmp_path / "out" / "table.md").read_text()
    section = table[table.index("### The best of each sweep") : table.index("### What could have been found")]
    lines = [line for line in section.splitlines() if line.startswith("| MFT")]
    assert [line.split(" | ")[1] for line in lines] == [
        "gcd (n = 200)",
        "sums (n = 200)",
        "mean (n = 400)",
    ]
    gain = r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\] (better|worse|equivalent|undecided)"
    assert all(re.search(rf"\| sparsity 10% \(of 2; \d+%\) \| [+-]\d+\.\d \| {gain} \|", line) for line in lines)


def test_a_study_that_varies_nothing_has_no_winner(tmp_path: Path):
    study = Study(tmp_path / "evaluations")
    fft = np.repeat([1, 0], [120, 80])
    study.add(fft, "fft")
    study.add(changed(fft, 30, 2), "mft", **mask(0.1, seed=0), baseline=0)
    study.compare(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "winners.json").read_text()) == []
    assert "best of each sweep" not in (tmp_path / "out" / "table.md").read_text()
    assert "What could have been found" not in (tmp_path / "out" / "table.md").read_text(), "the only gain is shown"


def test_what_is_undecided_has_the_smallest_gain_that_would_have_been_found(study: Study, tmp_path: Path):
    rows = study.compare(tmp_path / "out")
    continued = next(row for row in rows if (row["method"], row["benchmark"]) == ("continued-fft", "gcd"))
    found = estimate([Stratum.of(np.repeat([1.0, -1.0, 0.0], [8, 5, 187]))])
    assert (continued["verdict"], continued["detectable"]) == ("undecided", pytest.approx(found.detectable))
    table = (tmp_path / "out" / "table.md").read_text()
    section = table[table.index("### What could have been found") : table.index("### Each training apart")]
    shown = f"{100 * continued['detectable']:.1f}"
    assert f"| continued FFT | - | 1 | {shown} | {shown} |" in section
    assert "| MFT | 10%" not in section


def test_the_same_evaluations_give_the_same_bytes(study: Study, tmp_path: Path):
    study.compare(tmp_path / "one")
    study.compare(tmp_path / "two")
    files = ("rows.json", "winners.json", "contrasts.json", "table.md", "figure.png")
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
    assert [(row["seed"], row["family"]) for row in rows] == [(None, None), (7, "exploratory")]
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
    assert all(row["verdict"] in (None, "undecided") for row in rows)
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


def replicated(study: Study, replicates: int, seeds: int = 1, benchmark: str = "gcd", gain: int = 6) -> np.ndarray:
    """Add an FFT and masks on it for each replicate; return the differences, (replicates, seeds, items)."""
    rng, differences = np.random.default_rng(7), []
    for replicate in range(replicates):
        number = {"replicate": replicate} if replicate else {}
        name = f" replicate={replicate}" if replicate else ""
        tuned = (rng.random(N) < 0.5 + 0.03 * replicate).astype(float)
        baseline = study.add(tuned, "fft", benchmark, variant=f"fft{name}", **number)
        own = []
        for seed in range(seeds):
            masked = changed(tuned, gain + 3 * replicate, 4 + seed, seed=10 * replicate + seed)
            columns = {"variant": f"mft seed={seed}{name}", "seed": seed, "baseline": baseline, "sparsity": 0.1}
            study.add(masked, "mft", benchmark, **columns, **number)
            own.append(masked - tuned)
        differences.append(own)
    return np.array(differences)


def test_of_replicates_there_is_a_row_each_and_one_about_the_recipe(tmp_path: Path) -> None:
    study = Study(tmp_path / "in")
    differences = replicated(study, 4)
    rows = study.compare(tmp_path / "out")
    masks = [row for row in rows if row["method"] == "mft"]
    assert [row["replicate"] for row in masks] == [0, 1, 2, 3, "all"]
    recipe = masks[-1]
    found = estimate([Stratum.of(differences)], "recipe")
    shown = recipe["gain"], recipe["gain_low"], recipe["gain_high"]
    assert shown == pytest.approx((found.gain, found.low, found.high))
    assert (recipe["p_value"], recipe["replicates"], recipe["why"]) == (pytest.approx(found.p_value), 4, None)
    assert [row["family"] for row in masks] == ["checkpoint", "training", "training", "training", "exploratory"]
    alone = [row["gain"] for row in masks[:-1]]
    assert alone == pytest.approx(differences.mean(axis=(1, 2)))


def test_the_fine_tuning_itself_has_a_mean_and_a_spread_over_replicates(tmp_path: Path) -> None:
    study = Study(tmp_path / "in")
    replicated(study, 5)
    rows = [row for row in study.compare(tmp_path / "out") if row["method"] == "fft"]
    single = [row["accuracy"] for row in rows if row["replicate"] != "all"]
    (recipe,) = [row for row in rows if row["replicate"] == "all"]
    assert len(single) == recipe["replicates"] == 5
    assert (recipe["accuracy"], recipe["accuracy_sd"]) == pytest.approx((np.mean(single), np.std(single, ddof=1)))
    table = (tmp_path / "out/table.md").read_text()
    assert f"{100 * np.mean(single):.1f}, sd {100 * np.std(single, ddof=1):.1f} over 5" in table


def test_each_replicate_is_paired_with_its_own_fine_tuning_and_not_with_the_first(tmp_path: Path) -> None:
    study = Study(tmp_path / "in")
    differences = replicated(study, 3, seeds=2)
    rows = study.compare(tmp_path / "out")
    for replicate in range(3):
        own = {row["seed"]: row for row in rows if row["method"] == "mft" and row["replicate"] == replicate}
        assert [own[seed]["gain"] for seed in (0, 1)] == pytest.approx(differences[replicate].mean(axis=1))
        assert own["all"]["gain"] == pytest.approx(differences[replicate].mean())
    names = [(row["variant"], row["benchmark"]) for row in rows]
    assert len(names) == len(set(names))


def test_below_three_replicates_the_page_says_why_it_tells_nothing_of_the_recipe(tmp_path: Path) -> None:
    study = Study(tmp_path / "in")
    replicated(study, 2)
    rows = study.compare(tmp_path / "out")
    recipe = next(row for row in rows if row["method"] == "mft" and row["replicate"] == "all")
    assert (recipe["gain"], recipe["verdict"], recipe["family"]) == (None, None, None)
    why = "2 fine-tunings tell too little of others: 3 or more do"
    assert recipe["why"] == why
    page = (tmp_path / "out/table.md").read_text()
    assert page.count(why) == 1
    assert "this recipe" not in page
    assert [row["replicate"] for row in pooled(rows)] == [0, 0]
    assert next(row for row in pooled(rows) if row["method"] == "mft")["family"] == "exploratory"


def test_the_table_has_this_checkpoint_and_this_recipe_side_by_side(tmp_path: Path) -> None:
    study = Study(tmp_path / "in")
    for benchmark in ("gcd", "sums"):
        replicated(study, 3, benchmark=benchmark)
    rows = study.compare(tmp_path / "out")
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| method"))
    assert header.count("this checkpoint") == header.count("this recipe") == 3, "two benchmarks and their mean"
    mft = next(line for line in lines if line.startswith("| MFT"))
    for row in rows:
        if row["method"] == "mft" and (row["replicate"] == "all" or row["replicate"] == 0):
            assert f"{100 * row['gain']:+.1f} [{100 * row['gain_low']:+.1f}, {100 * row['gain_high']:+.1f}]" in mft
    assert {row["replicate"] for row in pooled(rows)} == {"all"}


def test_one_fine_tuning_is_said_to_be_one(tmp_path: Path) -> None:
    study = Study(tmp_path / "in")
    replicated(study, 1)
    rows = study.compare(tmp_path / "out")
    assert {row["replicate"] for row in rows} == {0}
    table = (tmp_path / "out/table.md").read_text()
    assert "These are gains of one fine-tuned checkpoint and say nothing of others" in table
    assert "this recipe" not in table

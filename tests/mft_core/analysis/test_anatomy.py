"""The stage `anatomy` from masks on disk to section, figures and rows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mft_core.checkpoints.files import WeightFiles, skeleton
from mft_core.errors import ConfigError, StageError
from mft_core.masks.mask_file import make_mask, save_mask
from mft_core.masks.selection import Local
from mft_core.masks.sites import choose_sites, find_sites
from mft_core.recipes import Anatomy
from mft_core.stage import Progress, StageContext
from mft_core.stages import get_stage
from tests.support.small_training import make_context, save_data
from tests.support.tiny import save_checkpoint
from tests.support.told import untold

Row = dict[str, Any]
Scores = Callable[[Tensor, torch.Generator], Tensor]
METHODS: dict[str, Scores] = {
    "magnitude": lambda weight, _: weight,
    "random": lambda weight, generator: torch.rand(weight.shape, generator=generator),
    "mft": lambda weight, generator: weight.abs() + torch.rand(weight.shape, generator=generator) * 0.02,
}


class Study:
    """Masks of one checkpoint, described as the pipeline describes them."""

    def __init__(self, folder: Path, family: str = "llama", **changes: Any) -> None:
        self.folder = folder
        self.model = save_checkpoint(folder / "model", family, **changes)
        self.inputs = {"model": self.model, "data": save_data(folder / "data")}
        self.described: list[Row] = []
        self.told: list[Progress] = []

    def add(self, method: str, sparsity: float, seed: int | None = None, **columns: Any) -> None:
        """Add a mask of layers 1 and 2."""
        files = WeightFiles(self.model)
        sites = choose_sites(find_sites(skeleton(files.directory)), (1, 2), columns.get("modules", "both"))
        weights = list(files.tensors([site.name for site in sites]))
        generator = torch.Generator().manual_seed(seed or 0)
        scores = (METHODS[method](weight, generator) for _, weight in weights)
        kept = {site.name: mask for site, mask in zip(sites, Local(sparsity).masks(scores), strict=True)}
        mask = make_mask(
            sites, kept, weights, sparsity=sparsity, selector="random", modules=columns.get("modules", "both")
        )
        directory = self.folder / f"mask-{len(self.described)}"
        save_mask(mask, directory)
        self.inputs[f"mask-{len(self.described)}"] = directory
        variant = f"{method} sparsity={sparsity}" + ("" if seed is None else f" seed={seed}")
        common = {"variant": variant, "method": method, "domain": "sums", "layers": "1-2", "modules": "both"}
        self.described.append({**common, "sparsity": sparsity, "seed": seed, **columns})

    def run(self, name: str = "out", context: StageContext | None = None, **settings: Any) -> Path:
        """Run the stage and return its payload."""
        out = self.folder / name
        out.mkdir()
        recipe = Anatomy(masks=tuple(self.described), bootstrap=200, **{"rows": 6, **settings})
        context = context or make_context(self.folder / f"work-{name}")
        self.summary = get_stage("anatomy").run(recipe, self.inputs, out, context)
        return out

    def rows(self, out: Path) -> list[Row]:
        """Return the rows of a payload."""
        return json.loads((out / "rows.json").read_text())


def _only(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tmp_path_factory.mktemp("study"))
    study.add("mft", 0.2, 0)
    study.add("mft", 0.2, 1)
    study.add("random", 0.2, 0)
    study.add("random", 0.2, 1)
    study.add("magnitude", 0.1)
    study.add("magnitude", 0.3)
    return study


@pytest.fixture(scope="module")
def payload(study: Study) -> Path:
    context = make_context(study.folder / "work")
    return study.run(context=StageContext(context.runtime, context.work, study.told.append))


@pytest.fixture(scope="module")
def rows(study: Study, payload: Path) -> list[Row]:
    return study.rows(payload)


def test_masks_are_told_apart_by_the_magnitude_they_remove(rows: list[Row]) -> None:
    first = {row["variant"]: row for row in _only(rows, part="decile", decile=1, pooled=True) if "module" not in row}
    assert first["magnitude sparsity=0.1"]["share"] == first["magnitude sparsity=0.3"]["share"] == 1
    assert first["mft sparsity=0.2"]["ratio"] > first["mft sparsity=0.2"]["chance_high"]
    assert first["random sparsity=0.2"]["chance_low"] < first["random sparsity=0.2"]["ratio"]
    assert first["random sparsity=0.2"]["ratio"] < first["random sparsity=0.2"]["chance_high"]


def test_seeds_are_shown_apart_and_pooled(rows: list[Row]) -> None:
    shares = [row for row in _only(rows, part="share", method="random") if "layer" not in row and "module" not in row]
    assert [(row["seed"], row["seeds"], row["pooled"]) for row in shares] == [
        (0, 1, False),
        (1, 1, False),
        ("all", 2, True),
    ]
    assert shares[2]["zeros"] == shares[0]["zeros"] + shares[1]["zeros"]
    assert shares[2]["variant"] == "random sparsity=0.2"
    apart, other, pooled = _only(rows, part="loss", method="random", by="layer", layer=1, order="last")
    assert pooled["cost"] == pytest.approx((apart["cost"] + other["cost"]) / 2)
    assert [row["pooled"] for row in _only(rows, part="loss", by="mask", method="magnitude")] == [True, True]


def test_overlap_is_by_chance_for_random_masks_and_whole_for_nested_ones(rows: list[Row]) -> None:
    pairs = _only(rows, part="overlap")
    assert len(pairs) == 15
    kinds = {row["kind"]: row for row in _only(rows, part="overlap summary")}
    assert kinds["magnitude mask, other sparsity"]["beyond_chance"] == pytest.approx(1)
    assert kinds["magnitude mask, other sparsity"]["jaccard"] == pytest.approx(1 / 3, rel=0.01)
    assert abs(_only(pairs, kind="random mask, other seed")[0]["z"]) < 3
    assert _only(pairs, kind="MFT, other seed")[0]["z"] > 10
    assert set(kinds) == {
        "MFT, other seed", "MFT and random mask, same seed",
        "MFT and random mask, other seed", "MFT and magnitude mask", "random mask, other seed",
        "random mask and magnitude mask", "magnitude mask, other sparsity",
    }  # fmt: skip
    assert sum(row["pairs"] for row in kinds.values()) == 15


def test_the_section_names_its_figures_and_every_figure_is_there(payload: Path) -> None:
    section = (payload / "section.md").read_text()
    assert untold(section, json.loads((payload / "rows.json").read_text())) == []
    named = set(re.findall(r"\]\(([^)]+\.png)\)", section))
    assert named == {path.name for path in payload.glob("*.png")}
    assert named == {
        "deciles.png", "evenness.png", "heads.png", "overlap.png", "loss-mft.png", "loss-random.png",
        "loss-magnitude.png",
    }  # fmt: skip
    assert section.startswith("## ")
    assert "| magnitude mask 10% | 9.96% | ×10 [" in section
    assert "None" not in section
    assert "nan" not in section


def test_the_payload_is_the_same_bytes_each_time_also_after_a_kill(study: Study, payload: Path) -> None:
    context = make_context(study.folder / "work-killed")

    def kill(progress: Progress) -> None:
        if progress.step > 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run("killed", StageContext(context.runtime, context.work, kill))
    kept = {path: path.stat().st_mtime_ns for path in context.work.glob("mask-*.json")}
    assert 0 < len(kept) < 6
    again = study.run("again", context)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for path in payload.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_progress_counts_to_its_end(study: Study, payload: Path) -> None:
    for _, group in itertools.groupby(study.told, key=lambda progress: progress.unit):
        steps = list(group)
        assert [progress.step for progress in steps] == list(range(1, steps[-1].total + 1))


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "gpt2", "codegen"])
def test_other_families_are_looked_at_too(family: str, tmp_path: Path) -> None:
    study = Study(tmp_path, family, **({"rotary_dim": 8} if family == "codegen" else {}))
    study.add("magnitude", 0.1)
    out = study.run(rows=2)
    rows = study.rows(out)
    projections = {row["projection"] for row in _only(rows, part="head")}
    known = family != "codegen"
    assert projections == ({"q", "k", "v", "o"} if known else {"o"})
    assert bool(_only(rows, part="heads left out")) != known
    assert ("Heads of qkv_proj are left out" in (out / "section.md").read_text()) != known
    assert not _only(rows, part="overlap")
    (whole,) = _only(rows, part="loss", by="mask")
    (tenth,) = _only(rows, part="loss", by="decile", order="alone")
    assert whole["cost"] == tenth["cost"]


def test_masks_without_a_common_matrix_have_no_overlap(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.add("random", 0.2, 0, modules="attention")
    study.add("random", 0.2, 0, modules="mlp")
    out = study.run(rows=2)
    assert not (out / "overlap.png").exists()
    assert not _only(study.rows(out), part="overlap")


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.add("random", 0.2, 0)
    other = save_checkpoint(tmp_path / "other", seed=1)
    right, study.inputs["model"] = study.inputs["model"], other
    with pytest.raises(ConfigError, match=r"made for other weights .*; apply it to the checkpoint that it was"):
        study.run("foreign")
    study.inputs["model"] = save_checkpoint(tmp_path / "wider", intermediate_size=96)
    with pytest.raises(ConfigError, match=r"mask-0: the model has no matrix .*gate_proj.* of shape \(64, 32\)"):
        study.run("wide")
    study.inputs["model"] = right
    study.add("random", 0.2, 0)
    with pytest.raises(StageError, match=r"two masks are described alike: random sparsity=0.2 seed=0, seeds \[0, 0\]"):
        study.run("alike")


def test_a_mask_that_rewinds_is_refused_for_it_removes_nothing(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.add("random", 0.2, 0)
    path = tmp_path / "mask-0" / "mask_config.json"
    config = json.loads(path.read_text())
    config["sites"] = [{**site, "rewound_sha256": "0" * 64} for site in config["sites"]]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="leave out masks that rewind, which remove none"):
        study.run("rewound")

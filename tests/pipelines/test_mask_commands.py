"""`mft mask show | apply | compare` as people call them: on mask files alone, without a study."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from mft_core.adapter import save_mask
from pipelines.cli import main
from tests.core.test_adapter import make_small_mask
from tests.tiny import make_model, save_checkpoint


@pytest.fixture
def mft(monkeypatch, capsys):
    """Run `mft mask` in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mft", "mask", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def base(tmp_path):
    return save_checkpoint(tmp_path / "base")


@pytest.fixture
def mask(tmp_path):
    """An artifact of `learn-mask`, which holds the mask in a folder."""
    save_mask(make_small_mask(make_model(), 0.21), tmp_path / "artifact" / "mask")
    return tmp_path / "artifact"


def test_show_says_how_much_is_cut_and_where(mft, mask):
    code, out, _ = mft("show", mask)
    assert code == 0
    assert "sparsity 0.21 (local)" in out
    assert "q_proj" in out
    code, out, _ = mft("show", mask / "mask", "--json")
    assert code == 0
    assert json.loads(out)["sparsity"] == 0.21


def test_apply_writes_a_whole_checkpoint_with_exactly_the_zeros_of_the_mask(mft, base, mask, tmp_path):
    code, out, err = mft("apply", base, mask, tmp_path / "new" / "out")
    assert code == 0, err
    written = tmp_path / "new" / "out"
    assert sorted(p.name for p in written.iterdir()) == sorted(p.name for p in base.iterdir())
    assert [p.name for p in written.parent.iterdir()] == ["out"]
    before, after = load_file(base / "model.safetensors"), load_file(written / "model.safetensors")
    zeros = sum(int(((after[name] == 0) & (before[name] != 0)).sum()) for name in before)
    assert zeros > 0
    assert f"{zeros:,} weights set to zero" in out
    assert all(torch.equal(after[n][after[n] != 0], before[n][after[n] != 0]) for n in before)


def test_a_mask_of_another_base_is_refused_and_nothing_is_written(mft, mask, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=1)
    code, _, err = mft("apply", other, mask, tmp_path / "out")
    assert code == 2
    assert "the mask was made for other weights" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".incomplete*"))


def test_an_out_that_exists_is_refused_and_left_as_it_is(mft, base, mask, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, err = mft("apply", base, mask, tmp_path / "out")
    assert code == 2
    assert "exists already" in err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("missing", ["base", "mask"])
def test_what_is_not_there_is_refused(mft, base, mask, tmp_path, missing):
    given = {"base": base, "mask": mask, missing: tmp_path / "nowhere"}
    code, _, err = mft("apply", given["base"], given["mask"], tmp_path / "out")
    assert code == 2
    assert "nowhere" in err
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_no_half_checkpoint(base, mask, tmp_path, monkeypatch):
    import mft_core.merge

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(mft_core.merge, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        mft_core.merge.merge(base, mask / "mask", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".incomplete*"))


def test_compare_gives_one_for_the_same_mask_and_what_chance_would_give(mft, mask):
    code, out, _ = mft("compare", mask, mask, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["jaccard"] == 1.0
    assert found["chance"] == pytest.approx(0.21**2 / (0.42 - 0.21**2))
    code, out, _ = mft("compare", mask, mask)
    assert code == 0
    assert "1.000" in out

"""`mft mask show | apply | undo | compare | combine` as people call them: on mask files alone, without a study."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from mft_core.masks.mask_file import make_mask, save_mask
from mft_core.masks.selection import select
from mft_core.masks.sites import choose_sites, find_sites
from pipelines.cli import main
from tests.mft_core.masks.test_mask_file import make_small_mask
from tests.support.tiny import make_model, save_checkpoint


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


@pytest.fixture
def other(tmp_path):
    """A mask at 10% of the same base, in layers 2 and 3."""
    save_mask(make_small_mask(make_model(), 0.1, layers=(2, 3)), tmp_path / "other_mask")
    return tmp_path / "other_mask"


def test_show_says_how_much_is_cut_and_where(mft, mask):
    code, out, _ = mft("show", mask)
    assert code == 0
    assert "magnitude mask, sparsity 0.21 (local)" in out
    assert "3,868 of 18,432 weights are zero (20.99%)" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["layer", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"] in lines
    assert ["1", "21.00%", "20.90%", "20.90%", "21.00%", "21.00%", "21.00%", "21.00%", "20.99%"] in lines
    assert ["all", "430", "214", "214", "430", "860", "860", "860", "3,868"] in lines
    assert "\x1b" not in out


def test_show_gives_the_numbers_as_json(mft, mask):
    code, out, _ = mft("show", mask / "mask", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["sparsity"] == 0.21
    assert found["share"] == found["zeros"] / found["weights"]
    assert sum(layer["zeros"] for layer in found["layers"].values()) == found["zeros"]
    assert sum(module["zeros"] for module in found["modules_of_all_layers"].values()) == found["zeros"]
    assert found["layers"]["1"]["modules"]["q_proj"] == {"zeros": 215, "weights": 1024, "share": 215 / 1024}


def test_show_draws_the_same_figure_every_time(mft, mask, tmp_path):
    for name in ("a.png", "new/b.png"):
        code, out, _ = mft("show", mask, "--figure", tmp_path / name)
        assert code == 0
        assert f"figure: {tmp_path / name}" in out
    first, second = (tmp_path / "a.png").read_bytes(), (tmp_path / "new" / "b.png").read_bytes()
    assert first == second
    assert first.startswith(b"\x89PNG")
    code, out, _ = mft("show", mask, "--figure", tmp_path / "c.png", "--json")
    assert code == 0
    assert json.loads(out)["zeros"]
    assert (tmp_path / "c.png").exists()


def test_a_figure_that_is_no_png_is_refused(mft, mask, tmp_path):
    code, _, err = mft("show", mask, "--figure", tmp_path / "a.jpg")
    assert code == 2
    assert "ends in .png" in err


def test_apply_writes_a_whole_checkpoint_with_exactly_the_zeros_of_the_mask(mft, base, mask, tmp_path):
    code, out, err = mft("apply", base, mask, tmp_path / "new" / "out")
    assert code == 0, err
    written = tmp_path / "new" / "out"
    assert {p.name for p in written.iterdir()} == {p.name for p in base.iterdir()} | {"mask"}
    assert [p.name for p in written.parent.iterdir()] == ["out"]
    before, after = load_file(base / "model.safetensors"), load_file(written / "model.safetensors")
    zeros = sum(int(((after[name] == 0) & (before[name] != 0)).sum()) for name in before)
    assert zeros > 0
    assert f"{zeros:,} weights set to zero" in out
    assert all(torch.equal(after[n][after[n] != 0], before[n][after[n] != 0]) for n in before)


def test_undo_gives_the_base_back_bit_for_bit(mft, base, mask, tmp_path):
    assert mft("apply", base, mask, tmp_path / "merged")[0] == 0
    code, out, _ = mft("show", tmp_path / "merged")
    assert code == 0
    assert "sparsity 0.21" in out
    code, out, err = mft("undo", tmp_path / "merged", tmp_path / "again")
    assert code == 0, err
    assert "3,868 weights put back" in out
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not (tmp_path / "again" / "mask").exists()


def test_undo_refuses_what_apply_did_not_write(mft, base, tmp_path):
    code, _, err = mft("undo", base, tmp_path / "again")
    assert code == 2
    assert "mask" in err
    (tmp_path / "there").mkdir()
    code, _, err = mft("undo", base, tmp_path / "there")
    assert code == 2
    assert "exists already" in err


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


def test_the_folder_around_a_checkpoint_is_told_from_it(mft, base, mask, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model").symlink_to(base)
    code, _, err = mft("apply", tmp_path / "made", mask, tmp_path / "out")
    assert code == 2
    assert f"(it is in {tmp_path / 'made' / 'model'})" in err


def test_a_write_that_fails_leaves_no_half_checkpoint(base, mask, tmp_path, monkeypatch):
    import mft_core.masks.merge

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(mft_core.masks.merge, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        mft_core.masks.merge.merge(base, mask / "mask", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".incomplete*"))


def test_compare_gives_one_for_the_same_mask_and_what_chance_would_give(mft, mask):
    code, out, _ = mft("compare", mask, mask, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["jaccard"] == 1.0
    assert found["chance"] == pytest.approx(0.21**2 / (0.42 - 0.21**2), rel=1e-3)
    assert found["same_base"]
    code, out, _ = mft("compare", mask, mask)
    assert code == 0
    assert "Jaccard index of the removed weights: 1.0000 (independent masks: 0.1172)" in out


def test_compare_gives_every_layer_and_module_and_says_what_it_left_out(mft, mask, other):
    code, out, _ = mft("compare", mask, other, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["jaccard"] == pytest.approx(0.1 / 0.21, rel=0.01)
    assert set(found["layers"]) == {"2"}
    assert set(found["modules"]) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(found["only_a"]) == len(found["only_b"]) == 7
    _, out, _ = mft("compare", mask, other)
    assert "7 matrices that only A masks" in out
    assert "7 matrices that only B masks" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["layer", "Jaccard", "by", "chance", "both", "removed", "by", "A", "removed", "by", "B", "weights"] in lines


def test_compare_says_that_the_bases_differ(mft, mask, tmp_path):
    save_mask(make_small_mask(make_model(seed=1), 0.21), tmp_path / "of_another")
    code, out, _ = mft("compare", mask, tmp_path / "of_another")
    assert code == 0
    assert "different base weights" in out


def test_masks_without_a_common_matrix_are_not_compared(mft, mask, tmp_path):
    save_mask(make_small_mask(make_model(), 0.21, layers=(3,)), tmp_path / "third")
    code, _, err = mft("compare", mask, tmp_path / "third")
    assert code == 2
    assert "no matrix in common" in err


@pytest.mark.parametrize(("operation", "zeros"), [("union", 3_868 + 918), ("intersection", 918)])
def test_combine_writes_a_mask_that_can_be_shown_and_applied(mft, base, mask, other, tmp_path, operation, zeros):
    code, out, err = mft("combine", operation, mask, other, tmp_path / "new")
    assert code == 0, err
    assert f"{operation}: {zeros:,} of " in out
    assert "combined mask" in mft("show", tmp_path / "new")[1]
    code, out, _ = mft("apply", base, tmp_path / "new", tmp_path / "out")
    assert code == 0
    assert f"{zeros:,} weights set to zero" in out


def test_combine_takes_one_mask_apart_and_away(mft, mask, tmp_path):
    assert mft("combine", "complement", mask, tmp_path / "rest")[0] == 0
    code, out, _ = mft("combine", "difference", mask, tmp_path / "rest", tmp_path / "same")
    assert code == 0
    assert "difference: 3,868 of 18,432 weights are zero" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("unoin", "MASK", "MASK", "OUT"), "unknown operation 'unoin'. Did you mean 'union'?"),
        (("union", "MASK", "OUT"), "union takes two masks: A B OUT; 1 given"),
        (("complement", "MASK", "MASK", "OUT"), "complement takes one mask: A OUT; 2 given"),
        (
            ("union", "MASK", "ALIEN", "OUT"),
            "model.layers.1.self_attn.q_proj.weight: the masks were made for different",
        ),
        (("union", "MASK", "MASK", "MASK"), "exists already"),
    ],
)
def test_a_combination_that_makes_no_sense_is_refused_and_nothing_written(mft, mask, tmp_path, arguments, said):
    save_mask(make_small_mask(make_model(seed=1), 0.21), tmp_path / "alien")
    places = {"MASK": mask, "ALIEN": tmp_path / "alien", "OUT": tmp_path / "out"}
    code, _, err = mft("combine", *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        "apply base artifact base/out",
        "apply base artifact base/deep/../out",
        "apply link artifact base/out",
        "apply base artifact link/out",
        "apply base artifact artifact/out",
        "apply base artifact artifact/mask/out",
        "undo merged merged/out",
        "combine union artifact other_mask other_mask/out",
        "combine complement artifact artifact/mask/out",
        "show artifact --figure artifact/mask/out.png",
        "apply base artifact dangling",
        "apply base artifact loop/out",
    ],
)
def test_an_out_within_what_is_read_is_refused_before_anything_is_written(mft, base, mask, other, tmp_path, command):
    mft("apply", base, mask, tmp_path / "merged")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    options = ("apply", "undo", "combine", "show", "union", "complement", "--figure")
    code, _, err = mft(*(word if word in options else tmp_path / word for word in command.split()))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: out = ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_rewind_mask_is_applied_with_the_model_that_it_goes_back_to_and_undone(mft, base, tmp_path):
    earlier = save_checkpoint(tmp_path / "earlier", seed=1)
    model, values = make_model(), dict(make_model(seed=1).named_parameters())
    sites = choose_sites(find_sites(model), (1,), "mlp")
    weights = [(site.name, model.get_parameter(site.name).detach()) for site in sites]
    kept = {name: select(weight, 0.5) for name, weight in weights}
    earlier_weights = [(name, values[name]) for name, _ in weights]
    mask = make_mask(sites, kept, weights, sparsity=0.5, selector="rewind", modules="mlp", rewound_to=earlier_weights)
    save_mask(mask, tmp_path / "rewind")

    code, _, err = mft("apply", base, tmp_path / "rewind", tmp_path / "out")
    assert code == 2
    assert "not to zero; give that model too (mft mask apply … --rewind-to MODEL)" in err
    assert not (tmp_path / "out").exists()

    code, out, err = mft("apply", base, tmp_path / "rewind", tmp_path / "out", "--rewind-to", earlier)
    assert code == 0, err
    assert f"3,072 weights set back to those of {earlier}" in out
    before, after, back = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out", earlier))
    for name in before:
        expected = torch.where(kept[name], before[name], back[name]) if name in kept else before[name]
        assert torch.equal(after[name], expected)
    assert "3,072 of 6,144 weights are rewound (50.00%)" in mft("show", tmp_path / "out")[1]
    code, out, _ = mft("combine", "complement", tmp_path / "rewind", tmp_path / "rest")
    assert "3,072 of 6,144 weights are rewound" in out
    assert mft("undo", tmp_path / "out", tmp_path / "again")[0] == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], before[name]) for name in before)

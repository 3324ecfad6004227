"""The token data set on disk, and the shuffles everything else is built on."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from mft_core.data.order import seeded_order
from mft_core.data.tokens import TokenDataset
from mft_core.errors import StageError
from tests.support.memory import peak


def dataset() -> TokenDataset:
    return TokenDataset.from_examples(
        [
            (np.array([5, 6, 7]), np.array([False, True, True])),
            (np.array([8]), np.array([False])),
            (np.array([9, 1]), np.array([False, True])),
        ]
    )


def test_a_data_set_read_back_is_the_one_written(tmp_path):
    dataset().save(tmp_path / "train.safetensors")
    read = TokenDataset.load(tmp_path / "train.safetensors")
    assert len(read) == 3
    assert read.lengths.tolist() == [3, 1, 2]
    assert read.loss_tokens == 3
    assert [read.example(i)[0].tolist() for i in range(3)] == [[5, 6, 7], [8], [9, 1]]
    assert read.example(2)[1].tolist() == [False, True]
    assert (read.input_ids.dtype, read.loss_mask.dtype, read.offsets.dtype) == (np.int32, bool, np.int64)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        dataset().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_bytes_are_those_of_safetensors(tmp_path):
    made = dataset()
    made.save(tmp_path / "train.safetensors")
    arrays = {"input_ids": made.input_ids, "loss_mask": made.loss_mask, "offsets": made.offsets}
    assert (tmp_path / "train.safetensors").read_bytes() == save(arrays)


def test_chosen_sequences_are_saved_in_their_order(tmp_path):
    dataset().save(tmp_path / "some.safetensors", np.array([2, 0]))
    read = TokenDataset.load(tmp_path / "some.safetensors")
    assert [read.example(i)[0].tolist() for i in range(2)] == [[9, 1], [5, 6, 7]]
    assert [read.example(i)[1].tolist() for i in range(2)] == [[False, True], [False, True, True]]


def test_sequences_are_made_written_and_read_without_being_held(tmp_path):
    example = np.arange(5_000), np.ones(5_000, bool)
    with peak() as most:
        TokenDataset.from_examples((example for _ in range(2_000)), tmp_path).save(tmp_path / "train.safetensors")
        read = TokenDataset.load(tmp_path / "train.safetensors")
    assert read.input_ids.nbytes == 40e6
    assert most() < 1e6
    assert [path.name for path in tmp_path.iterdir()] == ["train.safetensors"], "nothing else is left"


def test_a_data_set_without_examples_can_be_kept_too(tmp_path):
    TokenDataset.from_examples([]).save(tmp_path / "empty.safetensors")
    read = TokenDataset.load(tmp_path / "empty.safetensors")
    assert len(read) == 0
    assert read.loss_tokens == 0


def test_the_first_token_of_an_example_is_never_in_the_loss():
    everything = TokenDataset.from_examples([(np.array([1, 2]), np.ones(2)), (np.array([3]), np.ones(1))])
    assert everything.loss_mask.tolist() == [False, True, False]


def test_an_example_out_of_range_is_refused_rather_than_counted_from_the_end():
    with pytest.raises(IndexError, match="example -1 of 3"):
        dataset().example(-1)


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_a_missing_or_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "train.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StageError, match=r"train\.safetensors.*prepare-data"):
        TokenDataset.load(path)


def test_an_order_is_a_permutation_that_never_changes_between_versions_and_machines():
    assert seeded_order(10, 42, 0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
    assert sorted(seeded_order(1000, 7)) == list(range(1000))
    assert seeded_order(10, 42, 1).tolist() != seeded_order(10, 42, 0).tolist()
    assert seeded_order(0, 1).tolist() == []

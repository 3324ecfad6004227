"""The comparison of two machines tells apart what is to the bit, and counts what is not."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from tests.bench.reproduce import _coded, lines


def test_what_differs_is_counted_and_what_does_not_is_said_to_be_to_the_bit() -> None:
    weights, kept = np.array([1.0, 2.0], np.float32), np.array([0b11110000], np.uint8)
    ours: dict[str, Any] = {
        "statistics": "same",
        "stages": {
            "fine-tune": {"id": "a", "weights": _coded(weights), "weights_digest": "a", "validation_loss": 0.5},
            "mask": {"id": "b", "mask": _coded(kept), "validation_loss": 0.5},
            "random": {"id": "c", "mask": _coded(kept)},
            "evaluate": {"id": "d", "outcomes": "0011"},
        },
    }
    assert all(row.endswith("to the bit |") for row in lines(ours, ours)[2:])
    theirs = copy.deepcopy(ours)
    tuned, mask = theirs["stages"]["fine-tune"], theirs["stages"]["mask"]
    tuned |= {"weights": _coded(weights + np.float32(0.25)), "weights_digest": "b", "validation_loss": 0.625}
    mask |= {"id": "e", "mask": _coded(np.array([0b11110001], np.uint8))}
    theirs["stages"]["evaluate"]["outcomes"] = "0110"
    theirs["statistics"] = "another"
    assert lines(ours, theirs)[2:] == [
        "| fine-tune | weights | most 2.5e-01, mean 2.5e-01 (rms 0.50) |",
        "| fine-tune | validation loss | 1.2e-01 of 0.5000 |",
        "| mask | key | DIFFERENT |",
        "| mask | removed by both | 75.00% |",
        "| mask | validation loss | to the bit |",
        "| random | removed by both | to the bit |",
        "| evaluate | outcomes | 2 of 4 flipped, accuracy +0.00 points |",
        "| statistics | of made-up outcomes | DIFFERENT |",
    ]

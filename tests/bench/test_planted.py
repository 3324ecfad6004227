"""The positive control, once of each kind that has a gain; `python -m tests.bench.planted` does it 20 times."""

from pathlib import Path

import pytest

from mft_core.evaluation.outcomes import Evaluation
from tests.bench import planted
from tests.bench.planted import ITEMS, is_found, one_run


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["planted", "rewinding"])
def test_a_planted_gain_is_found(kind, tmp_path_factory):
    home = tmp_path_factory.getbasetemp() / "planted"  # one fine-tuning for all kinds
    result = one_run(kind, home, 0)
    assert is_found(result), result


def test_a_gain_is_looked_for_on_the_items_that_the_study_did_not_have(monkeypatch):
    def answers(model, _limit):
        right = {"before": range(ITEMS), "after": range(ITEMS, 2 * ITEMS)}[model.name]
        rows = [{"doc_id": item, "outcome": int(item in right and item % 2)} for item in range(2 * ITEMS)]
        return [Evaluation(rows, {})] * 3

    monkeypatch.setattr(planted, "answers", answers)
    gain, low, high = planted.on_other_items(Path("before"), Path("after"))
    assert gain == 50.0
    assert 50 - low == pytest.approx(high - 50) == pytest.approx(196 * 0.5 / (3 * ITEMS) ** 0.5, abs=0.06)

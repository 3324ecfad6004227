"""The positive control, once of each kind that has a gain; `python -m tests.bench.planted` does it 20 times."""

import pytest

from tests.bench.planted import is_found, one_run


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["planted", "rewinding"])
def test_a_planted_gain_is_found(kind, tmp_path_factory):
    home = tmp_path_factory.getbasetemp() / "planted"  # one fine-tuning for all kinds
    result = one_run(kind, home, 0)
    assert is_found(result), result

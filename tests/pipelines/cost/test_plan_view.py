"""What `mft plan` says of replicates: their cost, and where there are fewer of them than a study asks for."""

import json
import sys

import pytest
import yaml

from pipelines.cli import main
from tests.support.mini import write_profile


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Run `mft plan` on a study of five replicates, and return what it prints."""
    profile = write_profile(tmp_path)
    study = {"question": "?", "seeds": [0], "replicates": 5, "variants": [{"method": "fft"}, {"method": "mft"}]}
    (tmp_path / "five.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.setenv("MFT_HOME", str(tmp_path / "home"))

    def plan(*options):
        asked = ["mft", "plan", str(tmp_path / "five.yaml"), "--profile", str(profile), *options]
        monkeypatch.setattr(sys, "argv", asked)
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    return plan


def test_a_profile_that_lets_a_study_have_fewer_fine_tunings_is_named_with_the_way_to_all(planned):
    _, told = planned()
    words = " ".join(told.out.split())
    assert (
        "five: 1 of the 5 fine-tunings that the study asks for (profile mini: max_replicates = 1); "
        "all of them: --replicates 5" in words
    )
    assert "fine-tunings that the study asks for" not in planned("--replicates", "5")[1].out


def test_replicates_are_variants_whose_hours_are_in_the_plan(planned):
    one, five = (json.loads(planned("--json", *options)[1].out) for options in ([], ["--replicates", "5"]))
    assert (one["replicates"], five["replicates"]) == (1, 5)
    assert (len(one["variants"]), len(five["variants"])) == (2, 10)
    assert five["hours"] > 3 * one["hours"]


def test_no_replicates_are_refused_as_bad_usage(planned):
    code, told = planned("--replicates", "0")
    assert code == 2
    assert "greater than or equal to 1" in " ".join(told.err.replace("│", " ").split())

"""What a run says of the rows that its data has lost, computed now or cached."""

import io

from rich.console import Console

from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_study
from pipelines.plan.plan import make_plan
from pipelines.run.display import Display
from pipelines.run.execute import _tell_losses
from tests.support.finished import finish
from tests.support.mini import write_profile, write_study


def test_the_console_says_how_many_rows_were_dropped_and_why(tmp_path):
    study = load_study(str(write_study(tmp_path, [{"method": "fft"}])))
    profile, store = load_profile(str(write_profile(tmp_path))), ArtifactStore(tmp_path / "home")
    finish(make_plan(study, profile, store), store, {"fft": 0.5})
    step = next(step for step in make_plan(study, profile, store).steps if step.node.stage == "prepare-data")
    console = Console(file=io.StringIO())
    assert step.artifact is not None
    _tell_losses(step.node, step.artifact, store, Display(1, console))
    assert console.file.getvalue().endswith(
        "prepare-data sums: 1,239 of 1,293 rows (96%) were dropped: 3 there twice, 1 equal to a benchmark's question, "
        "1 that hold much of one (data.overlap), "
        "1,234 too long to keep an answer; 5 lost 7 answers at their end, which do not fit into max_length\n"
    )

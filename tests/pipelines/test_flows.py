"""A flow that is handed a plan is, to Prefect, the served one: only its work is the caller's."""

from pipelines.flows import mft_ablation, stage_flow, with_work


def test_a_caller_who_has_planned_gives_a_flow_its_work_and_leaves_the_served_flow_as_it_was():
    for served in (mft_ablation, stage_flow("learn-mask")):
        before = served.fn
        here = with_work(served, lambda: "planned already")
        assert here.fn(study="no such study", profile="no such profile").unquote() == "planned already"
        assert (here.name, here.flow_run_name) == (served.name, served.flow_run_name)
        assert here.parameters == served.parameters
        assert served.fn is before
        asked = {"study": "a", "profile": "b", "overrides": [], "seeds": [0], "replicates": None, "rerun": []}
        assert here.validate_parameters(asked) == asked

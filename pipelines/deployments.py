"""The served deployments: every flow under a deployment of its own name. Started by `mft up`, or run as a module.

`prefect.yaml` has the same for work pools; there a flow is named by where it is imported from: this module has the
flow of each stage, as `learn_mask`.
"""

from __future__ import annotations

from typing import Any

from prefect import Flow, serve

from mft_core.stages import STAGES
from pipelines.flows import mft_ablation, mft_pipeline, stage_flow

STAGE_FLOWS: dict[str, Flow[Any, Any]] = {name: stage_flow(name) for name in STAGES}

globals().update({name.replace("-", "_"): flow for name, flow in STAGE_FLOWS.items()})


def serve_deployments() -> None:
    """Serve all deployments until stopped; each flow run is a process of its own."""
    flows: list[Flow[Any, Any]] = [mft_ablation, mft_pipeline, *STAGE_FLOWS.values()]
    deployments: list[Any] = [flow.to_deployment(name=flow.name, tags=["mft"]) for flow in flows]
    serve(*deployments)


if __name__ == "__main__":
    serve_deployments()

"""The served deployments: every flow under a deployment of its own name. Started by `mft up`, or run as a module."""

from __future__ import annotations

from prefect import serve

from pipelines.flows import STAGE_FLOWS, mft_ablation, mft_pipeline


def serve_deployments() -> None:
    """Serve all deployments until stopped; each flow run is a process of its own."""
    flows = [mft_ablation, mft_pipeline, *STAGE_FLOWS.values()]
    serve(*(flow.to_deployment(name=flow.name, tags=["mft"], description=flow.description) for flow in flows))


if __name__ == "__main__":
    serve_deployments()

"""Deployments that cost nothing, under the real names: what `mft up` serves in the tests of the servers."""

from __future__ import annotations

from prefect import flow, serve


@flow(name="mft-ablation", log_prints=True)
def quick(study: str = "sparsity", profile: str = "tiny") -> str:
    """Answer at once."""
    return f"{study} on {profile}"


@flow(name="other-flow")
def other() -> None:
    """Share a deployment name with another flow."""


if __name__ == "__main__":
    serve(quick.to_deployment("mft-ablation"), quick.to_deployment("twice"), other.to_deployment("twice"))

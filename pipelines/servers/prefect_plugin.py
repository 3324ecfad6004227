"""Prefect plugin: `prefect deployment run mft-ablation` by bare name, at the server that `mft up` started.

Prefect loads it (entry point group `prefect.plugins`, enabled in `prefect.toml` or by PREFECT_PLUGINS_ENABLED=true)
while `prefect` itself is imported, in every process, so it does next to nothing at that time: it looks up the server,
and only in a `prefect deployment ...` command does it widen the client's look-up by name. Stock Prefect wants
FLOW/DEPLOYMENT; such names take the stock way, untouched.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.plugins import SetupResult, register_hook

from mft_core.errors import did_you_mean

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.filters import DeploymentFilter
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.plugins import HookContext


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Point Prefect at the server of a living `mft up` unless another is configured; teach the command bare names."""
    if {"deployment", "deployments"} & set(sys.argv[1:]):
        accept_bare_names()
    if ctx.api_url and os.environ.get("PREFECT_API_AUTH_STRING"):
        return None
    from pipelines.servers.services import address_of, living_server

    home = Path(os.environ.get("MFT_HOME") or ".mft")
    living = living_server(home)
    if living is None or ctx.api_url not in (None, living["prefect"]):
        return None
    return SetupResult(env=address_of(home, living), note="server of `mft up`")


def accept_bare_names() -> None:
    """Make the client's look-up of a deployment take a bare name, if exactly one deployment has it.

    Raises:
        RuntimeError: Prefect's client no longer has the method; the message says what to use meanwhile.
    """
    from prefect.client.orchestration import PrefectClient

    stock: Any = getattr(PrefectClient, "read_deployment_by_name", None)
    if stock is None:
        raise RuntimeError(
            "this version of Prefect has no PrefectClient.read_deployment_by_name, which this plugin widens to bare "
            "names; use FLOW/DEPLOYMENT, e.g. mft-ablation/mft-ablation, or the pinned Prefect"
        )

    async def read_deployment_by_name(self: PrefectClient, name: str) -> DeploymentResponse:
        return await stock(self, name if "/" in name else await _full_name(self, name))

    PrefectClient.read_deployment_by_name = read_deployment_by_name  # type: ignore[method-assign, assignment]


async def _full_name(client: PrefectClient, name: str) -> str:
    """Return FLOW/DEPLOYMENT for the only deployment of that name; if there is none, leave with a list of all."""
    from prefect.cli._utilities import exit_with_error
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    fitting = await _names(client, DeploymentFilter(name=DeploymentFilterName(any_=[name])))
    if len(fitting) == 1:
        return fitting[0]
    where = f"at {client.api_url}"
    if fitting:
        exit_with_error(f"deployment name '{name}' is ambiguous {where}; say which one: {', '.join(fitting)}")
    known = await _names(client)
    if not known:
        exit_with_error(f"no deployment '{name}' {where}: there are none at all. Start `mft up` to serve them.")
    near = did_you_mean(name, [full.split("/", 1)[1] for full in known])
    exit_with_error(f"no deployment '{name}' {where}.{near} Deployments there: {', '.join(known)}")


async def _names(client: PrefectClient, which: DeploymentFilter | None = None) -> list[str]:
    """List deployments as FLOW/DEPLOYMENT, sorted; at most the server's page of 200."""
    deployments = await client.read_deployments(deployment_filter=which)
    flows = {flow_id: (await client.read_flow(flow_id)).name for flow_id in {item.flow_id for item in deployments}}
    return sorted(f"{flows[item.flow_id]}/{item.name}" for item in deployments)

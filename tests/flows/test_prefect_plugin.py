"""`prefect deployment run NAME` with a bare name, and the parts of Prefect that this stands on."""

from __future__ import annotations

import asyncio
import inspect
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prefect
import pytest
from prefect.cli import deployment as command
from prefect.client.orchestration import PrefectClient
from prefect.plugins import HookContext
from prefect.settings import get_current_settings

from pipelines.servers import prefect_plugin, services

MOVED = (
    f"Prefect {prefect.__version__} is not what pipelines/servers/prefect_plugin.py was written for (3.8.8): "
    "bare deployment names will not work until it is adapted; what moved: "
)


class FakeClient:
    """A server's deployments; `full_names` are FLOW/DEPLOYMENT."""

    api_url = "http://127.0.0.1:4200/api/"

    def __init__(self, *full_names: str) -> None:
        self.full_names = full_names
        self.asked: list[str] = []

    async def read_deployments(self, *, deployment_filter: Any = None) -> list[Any]:
        split = [full.split("/") for full in self.full_names]
        wanted = deployment_filter.name.any_ if deployment_filter else [name for _, name in split]
        return [SimpleNamespace(flow_id=flow, name=name) for flow, name in split if name in wanted]

    async def read_flow(self, flow_id: str) -> Any:
        return SimpleNamespace(name=flow_id)

    async def read_deployment_by_name(self, name: str) -> str:
        self.asked.append(name)
        return name


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teach bare names to a client whose stock look-up only notes what it was asked for."""
    monkeypatch.setattr(PrefectClient, "read_deployment_by_name", FakeClient.read_deployment_by_name)
    prefect_plugin.accept_bare_names()


def look_up(client: FakeClient, name: str) -> Any:
    return asyncio.run(PrefectClient.read_deployment_by_name(client, name))  # type: ignore[arg-type]


@pytest.mark.usefixtures("taught")
def test_a_bare_name_finds_its_only_deployment_and_a_full_name_goes_the_stock_way() -> None:
    client = FakeClient("mft-ablation/mft-ablation", "evaluate/evaluate")
    assert look_up(client, "mft-ablation") == "mft-ablation/mft-ablation"
    assert look_up(client, "some/thing") == "some/thing"


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize(
    ("there", "name", "said"),
    [
        (("mft-ablation/mft-ablation",), "mft-ablatoin", ["Did you mean 'mft-ablation'?", "mft-ablation/mft-ablation"]),
        (("a/same", "b/same"), "same", ["ambiguous", "a/same, b/same"]),
        ((), "mft-ablation", ["none at all", "mft up"]),
    ],
)
def test_a_name_that_fits_none_or_several_says_what_there_is(
    there: tuple[str, ...], name: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient(*there)
    with pytest.raises(SystemExit) as ended:
        look_up(client, name)
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 1
    assert client.asked == []
    for text in (*said, "http://127.0.0.1:4200"):
        assert text in printed


def test_prefect_still_looks_deployments_up_the_way_the_plugin_widens() -> None:
    source = inspect.getsource(command)
    assert "client.read_deployment_by_name(name)" in source, MOVED + "the command's look-up by name"
    assert list(inspect.signature(PrefectClient.read_deployment_by_name).parameters) == ["self", "name"], (
        MOVED + "PrefectClient.read_deployment_by_name"
    )
    asking = inspect.getsource(command.run)
    assert "_assert_deployment_name_format" not in asking, MOVED + "`deployment run` checks the name's form by itself"


def test_prefect_still_finds_and_enables_the_plugin() -> None:
    found = {entry.name: entry.value for entry in metadata.entry_points(group="prefect.plugins")}
    assert found.get("mft") == "pipelines.servers.prefect_plugin"
    root = Path(__file__).parents[2]
    assert "[plugins]\n" in (root / "prefect.toml").read_text()
    assert "enabled" in type(get_current_settings().plugins).model_fields, MOVED + "the setting plugins.enabled"


def test_the_client_is_left_alone_outside_of_deployment_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = PrefectClient.read_deployment_by_name
    monkeypatch.setattr(sys, "argv", ["mft", "run", "sparsity"])
    context = HookContext(prefect_version=prefect.__version__, api_url="http://set", logger_factory=lambda name: None)
    assert prefect_plugin.setup_environment(ctx=context) is None
    assert PrefectClient.read_deployment_by_name is stock


def test_the_living_server_and_its_string_are_used_only_when_no_other_api_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "http://127.0.0.1:1/api"
    monkeypatch.setenv("MFT_HOME", str(tmp_path))
    monkeypatch.setattr(services, "living_server", lambda home: {"prefect": own, "own": True})
    found = {"PREFECT_API_URL": own, "PREFECT_API_AUTH_STRING": services.auth_string(tmp_path)}
    for configured, expected in (("http://mine", None), (None, found), (own, found)):
        context = HookContext(prefect_version="3", api_url=configured, logger_factory=lambda name: None)
        result = prefect_plugin.setup_environment(ctx=context)
        assert (result.env if result else None) == expected
    monkeypatch.setattr(services, "living_server", lambda home: {"prefect": "http://mine", "own": False})
    context = HookContext(prefect_version="3", api_url=None, logger_factory=lambda name: None)
    result = prefect_plugin.setup_environment(ctx=context)
    assert result
    assert result.env == {"PREFECT_API_URL": "http://mine"}, "what only our own servers ask for goes to no other"


def test_a_prefect_without_the_look_up_fails_with_an_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        """A client that lost its method."""

    monkeypatch.setattr("prefect.client.orchestration.PrefectClient", Without)
    with pytest.raises(RuntimeError, match="mft-ablation/mft-ablation"):
        prefect_plugin.accept_bare_names()

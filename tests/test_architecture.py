"""The one rule of imports: pipelines → tasks → mft_core, never upward; and the science knows no orchestrator."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "mft_core": {"prefect", "mlflow", "tasks", "pipelines"},
    "tasks": {"pipelines"},
    "pipelines": set(),
}


def imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_downward_only(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    upward = {str(path.relative_to(ROOT)): imported(path) & FORBIDDEN[package] for path in files}
    assert not {name: bad for name, bad in upward.items() if bad}


def test_every_module_begins_with_its_design_note():
    files = [path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py")]
    without = [str(path) for path in files if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))]
    assert not without


def test_the_graph_is_built_from_what_was_resolved_and_looks_at_nothing_itself():
    files = list((ROOT / "pipelines" / "graph").glob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not {f"{node.module}.{alias.name}" for alias in node.names} & {"pipelines.config.resolve"}, path
                assert node.module != "pipelines.config.resolve", path
            if isinstance(node, ast.Import):
                assert "pipelines.config.resolve" not in {alias.name for alias in node.names}, path

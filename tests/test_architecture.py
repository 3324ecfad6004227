"""The order of rooms (contracts in pyproject.toml) is held for real, and what modules and pages promise is there."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mft_core", "tasks", "pipelines")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docker/*.md"), *ROOT.glob("results/**/*.md")]


def test_pytest_is_given_every_test_file_once_and_so_takes_them_in_that_order():
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    within = [[path for path in given if file.is_relative_to(ROOT / path)] for file in ROOT.glob("tests/**/test_*.py")]
    assert all(len(paths) == 1 for paths in within), "pytest takes the wider of two that overlap, in its own order"


@pytest.mark.parametrize("module", ["mlflow", "prefect.server.api.server", "transformers", "pipelines.cli"])
def test_what_is_installed_is_compiled_so_that_no_process_does_it_again(module: str):
    source = find_spec(module).origin
    assert Path(cache_from_source(source)).is_file(), "python -m compileall: what `make install` does"


def in_words(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize(
    ("module", "statement", "broken"),
    [
        ("mft_core/errors.py", "import mlflow", "no orchestrator"),
        ("mft_core/errors.py", "from mft_core import recipes", "rooms of mft_core"),
        ("mft_core/new_room.py", "", "rooms of mft_core"),
        ("tasks/device.py", "from pipelines import cli", "downward only"),
        ("pipelines/config/setup.py", "from pipelines.plan import plan", "rooms of pipelines"),
        ("pipelines/graph/nodes.py", "from pipelines.config import resolve", "looks at nothing itself"),
    ],
)
def test_an_import_against_the_order_of_rooms_is_refused(tmp_path, module, statement, broken):
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=lambda _, names: [n for n in names if n == "profiles"]
        )
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{statement}\n")
    linter = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(
        [*linter, "--no-cache", str(ROOT / "pyproject.toml")], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    found = re.findall(r"^(.*(?:\n.*)?) BROKEN$", done.stdout, re.MULTILINE)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [name for name in found if broken in name], done.stdout


def test_every_module_begins_with_its_design_note():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    without = [str(path) for path in files if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))]
    assert files
    assert not without


@pytest.mark.parametrize("page", PAGES, ids=in_words(PAGES))
def test_links_and_images_of_a_page_lead_to_files(page):
    inline = [token for block in MarkdownIt().parse(page.read_text()) for token in block.children or ()]
    targets = [str(token.attrs.get("href") or token.attrs.get("src")) for token in inline if token.attrs]
    local = [target.partition("#")[0] for target in targets if not re.match(r"https?:|#", target)]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docker/README.md"])
def test_a_path_of_the_repository_that_a_page_names_is_there(page):
    named = re.findall(
        r"`((?:mft_core|tasks|pipelines|tests|results|notebooks|docker)/[\w./-]*)`", (ROOT / page).read_text()
    )
    assert named
    assert not [path for path in named if "NAME" not in path and not (ROOT / path).exists()]

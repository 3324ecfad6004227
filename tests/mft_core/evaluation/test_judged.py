"""AlpacaEval 2 end to end: a tiny model's answers, a judge that is a server over HTTP, the package's own numbers."""

import csv
import http.server
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mft_core.errors import ConfigError, StageError
from mft_core.evaluation import judged
from mft_core.evaluation.lm_eval_harness import evaluate
from mft_core.evaluation.rehearsal import rehearse
from mft_core.recipes import Evaluate
from pipelines.commands import fetch
from tests.support.tiny import save_checkpoint

COUNT = 40
RECIPE = Evaluate(task="alpaca_eval", metric=judged.METRIC, judge="any-judge")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What `mft fetch alpaca-eval` makes, of instructions of our own and short answers."""
    task = fetch._TASK | {"generation_kwargs": {"until": ["</s>"], "max_gen_toks": 6, "do_sample": False}}
    (tmp_path / "alpaca_eval.yaml").write_text(json.dumps(task))
    rows = [
        {"instruction": f"Say {number}.", "output": "well " * (number % 7 + 1), "generator": "gpt4"}
        for number in range(COUNT)
    ]
    (tmp_path / "alpaca_eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / judged.GAMED).open("w", newline="") as file:
        gamed = csv.writer(file)
        gamed.writerow(
            ["index", "model", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]
        )
        for name, shift in (("concise", 1.0), ("verbose", -1.0)):
            for number in range(COUNT):
                gamed.writerow([number, name, 0.5 - 0.2 * shift, shift + number % 3 / 9, math.sin(number), False])
    return tmp_path


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """A server that prefers the longer answer, with certainty by how much; what it was asked is in the list."""
    pytest.importorskip("alpaca_eval", reason="the packages of the extra `paper`")
    asked: list[dict] = []

    class Judge(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            _, first, second = body["messages"][-1]["content"].split('"output": """')
            chance = 1 / (1 + math.exp(len(second.split('"""')[0]) - len(first.split('"""')[0])))
            tops = [{"token": name, "logprob": math.log(p + 1e-9), "bytes": None}
                    for name, p in (("m", chance), ("M", 1 - chance))]  # fmt: skip
            if body["model"] == "absent-minded" and len(asked) % 4 == 0:
                tops = [{"token": "The", "logprob": -0.1, "bytes": None}]
            message = {"role": "assistant", "content": "m"}
            content = [{**tops[0], "top_logprobs": tops}]
            choice = {"index": 0, "finish_reason": "length", "message": message, "logprobs": {"content": content}}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            told = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "usage": usage}
            answer = json.dumps({**told, "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        yield asked
        server.shutdown()


def test_the_mean_over_the_items_is_the_length_controlled_win_rate(model: Path, folder: Path, judge: list[dict]):
    found = evaluate(RECIPE, model, folder)
    assert found.summary["n"] == COUNT == len(judge)
    assert {body["model"] for body in judge} == {"any-judge"}
    assert all(0 < row["outcome"] < 1 for row in found.items)
    assert found.summary["accuracy"] == pytest.approx(_by_the_package(found.items, folder), abs=1e-9)
    assert evaluate(RECIPE, model, folder).items == found.items


def _by_the_package(items: list[dict], folder: Path) -> float:
    """Return what `alpaca-eval` says itself, of the same answers."""
    import alpaca_eval
    from alpaca_eval.metrics import glm_winrate

    glm_winrate.hf_hub_download = lambda **asked: folder / judged.GAMED
    rows = [json.loads(line) for line in (folder / "alpaca_eval.jsonl").read_text().splitlines()]
    pairs = list(zip(rows, items, strict=True))
    board, _ = alpaca_eval.evaluate(
        [{"instruction": row["instruction"], "output": item["response"], "generator": "tiny"} for row, item in pairs],
        [{name: row[name] for name in ("instruction", "output", "generator")} for row, _ in pairs],
        name="tiny", precomputed_leaderboard=None, output_path=None, is_return_instead_of_print=True,
        metric_kwargs={"save_weights_dir": None}, caching_path=None, seed=RECIPE.seed,
    )  # fmt: skip
    return float(board.loc["tiny", "length_controlled_winrate"]) / 100


def test_planning_asks_no_judge(model: Path, folder: Path, judge: list[dict]):
    rehearse(RECIPE, model, folder)
    assert not judge


def test_a_judge_that_does_not_answer_is_named(
    model: Path, folder: Path, judge: list[dict], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(StageError, match="judge = any-judge: it does not answer"):
        evaluate(RECIPE.model_copy(update={"limit": 2}), model, folder)


def test_answers_that_are_no_judgement_are_counted_and_no_result(model: Path, folder: Path, judge: list[dict]):
    with pytest.raises(StageError, match=r"judge = absent-minded: 10 of 40 answers name none of the two outputs"):
        evaluate(RECIPE.model_copy(update={"judge": "absent-minded"}), model, folder)


def test_what_a_judged_task_lacks_is_said_before_anything_is_answered(model: Path, folder: Path):
    with pytest.raises(ConfigError, match=r"needs a judge"):
        evaluate(RECIPE.model_copy(update={"judge": None}), model, folder)
    pytest.importorskip("alpaca_eval", reason="the packages of the extra `paper`")
    (folder / judged.GAMED).unlink()
    with pytest.raises(ConfigError, match="mft fetch alpaca-eval"):
        evaluate(RECIPE, model, folder)

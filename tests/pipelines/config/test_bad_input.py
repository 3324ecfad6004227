"""Each mistake: one clear message, exit code 2 before any compute, nothing half-written."""

import json
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import yaml
from s3fs import S3FileSystem
from safetensors.torch import load_file

from mft_core.errors import ConfigError
from pipelines.cli import main
from pipelines.config import resolve
from pipelines.config.profile import load_profile
from pipelines.config.setup import ModelSpec
from pipelines.config.study import load_studies
from tests.support.mini import row, write_profile, write_rows, write_study
from tests.support.tiny import TULU


@pytest.fixture
def mft(monkeypatch, capsys):
    """Run the command line in this process: what is refused never gets as far as starting servers or threads."""

    def call(*arguments, home):
        monkeypatch.setenv("MFT_HOME", str(home))
        monkeypatch.setattr(sys, "argv", ["mft", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return Done(exit_.value.code, capsys.readouterr().err)

    return call


class Done(NamedTuple):
    """How a command ended and what it wrote to stderr."""

    returncode: int
    stderr: str


def refused(done, home, *words):
    """Check that a command ended with 2, said one thing without a traceback, and computed nothing."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (home / "artifacts").exists()
    assert not (home / "work").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    write_profile(path)
    write_study(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "sparsty"], ["unknown study 'sparsty'", "Did you mean 'sparsity'"]),
        (["run", "nothing.yaml"], ["study = nothing.yaml", "no such file"]),
        (["run", "sparsity", "--profile", "tiney"], ["unknown profile 'tiney'", "Did you mean 'tiny'"]),
        (["stage", "learn-masks", "sparsity"], ["unknown stage 'learn-masks'", "Did you mean 'learn-mask'"]),
        (["run", "sparsity", "--rerun", "evalute"], ["unknown stage 'evalute'", "Did you mean 'evaluate'"]),
        (["run", "sparsity", "--seeds", "a"], ["--seeds 'a'", "whole numbers"]),
        (
            ["run", "main", "--set", "continued.domain=nowhere"],
            ["continued.domain of", "'nowhere'", "symbols"],
        ),
        (["run", "sparsity", "--seeds", "1,1"], ["--seeds '1,1'", "different"]),
    ],
)
def test_an_unknown_name_is_refused(mft, arguments, words, tmp_path):
    refused(mft(*arguments, home=tmp_path / "home"), tmp_path / "home", *words)


GOOD = json.dumps(row("1 + 1 =", "2"))
DATA = [
    ("", ["empty"]),
    ("{broken\n", ["line 1", "JSON"]),
    (GOOD + "\n{broken\n", ["line 2", "JSON"]),
    ('{"text": "hello"}\n', ["line 1", "messages"]),
    ('{"messages": [{"role": "robot", "content": "x"}]}\n', ["line 1", "robot", "assistant"]),
    ('{"messages": [{"role": "user", "content": "x"}]}\n', ["line 1", "assistant"]),
    ('{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]}\n', ["line 1", "content"]),
    (None, ["no such file"]),
]


@pytest.mark.parametrize(("content", "words"), DATA)
def test_a_bad_data_file_is_refused_with_file_and_line(mft, folder, tmp_path, content, words):
    data = tmp_path / "rows.jsonl"
    if content is not None:
        data.write_text(content)
    done = mft(
        "run", folder / "mini-study.yaml", "--profile", folder / "mini.yaml",
        "--set", f"data.mixture=[{{path: {data}}}]", home=tmp_path / "home",
    )  # fmt: skip
    refused(done, tmp_path / "home", "rows.jsonl", *words)


def altered(tmp_path, **changes):
    write_profile(tmp_path, **changes)
    return tmp_path / "mini.yaml"


def test_a_tokenizer_without_a_chat_template_is_refused(mft, tmp_path, folder):
    profile = altered(tmp_path)
    (tmp_path / "model" / "chat_template.jinja").unlink()
    done = mft("run", folder / "mini-study.yaml", "--profile", profile, home=tmp_path / "home")
    refused(done, tmp_path / "home", "chat template", "model.chat_template")


def test_a_tokenizer_that_panics_at_a_text_is_told_in_a_sentence(mft, tmp_path, folder):
    profile = altered(tmp_path)
    path = tmp_path / "model" / "tokenizer.json"
    normalizer = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normalizer}))
    write_rows(tmp_path / "data" / "sums.jsonl", [row("a" * 60 + "!", "b")] * 20)
    refused(planned(mft, profile, folder, tmp_path / "home"), tmp_path / "home", "the tokenizer gives up on a text")


def test_a_shipped_chat_template_is_known_by_its_name_and_an_unknown_one_refused_with_theirs(mft, tmp_path, folder):
    home = tmp_path / "home"
    profile = altered(tmp_path / "a", model={"path": "./model", "chat_template": "tula"})
    refused(planned(mft, profile, folder, home), home, "model.chat_template = tula", "plain, plain_bos, tulu")
    named, copied = (
        resolve.resolved_model(ModelSpec(path=str(folder / "model"), chat_template=template)).template
        for template in ("tulu", str(shutil.copy(TULU, tmp_path / "copied.jinja")))
    )
    assert named.digest == copied.digest, "what it says is what counts"


def test_a_model_that_is_not_a_decoder_is_refused(mft, tmp_path, folder):
    profile = altered(tmp_path)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    done = mft("run", folder / "mini-study.yaml", "--profile", profile, home=tmp_path / "home")
    refused(done, tmp_path / "home", "not a decoder", "BertForMaskedLM")


def test_an_unknown_benchmark_of_lm_eval_is_refused(mft, tmp_path, folder):
    profile = altered(tmp_path, benchmarks=[{"name": "x", "task": "gsm8kk"}])
    done = mft("run", folder / "mini-study.yaml", "--profile", profile, home=tmp_path / "home")
    refused(done, tmp_path / "home", "gsm8kk", "gsm8k")


def test_an_unknown_local_benchmark_is_refused(mft, tmp_path, folder):
    profile = altered(tmp_path, benchmarks=[{"name": "x", "task": "mini_sum", "path": "benchmarks"}])
    done = mft("run", folder / "mini-study.yaml", "--profile", profile, home=tmp_path / "home")
    refused(done, tmp_path / "home", "mini_sum", "mini_sums")


def test_a_missing_model_is_refused(mft, tmp_path, folder):
    profile = altered(tmp_path, model={"path": "./elsewhere"})
    done = mft("run", folder / "mini-study.yaml", "--profile", profile, home=tmp_path / "home")
    refused(done, tmp_path / "home", "elsewhere", "no such directory")


def planned(mft, profile, folder, home, *more):
    return mft("run", folder / "mini-study.yaml", "--profile", profile, *more, home=home)


def test_a_length_that_no_example_fits_is_refused(mft, tmp_path, folder):
    done = planned(mft, folder / "mini.yaml", folder, tmp_path / "home", "--set", "data.max_length=2")
    refused(done, tmp_path / "home", "data.max_length = 2", "too long")


def test_more_rows_than_a_file_holds_are_refused(mft, tmp_path, folder):
    profile = altered(
        tmp_path,
        data={"max_length": 64, "validation_rows": 8, "mixture": [{"path": "data/sums.jsonl", "rows": 61}]},
    )
    done = planned(mft, profile, folder, tmp_path / "home")
    refused(done, tmp_path / "home", "rows = 61", "holds only 60", "sums.jsonl")


def test_a_model_without_weights_is_refused(mft, tmp_path, folder):
    profile = altered(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    said = []
    for command in ("plan", "run"):
        done = mft(command, folder / "mini-study.yaml", "--profile", profile, home=tmp_path / "home")
        refused(done, tmp_path / "home", "no weight files", "model.path")
        said.append(done.stderr)
    assert said[0] == said[1], "plan and run look at the same thing"


def test_a_base_of_pickled_weights_is_no_model_to_rewind_to_and_refused_before_compute(mft, tmp_path, folder):
    profile = altered(tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    study = write_study(tmp_path, [{"method": "rewind"}])
    done = mft("run", study, "--profile", profile, home=tmp_path / "home")
    refused(done, tmp_path / "home", "no readable model.safetensors", "Pickled weights (*.bin) are not read here")


@pytest.mark.parametrize(
    ("index", "words"),
    [('{"weight_map": {"a": "model-2.safetensors"}}', ["model-2.safetensors", "missing"]), ("[]", ["index"])],
)
def test_a_model_with_a_part_of_its_weights_is_refused(mft, tmp_path, folder, index, words):
    profile = altered(tmp_path)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    for command in ("plan", "run"):
        done = mft(command, folder / "mini-study.yaml", "--profile", profile, home=tmp_path / "home")
        refused(done, tmp_path / "home", *words)


@pytest.mark.parametrize("content", ["{broken", "[]"])
def test_a_broken_configuration_of_the_model_is_refused(mft, tmp_path, folder, content):
    profile = altered(tmp_path)
    (tmp_path / "model" / "config.json").write_text(content)
    refused(planned(mft, profile, folder, tmp_path / "home"), tmp_path / "home", "config.json")


def test_an_unknown_filter_of_a_local_benchmark_is_refused(mft, tmp_path, folder):
    profile = altered(
        tmp_path, benchmarks=[{"name": "x", "task": "mini_sums", "path": "benchmarks", "filter": "strict"}]
    )
    refused(planned(mft, profile, folder, tmp_path / "home"), tmp_path / "home", "filter", "'strict'", "none")


def test_a_benchmark_without_its_items_is_refused(mft, tmp_path, folder):
    profile = altered(tmp_path)
    (tmp_path / "benchmarks" / "sums.jsonl").unlink()
    refused(planned(mft, profile, folder, tmp_path / "home"), tmp_path / "home", "sums.jsonl", "no such file")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("task: [\n", ["sums.yaml", "YAML"]),
        ("process_results: !function utils.f\n", ["!function utils.f", "allow_code: true"]),
        ("process_results: !!python/name:os.system\n", ["sums.yaml", "YAML"]),
        ('description: "{{ cycler.__init__ }}"\n', ["sums.jsonl line 1", "description", "unsafe"]),
    ],
)
def test_a_definition_that_cannot_be_read_or_would_run_code_is_refused(mft, tmp_path, folder, line, words):
    profile = altered(tmp_path)
    with (tmp_path / "benchmarks" / "sums.yaml").open("a") as definition:
        definition.write(line)
    refused(planned(mft, profile, folder, tmp_path / "home"), tmp_path / "home", *words)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{{ 'assistant:' if add_generation_prompt }}",
            ["no end of turn is trained", "</s>"],
        ),
        ("{{ strftime_now('%d %b %Y') }}{{ messages[-1].content }}</s>", ["today's date", "model.chat_template"]),
        ("{% if messages %}", ["chat template", "cannot be read"]),
    ],
)
def test_a_chat_template_that_cannot_be_trained_on_is_refused(mft, tmp_path, folder, template, words):
    profile = altered(tmp_path)
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    refused(planned(mft, profile, folder, tmp_path / "home"), tmp_path / "home", *words)


@pytest.mark.parametrize("url", ["s3://user:hunter22@bucket/x", "ftp://user:hunter22@nowhere.invalid/x"])
def test_a_shared_store_that_cannot_be_reached_is_refused_without_its_password(mft, tmp_path, folder, monkeypatch, url):
    monkeypatch.setenv("MFT_STORE", url)
    for command in ("plan", "run", "report"):
        done = mft(command, folder / "mini-study.yaml", "--profile", folder / "mini.yaml", home=tmp_path / "home")
        refused(done, tmp_path / "home", f"MFT_STORE = {url.replace('hunter22', '***')}")
        assert "hunter22" not in done.stderr
    S3FileSystem.clear_instance_cache()  # other tests have credentials


def test_an_unwritable_home_is_refused(mft, folder):
    done = mft("run", folder / "mini-study.yaml", "--profile", folder / "mini.yaml", home="/proc/nowhere")
    assert done.returncode == 2
    assert "MFT_HOME = /proc/nowhere" in done.stderr


def test_a_misspelt_key_of_a_profile_is_refused_with_the_valid_ones(mft, tmp_path, folder):
    profile = altered(tmp_path)
    values = yaml.safe_load(profile.read_text())
    values["defaults"]["fine_tune"]["learning_rat"] = 1
    profile.write_text(yaml.safe_dump(values))
    done = mft("run", folder / "mini-study.yaml", "--profile", profile, home=tmp_path / "home")
    refused(done, tmp_path / "home", "fine_tune.learning_rat", "Did you mean 'learning_rate'")


def test_too_little_disk_is_said_with_the_number_needed(folder, tmp_path, monkeypatch):
    import shutil

    from mft_core.errors import ConfigError
    from mft_core.store.artifacts import ArtifactStore
    from pipelines.config.profile import load_profile
    from pipelines.config.study import load_study
    from pipelines.plan.plan import check_disk, make_plan

    plan = make_plan(
        load_study(str(folder / "mini-study.yaml")), load_profile(str(folder / "mini.yaml")),
        ArtifactStore(tmp_path / "home"),
    )  # fmt: skip
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConfigError, match=r"the plan needs about 0\.0\d GB, 0\.00 GB are free"):
        check_disk(plan, tmp_path)


def test_help_answers_without_heavy_imports():
    code = "import sys, pipelines.cli; print([m for m in ('torch','prefect','mlflow','pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_of_many_mistakes_and_long_names_is_told_in_a_few_lines(mft, tmp_path):
    (tmp_path / "study.yaml").write_text("".join(f"k{n}: 1\n" for n in range(5000)))
    done = mft("plan", tmp_path / "study.yaml", home=tmp_path / "home")
    refused(done, tmp_path / "home", "unknown key 'k0'")
    assert len(done.stderr) < 5000
    refused(mft("plan", "x" * 100_000, home=tmp_path / "home"), tmp_path / "home", "unknown study 'xxx")


def test_a_profile_that_extends_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="the profile extends itself"):
        load_profile(str(tmp_path / "a.yaml"))


def test_a_study_that_is_made_of_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("question: q\nstudies: [b.yaml]\n")
    (tmp_path / "b.yaml").write_text("question: q\nstudies: [main, a.yaml]\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: studies: the study is made of itself; name others"):
        load_studies("a.yaml")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["engine=vllm"], ["engine = vllm", "MFT_VLLM", "make vllm"]),
        (["engine=openai"], ["engine = openai", "runtime.engine_url = None"]),
        (["engine=openai", "runtime.engine_url=http://127.0.0.1:9/v1"], ["no server answers", "127.0.0.1:9"]),
        (["engine=vlm"], ["engine", "'vlm'", "'hf', 'vllm' or 'openai'"]),
    ],
)
def test_an_engine_that_is_not_there_is_refused(mft, folder, tmp_path, monkeypatch, settings, words):
    monkeypatch.setenv("MFT_VLLM", str(tmp_path / "nowhere"))
    given = [word for setting in settings for word in ("--set", setting)]
    done = mft("run", folder / "mini-study.yaml", "--profile", folder / "mini.yaml", *given, home=tmp_path / "home")
    refused(done, tmp_path / "home", *words)


def test_a_model_that_the_engine_cannot_compute_is_refused(mft, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_VLLM", sys.executable)  # is there, and would be started
    given = ["--profile", folder / "mini.yaml", "--set", "engine=vllm", "--set", "runtime.device=cpu"]
    done = mft("run", folder / "mini-study.yaml", *given, home=tmp_path / "home")
    refused(done, tmp_path / "home", "engine = vllm", "have 8", "engine: hf")


def test_a_study_of_two_engines_is_refused(mft, folder, tmp_path):
    study = write_study(tmp_path, [{"method": "fft", "grid": {"engine": ["hf", "openai"]}}])
    done = mft("run", study, "--profile", folder / "mini.yaml", home=tmp_path / "home")
    refused(done, tmp_path / "home", "hf, openai", "no fair comparison")

"""The paper's profiles: METHOD.md's settings to the letter, and the same code as `tiny`, on a local copy of the hub.

The local hub has the layout of a real `HF_HOME`, with a random 32-layer Llama and rows of the true schema; nothing is
fetched. What runs there runs in a process of its own, because the hub's clients read their settings once.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mft_core.data.rows import parse_row
from mft_core.evaluation.benchmarks import TASKS
from mft_core.store.sources import Source, local_file
from pipelines.config import resolve
from pipelines.config.profile import load_profile
from pipelines.config.setup import BenchmarkSpec
from pipelines.config.study import Study
from pipelines.config.yaml_to_setups import setups
from tests.support.tiny import TULU, make_tokenizer

PROFILES = ("llama2-7b", "llama3.1-8b")
COMMITS = {"model": "0123456789abcdef0123456789abcdef01234567", "dataset": "89abcdef0123456789abcdef0123456789abcdef"}
MIXTURES = {
    "math": {
        "KKHYA/metamath_converted": 10000,
        "KKHYA/numinamath_tir_converted": 10000,
        "KKHYA/numinamath_cot_converted": 10000,
        "allenai/tulu-3-sft-personas-math": 10000,
        "allenai/tulu-3-sft-personas-math-grade": 10000,
        "allenai/tulu-3-sft-personas-algebra": 10000,
    },
    "coding": {
        "allenai/tulu-3-sft-personas-code": 10000,
        "KKHYA/evol_codealpaca_converted": 10000,
        "KKHYA/codefeedback_filtered_instructions_converted": 10000,
    },
    "instruction": {
        "allenai/tulu-3-sft-personas-instruction-following": 10000,
        "KKHYA/oasst1_converted": 7000,
        "KKHYA/oasst2_converted": 9000,
        "KKHYA/coconot_converted": 10000,
        "KKHYA/aya_dataset_converted": 10000,
        "KKHYA/daring_anteater_converted": 10000,
    },
}
MIXTURES["mixed"] = {name: rows for mixture in MIXTURES.values() for name, rows in mixture.items()}
LAYERS = {"math": "4-7", "coding": "20-23", "instruction": "0-3", "mixed": "4-7"}
BENCHMARKS = {  # task, few-shot examples, metric
    "math": [("paper_gsm8k", 8, "exact_match"), ("paper_math", 4, "flexible_match")],
    "coding": [("paper_humaneval", 0, "pass@1"), ("paper_humaneval_plus", 0, "pass@1")],
    "instruction": [("ifeval", 0, "inst_level_loose_acc")],
    "mixed": [
        ("paper_gsm8k", 8, "exact_match"),
        ("paper_math", 4, "flexible_match"),
        ("paper_humaneval", 0, "pass@1"),
        ("ifeval", 0, "inst_level_loose_acc"),
    ],
}


def domain_setups(profile):
    """Return the setup of a learned mask in each domain."""
    variants = [{"method": "mft", "domain": domain} for domain in MIXTURES]
    study = Study.model_validate({"name": "s", "question": "?", "variants": variants, "seeds": [0]})
    return {setup.domain: setup for setup, _ in setups(study, load_profile(profile), {})}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_profile_has_the_papers_mixtures_layers_and_benchmarks(profile):
    found = domain_setups(profile)
    assert set(found) == set(load_profile(profile).domains) == set(MIXTURES)
    for domain, setup in found.items():
        assert {source.path: source.rows for source in setup.data.mixture} == MIXTURES[domain]
        assert setup.mask.layers == LAYERS[domain]
        assert [(b.task, b.num_fewshot, b.metric) for b in setup.benchmarks] == BENCHMARKS[domain]
        assert all(bench.path is None and bench.limit is None for bench in setup.benchmarks)
        assert not any(bench.apply_chat_template for bench in setup.benchmarks)
        assert all((bench.average == "tasks") == (bench.name == "math") for bench in setup.benchmarks)


@pytest.mark.parametrize("profile", PROFILES)
def test_fine_tuning_and_mask_have_the_papers_optimisation(profile):
    for setup in domain_setups(profile).values():
        assert setup.fine_tune == setup.continued.training == setup.mask.training
        training = setup.fine_tune
        assert (training.learning_rate, training.epochs, training.batch_size) == (2e-5, 2, 128)
        assert (training.schedule, training.warmup_share, training.weight_decay) == ("linear", 0.03, 0)
        assert (training.max_grad_norm, training.dropout, training.precision) == (None, 0, "bfloat16")
        assert training.loss == setup.lora.training.loss == "sequence"
        assert (training.seed, training.max_steps) == (42, None)
        assert (setup.mask.sparsity, setup.mask.modules, setup.mask.score_init) == (0.1, "both", "normal")
        assert (setup.data.max_length, setup.data.seed, setup.data.fraction) == (4096, 42, 1)
        assert resolve._template(setup.model.chat_template) == local_file(TULU, "the template")


def test_the_two_profiles_differ_in_the_backbone_only():
    for domain, setup in domain_setups("llama3.1-8b").items():
        other = domain_setups("llama2-7b")[domain]
        assert setup.model.path == "meta-llama/Llama-3.1-8B"
        assert other.model.path == "meta-llama/Llama-2-7b-hf"
        same = {"backbone": other.backbone, "model": other.model}
        assert setup.model_copy(update=same) == other


def test_every_benchmark_is_defined_by_lm_eval_or_by_us_with_its_metric_and_length_of_answers():
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    from mft_core.evaluation.lm_eval_harness import task_leaves
    from pipelines.commands.doctor_hub import task_finding

    tasks = Path(lm_eval.tasks.__file__).parent
    folders = [str(tasks / "benchmarks"), str(tasks / "ifeval"), str(TASKS)]
    index = TaskManager(include_path=folders, include_defaults=False).task_index
    for setup in domain_setups("llama2-7b").values():
        for bench in setup.benchmarks:
            leaves = task_leaves(bench.task, index)
            assert len(leaves) == (7 if bench.task == "paper_math" else 1)
            finding = task_finding(bench, leaves, index)
            assert finding.ok or "needs" in finding.detail, finding  # the packages of the extra `paper` may be absent
            assert {leaf.cfg["num_fewshot"] for leaf in leaves} == {bench.num_fewshot}
            tokens = {leaf.cfg["generation_kwargs"]["max_gen_toks"] for leaf in leaves}
            assert tokens == {1280 if bench.task == "ifeval" else 512}
            wrong = bench.model_copy(update={"metric": "bleu"})
            assert not task_finding(wrong, leaves, index).ok


def write_local_hub(home):
    """Lay out a hub cache: a model without a chat template, and each data set of the mixtures with its parquet file."""
    for name in ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B"):
        snapshot = write_repository(home, "model", name)
        tokenizer = make_tokenizer(chat_template=False)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=32,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
    for name in {name for mixture in MIXTURES.values() for name in mixture}:
        write_dataset(write_repository(home, "dataset", name), name.split("/")[1])


def write_repository(home, kind, name):
    folder = home / "hub" / f"{kind}s--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMITS[kind])
    snapshot = folder / "snapshots" / COMMITS[kind]
    snapshot.mkdir(parents=True)
    return snapshot


def write_dataset(snapshot, name):
    """Write 40 rows as the published ones are: `messages` beside columns that are of no use here."""
    rows = [
        {
            "id": f"{name}_{index}",
            "prompt": f"What is {index} + 4?",
            "messages": [
                {"content": f"({name}) What is {index} + 4?", "role": "user"},
                {"content": f"The sum of {index} and 4 is {index + 4}.", "role": "assistant"},
            ],
            "dataset": name,
        }
        for index in range(40)
    ]
    parse_row(rows[0], name)
    (snapshot / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), snapshot / "data" / "train-00000-of-00001.parquet")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    (snapshot / "README.md").write_text(card)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Return what `on_local_hub` found in a process of its own, with nothing but the local hub."""
    folder = tmp_path_factory.mktemp("hub")
    write_local_hub(folder / "huggingface")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"MFT_HOME": str(folder / "mft")}
    code = f"import json; from {__name__} import on_local_hub; print(json.dumps(on_local_hub()))"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def on_local_hub():
    return {"planned": {profile: planned_on(profile) for profile in PROFILES}, "made": run_to_the_mask()}


def plan_on(profile, *overrides, domains=tuple(MIXTURES)):
    from mft_core.store.artifacts import ArtifactStore
    from pipelines.plan.plan import make_plan

    variants = [{"method": method, "domain": domain} for domain in domains for method in ("base", "fft", "mft")]
    study = Study.model_validate({"name": "s", "question": "?", "variants": variants, "seeds": [0]})
    store = ArtifactStore.from_environment()
    return make_plan(study, load_profile(profile), store, overrides), store


def planned_on(profile):
    """Plan all domains; say what each stage takes from outside."""
    plan, _ = plan_on(profile)
    return [
        {
            "stage": step.node.stage,
            "label": step.node.label,
            "sources": [
                [name, given.location, given.revision]
                for name, given in step.node.inputs.items()
                if isinstance(given, Source)
            ],
        }
        for step in plan.steps
    ]


def test_all_domains_are_planned_offline_with_revisions_pinned_by_the_local_cache(offline):
    for profile, steps in offline["planned"].items():
        sources = {(location, revision) for step in steps for _, location, revision in step["sources"]}
        names = {name for mixture in MIXTURES.values() for name in mixture}
        assert {(name, COMMITS["dataset"]) for name in names} <= sources
        assert (domain_setups(profile)["math"].model.path, COMMITS["model"]) in sources
        assert [step["label"] for step in steps if step["stage"] == "prepare-data"] == [
            f"prepare-data {domain}" for domain in MIXTURES
        ]
        for domain, layers in LAYERS.items():
            assert any(step["label"].startswith(f"learn-mask sparsity=0.1 layers={layers} ") for step in steps), domain
        bases = [step for step in steps if step["label"].endswith(" of base")]
        assert len(bases) == 5
        assert all("chat_template" in [name for name, *_ in step["sources"]] for step in bases)


def run_to_the_mask():
    """Prepare data, fine-tune and learn a mask in two steps each, through the stages that every profile uses."""
    from mft_core.stages import STAGES
    from pipelines.graph.nodes import Edge, closure

    mixture = ", ".join(f"{{path: {name}, rows: 30}}" for name in MIXTURES["math"])
    short = [f"{part}.{key}" for part in ("fine_tune", "mask.training") for key in ("batch_size=8", "max_steps=2")]
    plan, store = plan_on("llama2-7b", f"data.mixture=[{mixture}]", "data.validation_rows=8", *short, domains=["math"])
    made, directories = {}, {}
    for node in closure(item.trained for item in plan.variants if item.trained):
        inputs = {
            name: made[given.node.id].at(given.part) if isinstance(given, Edge) else given
            for name, given in node.inputs.items()
        }
        built = store.build(STAGES[node.stage], node.recipe, inputs, plan.runtime)
        made[node.id] = built.ref
        directories[node.stage] = [str(store.directory(node.stage, built.ref.key)), built.manifest["summary"]]
    return directories


@pytest.mark.timeout(180)
def test_data_fine_tuning_and_mask_run_offline_through_the_common_stages(offline):
    made = offline["made"]
    _, data = made["prepare-data"]
    assert data["rows"] == [30] * 6
    assert data["train"]["loss_tokens"] > 0

    folder, tuned = made["fine-tune"]
    assert tuned["steps"] == 2
    checkpoint = Path(folder) / "model"
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template == TULU.read_text()
    assert AutoModelForCausalLM.from_pretrained(checkpoint).dtype.itemsize == 2

    folder, mask = made["learn-mask"]
    assert mask["steps"] == 2
    assert mask["layers"] == "4-7"
    per_layer = 4 * [16 * 16] + 3 * [16 * 32]
    assert mask["zeros"] == 4 * sum(int(0.1 * size) for size in per_layer)
    example = json.loads((Path(made["prepare-data"][0]) / "examples.json").read_text())[0]
    assert example["text"].startswith("<|user|>\n(")
    assert "<|assistant|>\n" in example["text"]


def test_a_paper_profile_is_planned_without_hub_cache_or_weights_but_not_run(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "MFT_HOME": str(tmp_path / "mft")}
    command = [sys.executable, "-m", "pipelines.cli"]
    root = Path(__file__).resolve().parents[3]

    def call(*words):
        return subprocess.run([*command, *words], cwd=root, env=environment, capture_output=True, text=True)

    for profile, weights in (("llama2-7b", 6_738_415_616), ("llama3.1-8b", 8_030_261_248)):
        done = call("plan", "sparsity", "--profile", profile, "--on", "h100", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert "Not pinned: the hub cannot be asked" in found["device"]["assumed"]
        tuned = next(stage for stage in found["stages"] if stage["stage"] == "fine-tune")
        assert tuned["memory_parts_bytes"]["optimizer"] == 8 * weights
    refused = call("run", "sparsity", "--profile", "llama2-7b")
    assert refused.returncode == 2
    assert "meta-llama/Llama-2-7b-hf" in refused.stderr


def test_a_benchmark_that_we_define_is_known_by_its_files_and_lm_evals_own_by_its_version(tmp_path, monkeypatch):
    copy = Path(shutil.copytree(TASKS, tmp_path / "tasks"))
    monkeypatch.setattr(resolve, "TASKS", copy)
    names = ("paper_gsm8k", "paper_math", "ifeval")

    def digests():
        resolve._harness.cache_clear()
        return [resolve.benchmark(BenchmarkSpec(name="b", task=name)).digest for name in names]

    before = digests()
    for name in ("gsm8k/gsm8k_rules.py", "math/paper_math_subject.yaml"):
        (copy / name).write_text((copy / name).read_text() + "\n# other\n")
    changed = [one != other for one, other in zip(digests(), before, strict=True)]
    assert changed == [True, True, False]
    resolve._harness.cache_clear()

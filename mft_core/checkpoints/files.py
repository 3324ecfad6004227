"""Hugging Face checkpoint directories: read as models or tensor by tensor, written so that any tool loads
them.

Whatever is not a decoder, or lacks weights, is refused before compute: transformers alone would fill missing
weights with random numbers and a warning. Used by the stages that train, mask and merge."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity

from mft_core.checkpoints.names import Piece, find_pieces
from mft_core.compute import PROCESS_WIDE
from mft_core.errors import ConfigError, StageError, first_line
from mft_core.names import inside
from mft_core.sandbox import asks_for_code
from mft_core.store.sources import parts, terms

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SINGLE, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_LFS = b"version https://git-lfs"
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout")
_DECODERS = {
    name
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for name in ((names,) if isinstance(names, str) else names)
}


def read_config(directory: Path) -> Any:
    """Return the configuration of a decoder's checkpoint.

    Raises:
        ConfigError: no readable checkpoint, not a decoder, or quantised.
    """
    _check_names(directory)
    _check_adapter(directory)
    try:
        if (directory / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # as below
        raise ConfigError(
            f"model = {directory}: generation_config.json cannot be read ({error}); copy it again, or leave it out."
        ) from error
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its readers raise
        raise asks_for_code(directory, "config.json") or ConfigError(
            f"model = {directory}: no readable Hugging Face checkpoint ({error})."
        ) from error
    names = [str(name) for name in config.architectures] if isinstance(config.architectures, list) else []
    if config.is_encoder_decoder or not any(name in _DECODERS for name in names):
        raise asks_for_code(directory, "config.json") or ConfigError(
            f"model = {directory}: {', '.join(names)} is not a decoder; give a causal language model (…ForCausalLM)."
            if names
            else f"model = {directory}: its config.json names no class (architectures), so that it may be no decoder; "
            "copy or download it again, or write the class of a causal language model there (…ForCausalLM)."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"model = {directory} is quantised; give the plain checkpoint that it was made from.")
    return config


def _check_names(directory: Path) -> None:
    """Refuse an index of weights that names files elsewhere; transformers would read them, a merge write them."""
    for index in directory.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise ConfigError(f"model = {directory}: {index.name} is no index of weights ({error!r}).") from error
        for name in names:
            inside(directory, name, f"model = {directory}: weight_map of {index.name}")


def _check_adapter(directory: Path) -> None:
    """Refuse a checkpoint that loaders would take for, or change by, an adapter."""
    if (directory / _ADAPTER).exists():
        raise ConfigError(
            f"model = {directory}: an {_ADAPTER} lies there, so transformers would put that adapter into the model. "
            "If the model is whole without it, move it away (adapter_model.* too); else merge the adapter first: "
            "AutoPeftModelForCausalLM.from_pretrained(OLD).merge_and_unload().save_pretrained(NEW)."
        )


def load_model(directory: Path, dtype: torch.dtype, device: torch.device, dropout: float = 0.0) -> PreTrainedModel:
    """Load a decoder in `dtype` on `device`; every dropout of its configuration is set to `dropout`.

    Raises:
        ConfigError: not a decoder, weights missing, or `dropout` asked of a family that has none.
    """
    config = read_config(directory)
    check_dropout(config, dropout)
    for owner, field in _dropouts(config):
        setattr(owner, field, dropout)
    model: PreTrainedModel = _load(directory, config, dtype).to(device)
    return model


def load_frozen(directory: Path, device: torch.device) -> PreTrainedModel:
    """Load a decoder to look at: frozen, without dropout, in the type that it is stored in; raises as `load_model`."""
    model = load_model(directory, read_config(directory).dtype or torch.float32, device)
    model.eval().requires_grad_(False)
    return model


def check_weights(directory: Path) -> None:
    """Check that the checkpoint can be loaded, without the memory that loading takes, and that its numbers are finite.

    Raises:
        ConfigError: whatever `load_model` would raise; or a weight that is not finite.
    """
    _load(directory, read_config(directory), None, device_map="meta")
    for path, name, weight in _tensors(directory):
        if weight.is_floating_point() and weight.itemsize > 1:
            if not bool(weight.isfinite().all()):
                raise ConfigError(
                    f"model = {directory}: {name} in {path.name} has numbers that are not finite (NaN or "
                    "infinite); give a sound checkpoint."
                )
        elif weight.is_floating_point() or name.endswith(".weight"):  # whole numbers may be positions, or a pattern
            raise ConfigError(
                f"model = {directory}: {name} in {path.name} is {weight.dtype}, so quantised; give the plain "
                "checkpoint that it was made from."
            )


def _tensors(directory: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Yield each tensor of a checkpoint, that of a pickled one where it has no other weights."""
    files = [path for path in sorted(directory.glob("*.safetensors")) if not path.name.startswith("adapter_")]
    for path in files:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (it is no mapping)
                yield path, name, handle.get_tensor(name)
    for path in () if files else sorted(directory.glob("pytorch_model*.bin")):
        in_place = zipfile.is_zipfile(path)
        for name, value in torch.load(path, map_location="cpu", weights_only=True, mmap=in_place).items():
            if isinstance(value, torch.Tensor):
                yield path, name, value


def _load(directory: Path, config: Any, dtype: torch.dtype | None, **where: Any) -> Any:
    """Load the model (on the CPU, if `where` says nothing else) with every weight that it has, and no other layers."""
    disable_progress_bar()  # a stage has its own display, into which this one would write
    level = get_verbosity()
    try:
        with PROCESS_WIDE:
            set_verbosity(logging.CRITICAL)  # its report of what is missing; the error says it
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, config=config, dtype=dtype, local_files_only=True, output_loading_info=True,
                trust_remote_code=False, ignore_mismatched_sizes=True, weights_only=True, **where,
            )  # fmt: skip
    except Exception as error:  # transformers raises whatever its readers raise
        raise _unreadable(directory, error) from error
    finally:
        set_verbosity(level)
    model, info = loaded
    bad = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if bad:
        raise ConfigError(
            f"model = {directory}: {len(bad)} weights are missing or misshapen, e.g. {bad[0]}; config.json and the "
            "weights belong to different models, or the copy is not whole: download it again."
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", math.inf)
    beyond = sorted(key for key in info["unexpected_keys"] if (found := _LAYER.search(key)) and int(found[1]) >= layers)
    if beyond:
        raise ConfigError(
            f"model = {directory}: config.json says {layers} layers, and there are weights of more, e.g. {beyond[0]}; "
            "they would be left out. Set num_hidden_layers to what the checkpoint has."
        )
    return model


def _unreadable(directory: Path, error: Exception) -> ConfigError:
    """Say which file of weights is not what it is called, where that can be told, and what to do."""
    for path in sorted((*directory.glob("*.safetensors"), *directory.glob("*.bin"))):
        with contextlib.suppress(OSError), path.open("rb") as handle:
            if handle.read(len(_LFS)) == _LFS:
                return ConfigError(
                    f"model = {directory}: {path.name} is a Git LFS pointer, not the weights; get them with "
                    "`git lfs pull`, or with `hf download`."
                )
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (OSError, SafetensorError) as damage:
                return ConfigError(
                    f"model = {directory}: {path.name} is damaged or not whole ({damage}); download it again."
                )
    reason = first_line(error)
    if isinstance(error, UnpicklingError):
        reason = "pickled ones (*.bin) are read as plain tensors only, and these are more, or damaged"
    return ConfigError(f"model = {directory}: its weights cannot be loaded ({reason:.200}). Download it again.")


def check_dropout(config: Any, dropout: float) -> None:
    """Raise a ConfigError if `dropout` is asked of a family that has none."""
    if dropout and not _dropouts(config):
        raise ConfigError(f"training.dropout = {dropout}: models of type '{config.model_type}' have none; set it to 0.")


def _dropouts(config: Any) -> list[tuple[Any, str]]:
    """Return the dropouts of a configuration, multimodal ones have theirs in the part for text."""
    owners = [config] if config.get_text_config() is config else [config, config.get_text_config()]
    return [(owner, field) for owner in owners for field in _DROPOUTS if hasattr(owner, field)]


def skeleton(directory: Path) -> PreTrainedModel:
    """Return the model without its weights (meta device), to find sites in it."""
    config = read_config(directory)
    with PROCESS_WIDE, torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return model


def save_model(model: PreTrainedModel, directory: Path, dtype: torch.dtype, source: Path) -> None:
    """Write a trained model as a checkpoint; tokenizer and the like are copied verbatim from `source`.

    The dropout of the training does not stay in the configuration.
    """
    original = read_config(source)
    for (owner, field), (before, _) in zip(_dropouts(model.config), _dropouts(original), strict=True):
        setattr(owner, field, getattr(before, field))
    torch.nn.Module.to(model, dtype).save_pretrained(directory)  # transformers' own `to` is mistyped
    copy_others(source, directory, lambda name: name == "config.json" or _holds_weights(name))


def copy_others(source: Path, directory: Path, written: Callable[[str], bool]) -> None:
    """Copy what belongs to a checkpoint, its licence and model card too, but for the files that are written anew."""
    copy_files(source, directory, (n for n in {*parts("model", source), *terms(source)} if not written(n)))


def copy_files(source: Path, directory: Path, names: Iterable[str]) -> None:
    """Copy files of one checkpoint to another, under the same names."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, directory / name)


def check_written(directory: Path) -> None:
    """Load back a checkpoint that was written, as its users will, but without the memory that the weights take.

    Raises:
        StageError: config, weights or tokenizer cannot be loaded, or a weight is missing, misshapen or not finite.
    """
    try:
        check_weights(directory)
        if (directory / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its readers raise
        reason = first_line(error)
        raise StageError(f"the checkpoint that was made cannot be loaded, nothing of it is kept: {reason}") from error


def _holds_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json"))


class WeightFiles:
    """The matrices of a safetensors checkpoint, one file or sharded, read one at a time.

    They are asked for by `Site.name`, so as the model has them, whatever tensors the checkpoint makes them of.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError when the directory holds no safetensors checkpoint."""
        self.directory = directory
        _check_names(directory)
        try:
            self.file_of = self._locate()
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ConfigError(f"model = {directory}: no readable {_SINGLE} ({error}).{self._advice()}") from error

    def _locate(self) -> dict[str, str]:
        """Find the file of each tensor; where both kinds of checkpoint lie there, transformers takes the one file."""
        index = self.directory / _INDEX
        if index.is_file() and not (self.directory / _SINGLE).is_file():
            found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            missing = sorted(name for name in set(found.values()) if not (self.directory / name).is_file())
            if missing:
                raise FileNotFoundError(f"{missing[0]} of its index is missing")
            return found
        with safe_open(self.directory / _SINGLE, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), _SINGLE)

    def _advice(self) -> str:
        if not any(self.directory.glob("*.bin")):
            return ""
        return (
            " Pickled weights (*.bin) are not read here; convert them: AutoModelForCausalLM.from_pretrained(OLD, "
            "dtype='auto').save_pretrained(NEW), and copy the tokenizer."
        )

    @property
    def files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted(set(self.file_of.values()))

    @functools.cached_property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """The tensors that make up each matrix that the checkpoint has whole, by `Site.name`."""
        return find_pieces(skeleton(self.directory), self.file_of)

    def holds_other_weights(self, name: str) -> bool:
        """Whether a file of the directory holds weights, or names files that do, besides the ones that are read."""
        return _holds_weights(name) and name not in self.files and (name != _INDEX or _SINGLE in self.files)

    def check(self, names: list[str]) -> None:
        """Raise a ConfigError if the checkpoint lacks one of these matrices, or a part of it."""
        for name in names:
            if name not in self.pieces:
                raise ConfigError(
                    f"model = {self.directory}: the checkpoint has no weight named {name}, nor all the tensors that it "
                    "is made of; give a whole checkpoint."
                )

    def tensor(self, name: str) -> Tensor:
        """Return one matrix as it is stored.

        Raises:
            ConfigError: the checkpoint has no matrix of that name, or its file is damaged.
        """
        self.check([name])
        try:
            parts = [self.stored(piece.tensor, piece.index) for piece in self.pieces[name]]
        except SafetensorError as error:
            raise ConfigError(f"model = {self.directory}: {name} cannot be read ({error}).") from error
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tensor_like(self, name: str, weight: Tensor) -> Tensor:
        """Return one matrix in the type of `weight`, which another checkpoint of the architecture has in its place.

        Raises:
            ConfigError: as `tensor`; or it has another shape here, or entries that are not finite.
        """
        found = self.tensor(name)
        if found.shape != weight.shape or not bool(found.isfinite().all()):
            raise ConfigError(
                f"model = {self.directory}: {name} is {tuple(found.shape)} there and has to be {tuple(weight.shape)}, "
                "all of it finite; give the model that the fine-tuning started from."
            )
        return found.to(weight.dtype)

    def tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, matrix) one at a time."""
        for name in names:
            yield name, self.tensor(name)

    def rows(self, name: str) -> Iterator[tuple[Piece, slice]]:
        """Yield the pieces of a matrix, each with the rows of the matrix that it holds."""
        start = 0
        for piece in self.pieces[name]:
            with self._open(piece.tensor) as handle:
                stop = start + handle.get_slice(piece.tensor).get_shape()[-2]
            yield piece, slice(start, stop)
            start = stop

    def stored(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor under the name that it has in the files, or matrix `index` of it."""
        with self._open(name) as handle:
            values: Tensor = handle.get_tensor(name) if index is None else handle.get_slice(name)[index]
            return values

    def _open(self, name: str) -> Any:
        return safe_open(self.directory / self.file_of[name], framework="pt")

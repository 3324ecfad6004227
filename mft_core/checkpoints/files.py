"""Hugging Face checkpoint directories: read as models or tensor by tensor, written so that any tool loads
them.

Whatever is not a decoder, or lacks weights, is refused before compute: transformers alone would fill missing
weights with random numbers and a warning. Used by the stages that train, mask and merge."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from mft_core.checkpoints.names import Piece, find_pieces
from mft_core.compute import PROCESS_WIDE
from mft_core.errors import ConfigError, StageError
from mft_core.names import inside
from mft_core.store.sources import parts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SINGLE, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
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
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model = {directory}: no readable Hugging Face checkpoint ({error}).") from error
    names = config.architectures or []
    if config.is_encoder_decoder or not any(name in _DECODERS for name in names):
        raise ConfigError(
            f"model = {directory}: {', '.join(names) or config.model_type} is not a decoder; "
            "give a causal language model (…ForCausalLM)."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"model = {directory} is quantised; give the plain checkpoint that it was made from.")
    return config


def _check_names(directory: Path) -> None:
    """Refuse an index of weights that names files elsewhere; transformers would read them, a merge write them."""
    for index in directory.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
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
    disable_progress_bar()  # a stage has its own display, into which this one would write
    with PROCESS_WIDE:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    model, info = loaded
    bad = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if bad:
        raise ConfigError(f"model = {directory}: {len(bad)} weights are missing or misshapen, e.g. {bad[0]}.")
    placed: PreTrainedModel = model.to(device)
    return placed


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
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model


def save_model(model: PreTrainedModel, directory: Path, dtype: torch.dtype, source: Path) -> None:
    """Write a trained model as a checkpoint; tokenizer and the like are copied verbatim from `source`.

    The dropout of the training does not stay in the configuration.
    """
    original = read_config(source)
    for (owner, field), (before, _) in zip(_dropouts(model.config), _dropouts(original), strict=True):
        setattr(owner, field, getattr(before, field))
    torch.nn.Module.to(model, dtype).save_pretrained(directory)  # transformers' own `to` is mistyped
    copy_files(source, directory, (n for n in parts("model", source) if n != "config.json" and not _holds_weights(n)))


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
    disable_progress_bar()
    try:
        config = read_config(directory)
        with PROCESS_WIDE:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, config=config, local_files_only=True, output_loading_info=True, device_map="meta"
            )
        bad = sorted(loaded[1]["missing_keys"])
        if (directory / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises whatever its readers raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise StageError(f"the checkpoint that was made cannot be loaded, nothing of it is kept: {reason}") from error
    bad += [name for name, weight in _tensors(directory) if not bool(weight.isfinite().all())]
    if bad:
        raise StageError(
            f"the checkpoint that was made is not sound, nothing of it is kept: {len(bad)} weights are missing or not "
            f"finite, e.g. {bad[0]}"
        )


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                yield name, handle.get_tensor(name)


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
            parts = [self._read(piece) for piece in self.pieces[name]]
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
            with self._open(piece) as handle:
                stop = start + handle.get_slice(piece.tensor).get_shape()[-2]
            yield piece, slice(start, stop)
            start = stop

    def _open(self, piece: Piece) -> Any:
        return safe_open(self.directory / self.file_of[piece.tensor], framework="pt")

    def _read(self, piece: Piece) -> Tensor:
        with self._open(piece) as handle:
            if piece.index is None:
                values: Tensor = handle.get_tensor(piece.tensor)
            else:
                values = handle.get_slice(piece.tensor)[piece.index]
            return values

"""Where a checkpoint keeps a model's matrices: names in files are not always names in modules.

Hub checkpoints may lack the base model's prefix (`h.0.attn.c_attn.weight`), carry another one (multimodal models), or
hold a tensor per expert and projection where the model has one parameter for all of them. transformers renames, stacks
and concatenates when it loads, and undoes it when it saves; its own mapping is asked here, so that what is read of a
file is what `from_pretrained` would have put into the model. Used by `mft_core.checkpoints.files.WeightFiles`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Piece:
    """What a checkpoint has of a matrix: a tensor, or matrix `index` of a 3-D one; pieces follow each other by rows."""

    tensor: str
    index: int | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the piece, a view into the tensor."""
        whole = tensors[self.tensor]
        return whole if self.index is None else whole[self.index]


def find_pieces(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, tuple[Piece, ...]]:
    """Say of which tensors of a checkpoint each matrix of the model is made, by `Site.name`.

    Left out is what the checkpoint lacks or has in part, and what transformers makes in another way than by stacking
    experts and concatenating the rows of their projections.

    Args:
        model: on any device, also meta.
        tensors: names of the checkpoint's tensors.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    sources: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    prefix = model.base_model_prefix
    for name in sorted(tensors, key=dot_natural_key):  # transformers' order, by which experts are numbered
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        sources[target][pattern].append(name)
    pieces: dict[str, tuple[Piece, ...]] = {}
    for target, found in sources.items():
        if target in parameters and parameters[target].ndim in (2, 3):
            shape = parameters[target].shape
            count = shape[0] if len(shape) == 3 else None
            made = _plain(found, count) if None in found else _converted(found, by_pattern, count)
            names = [target] if count is None else [f"{target}[{index}]" for index in range(count)]
            pieces |= dict(zip(names, made, strict=False))
    return pieces


def _plain(found: Mapping[str | None, Sequence[str]], count: int | None) -> list[tuple[Piece, ...]]:
    """One tensor is the parameter; two that claim to be it are as good as none."""
    names = [name for group in found.values() for name in group]
    if len(names) != 1:
        return []
    return [(Piece(names[0], index),) for index in (range(count) if count is not None else [None])]


def _converted(
    found: Mapping[str | None, Sequence[str]], by_pattern: Mapping[str, WeightConverter], count: int | None
) -> list[tuple[Piece, ...]]:
    """A tensor per expert and projection: the rows of an expert's projections follow each other."""
    converter = by_pattern[str(next(iter(found)))]
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    groups = [found.get(pattern, ()) for pattern in converter.source_patterns]
    known = operations in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    if not known or any(len(group) != count for group in groups):
        return []
    return [tuple(Piece(name) for name in projections) for projections in zip(*groups, strict=True)]

"""W ⊙ M as an ordinary checkpoint, and back; or W ⊙ M + V ⊙ (1 − M), where a mask rewinds to an earlier model's V; or
V + (W − V) ⊙ M / (1 − p), where it also rescales what it keeps, p being the share that the matrix rewinds.

Works on the checkpoint's tensors: what is not masked keeps its bytes, so every other weight is bit-identical to the
base, in its dtype, its shard and under its name. Used by the stage `merge-mask` and by the command `mft mask`.

What is set to zero cannot be computed back, but it can be kept, in the folder `mask/` of the merged checkpoint (a
folder, because loaders take every *.safetensors beside config.json for weights of the model):

    mask/mask.safetensors, mask_config.json    the mask, as `mft_core.masks.mask_file` has it
    mask/removed.safetensors                   one 1-D tensor per masked matrix, under its `Site.name` and in its dtype:
                                               the values that were changed, in the matrix's row-major order. The
                                               header's metadata `merged` is JSON: sha256 of each weight file as written
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mft_core.cache_key import digest_file
from mft_core.checkpoints.files import WeightFiles, copy_others
from mft_core.checkpoints.names import Piece
from mft_core.errors import ConfigError
from mft_core.masks.mask_file import Mask, load_mask, save_mask
from mft_core.masks.masked_sites import check_base, tensor_digest
from mft_core.store.outputs import check_new, whole_or_absent

KEPT, REMOVED = "mask", "removed.safetensors"
Report = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


def merge(
    base: Path | str,
    mask_directory: Path | str,
    out: Path | str,
    report: Report = _silent,
    *,
    keep_removed: bool = False,
    rewind_to: Path | str | None = None,
) -> Mask:
    """Write `out`: the checkpoint `base` with the entries that the mask removes set to zero, or rewound.

    The files are written beside `out` and renamed at the end, so that `out` is whole or not there.

    Args:
        mask_directory: as `mft_core.masks.mask_file.save_mask` writes it.
        out: a directory that does not exist, outside of the others.
        report: told how many files of how many are merged.
        keep_removed: keep the mask and the removed values in `out/mask/`, so that `unmerge` can restore the base.
        rewind_to: of a mask that rewinds, and of no other: the model that its entries go back to.

    Returns:
        the mask.

    Raises:
        ConfigError: the mask is damaged, or belongs to another model, or to another one to rewind to; or `out` will
            not do. Nothing is written.
    """
    inputs = [Path(given) for given in (base, mask_directory, rewind_to) if given is not None]
    check_new(Path(out), *inputs)
    mask = load_mask(mask_directory)
    if mask.config.rewinds and rewind_to is None:
        raise ConfigError(
            f"mask = {mask_directory}: it sets weights back to the values of the model that the fine-tuning started "
            "from, not to zero; give that model too (mft mask apply … --rewind-to MODEL)."
        )
    if rewind_to is not None and not mask.config.rewinds:
        raise ConfigError(f"rewind_to = {rewind_to}: the mask sets weights to zero; leave the model to rewind to out.")
    files = WeightFiles(Path(base))
    earlier = None if rewind_to is None else WeightFiles(Path(rewind_to))
    removed, put = {}, {}
    for site in mask.config.sites:
        weight = files.tensor(site.name) if site.name in files.pieces else None
        check_base(site, weight)
        assert weight is not None  # it would have been refused
        cut = mask.changed(site.name)
        if keep_removed:
            removed[site.name] = weight[cut]
        put[site.name] = weight.new_zeros(1).expand(site.zeros)
        if earlier is not None:
            value = earlier.tensor_like(site.name, weight)
            if tensor_digest(value) != site.rewound_sha256:
                raise ConfigError(
                    f"rewind_to = {rewind_to}: the mask goes back to other values of {site.name} (sha256 differs); "
                    "give the model that the mask was learned with."
                )
            if mask.config.rescales:
                further = (weight.float() - value.float()) / (1 - site.zeros / site.numel)
                value = torch.where(mask.kept[site.name], (value.float() + further).to(value.dtype), value)
            put[site.name] = value[cut]
    with whole_or_absent(Path(out), *inputs) as target:
        _rewrite(files, mask, target, report, put)
        if keep_removed:
            save_mask(mask, target / KEPT)
            written = {name: digest_file(target / name) for name in files.files}
            save_file(removed, target / KEPT / REMOVED, metadata={"merged": json.dumps(written, sort_keys=True)})
    return mask


def unmerge(merged: Path | str, out: Path | str, report: Report = _silent) -> Mask:
    """Write `out`: the base of a checkpoint that was merged with `keep_removed`, every weight bit for bit.

    Args:
        merged: the merged checkpoint, with its folder `mask/`.
        out: a directory that does not exist, outside of `merged`; it is whole or not there.
        report: told how many files of how many are restored.

    Returns:
        the mask.

    Raises:
        ConfigError: the folder is missing or damaged, or the weights are not those that `merge` wrote; nothing is
            written.
    """
    merged, out = Path(merged), Path(out)
    check_new(out, merged)
    if not (merged / KEPT).is_dir():
        raise ConfigError(
            f"merged = {merged}: no folder {KEPT}/ there, so what was removed is not known; only a checkpoint that was "
            "merged with its removed values kept can be unmerged."
        )
    mask = load_mask(merged / KEPT)
    files = WeightFiles(merged)
    removed = _load_removed(merged, mask, files)
    for site in mask.config.sites:
        weight = files.tensor(site.name)
        weight[mask.changed(site.name)] = removed[site.name]
        if tensor_digest(weight) != site.base_sha256:
            raise ConfigError(
                f"merged = {merged}: the values kept of {site.name} do not give the base weight (sha256 differs); "
                f"{KEPT}/{REMOVED} was altered."
            )
    with whole_or_absent(out, merged) as target:
        _rewrite(files, mask, target, report, removed)
    return mask


def _rewrite(files: WeightFiles, mask: Mask, target: Path, report: Report, values: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint; masked entries become `values`, by matrix in row-major order."""
    regions: dict[str, list[tuple[str, Piece, slice]]] = defaultdict(list)
    for site in mask.config.sites:
        for piece, rows in files.rows(site.name):
            regions[files.file_of[piece.tensor]].append((site.name, piece, rows))
    copy_others(files.directory, target, lambda name: name in regions or files.holds_other_weights(name))
    for done, name in enumerate(sorted(regions), start=1):
        with safe_open(files.directory / name, framework="pt") as handle:
            metadata = handle.metadata()
            tensors = {tensor: handle.get_tensor(tensor) for tensor in handle.keys()}  # noqa: SIM118 (not a mapping)
        for matrix, piece, rows in regions[name]:
            cut = mask.changed(matrix)
            above, inside = int(cut[: rows.start].sum()), cut[rows]
            piece.of(tensors)[inside] = values[matrix][above : above + int(inside.sum())]
        save_file(tensors, target / name, metadata=metadata)
        report(done, len(regions))


def _load_removed(merged: Path, mask: Mask, files: WeightFiles) -> dict[str, Tensor]:
    """Read the kept values, and check that they fit the mask and that the weights are those that were written."""
    try:
        with safe_open(merged / KEPT / REMOVED, framework="pt") as handle:
            written = json.loads((handle.metadata() or {}).get("merged", "null"))
            removed = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"merged = {merged}: no readable {KEPT}/{REMOVED} ({error}).") from error
    found = {name: (str(values.dtype), tuple(values.shape)) for name, values in removed.items()}
    if found != {
        site.name: (f"torch.{site.base_dtype}", (site.numel if mask.config.rescales else site.zeros,))
        for site in mask.config.sites
    }:
        raise ConfigError(f"merged = {merged}: {KEPT}/{REMOVED} does not hold what its mask removes; it was altered.")
    if written != {name: digest_file(merged / name) for name in files.files}:
        raise ConfigError(
            f"merged = {merged}: the weight files are not those that the merge wrote (sha256 differs), so what was "
            "removed does not belong to them; give the merged checkpoint itself."
        )
    return removed

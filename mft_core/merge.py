"""W ⊙ M as an ordinary checkpoint.

Works on the checkpoint's tensors, not on the model's class: what is not masked keeps its bytes, so every other weight
is bit-identical to the base, in its dtype and its shard. Used by the stage `merge-mask` and by `mft mask apply`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from mft_core.adapter import Mask, check_base, load_mask
from mft_core.checkpoint_io import WeightFiles
from mft_core.sources import parts


def merge(
    base: Path, mask_directory: Path, out: Path, report: Callable[[int, int], None] = lambda done, total: None
) -> Mask:
    """Write `out`: the checkpoint `base` with the entries that the mask removes set to zero.

    The files are written beside `out` and renamed at the end, so that `out` is whole or not there.

    Args:
        mask_directory: as `mft_core.adapter.save_mask` writes it.
        out: a directory that does not exist.
        report: told how many files of how many are merged.

    Returns:
        the mask.

    Raises:
        ConfigError: the mask is damaged, or belongs to another model; nothing is written.
    """
    mask = load_mask(mask_directory)
    files = WeightFiles(base)
    for site in mask.config.sites:
        check_base(site, files.tensor(site.name) if site.name in files.file_of else None)
    unfinished = out.with_name(f".incomplete-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write(base, files, mask, unfinished, report)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return mask


def _write(base: Path, files: WeightFiles, mask: Mask, target: Path, report: Callable[[int, int], None]) -> None:
    touched = {files.file_of[site.name] for site in mask.config.sites}
    for name in parts("model", base):
        if name not in touched:
            shutil.copyfile(base / name, target / name)
    for done, name in enumerate(sorted(touched), start=1):
        _merge_file(base / name, target / name, mask)
        report(done, len(touched))


def _merge_file(source: Path, target: Path, mask: Mask) -> None:
    with safe_open(source, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
    for name in tensors.keys() & mask.kept.keys():
        tensors[name].masked_fill_(~mask.kept[name], 0)
    save_file(tensors, target, metadata=metadata)

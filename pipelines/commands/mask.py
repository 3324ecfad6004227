"""`mft mask show | apply | undo | compare | combine`: mask files on their own, without a study."""

from __future__ import annotations

import json
from pathlib import Path

from mft_core.errors import ConfigError, unknown
from mft_core.masks import algebra
from mft_core.masks.mask_file import Mask, load_mask, save_mask
from mft_core.store.outputs import check_apart, check_new, whole_or_absent
from pipelines.commands.mask_view import mask_as_dict, overlaps_as_dict, show_mask, show_overlaps

_OF_TWO = {
    "union": algebra.union,
    "intersection": algebra.intersection,
    "difference": algebra.difference,
}
_COMPLEMENT = "complement"


def show(directory: Path, figure: Path | None, as_json: bool) -> None:
    """Print where a mask cuts, and draw it if `figure` names a PNG.

    Raises:
        ConfigError: no readable mask, or the figure's name does not end in .png, or it lies within the mask.
    """
    if figure is not None:
        if figure.suffix != ".png" or figure.is_dir():
            raise ConfigError(f"--figure {figure}: give a file name that ends in .png.")
        check_apart(figure, directory)
    mask = _load(directory)
    if as_json:
        print(json.dumps(mask_as_dict(mask), indent=2))
    else:
        show_mask(mask)
    if figure is not None:
        from mft_core.masks.mask_figures import where_it_cuts

        figure.parent.mkdir(parents=True, exist_ok=True)
        where_it_cuts(mask, figure)
        if not as_json:
            print(f"\nfigure: {figure}")


def apply(base: Path, directory: Path, out: Path, rewind_to: Path | None = None) -> None:
    """Write the base checkpoint with the mask merged into it, and beside it what `undo` needs.

    Raises:
        ConfigError: `out` exists or lies within one of the others, the mask belongs to another base, or rewinds to
            another model than `rewind_to`.
    """
    from mft_core.masks.merge import merge

    check_new(out, base, directory, *([rewind_to] if rewind_to else []))  # `merge` knows of the mask's own folder alone
    if not (base / "config.json").is_file():
        inner = f" (it is in {base / 'model'})" if (base / "model" / "config.json").is_file() else ""
        raise ConfigError(
            f"BASE = {base}: no checkpoint there{inner}; give the directory of the model the mask was made for."
        )
    mask = merge(base, _mask_directory(directory), out, keep_removed=True, rewind_to=rewind_to)
    done = f"set back to those of {rewind_to}" if rewind_to else "set to zero"
    print(f"{mask.zeros:,} weights {done}; checkpoint written to {out} (`mft mask undo` takes the mask out again)")


def undo(merged: Path, out: Path) -> None:
    """Write the base checkpoint again that `apply` merged a mask into.

    Raises:
        ConfigError: `out` exists, or `merged` is not as `apply` wrote it.
    """
    from mft_core.masks.merge import unmerge

    mask = unmerge(merged, out)
    print(f"{mask.zeros:,} weights put back; the base checkpoint is written to {out}")


def compare(first: Path, second: Path, as_json: bool) -> None:
    """Print the overlap of what two masks remove, beside what chance would give."""
    found = algebra.overlap(_load(first), _load(second))
    if as_json:
        print(json.dumps(overlaps_as_dict(found), indent=2))
    else:
        show_overlaps(found)


def combine(operation: str, masks: list[Path], out: Path) -> None:
    """Write the union, intersection or difference of two masks, or the complement of one.

    Raises:
        ConfigError: unknown operation, a wrong number of masks, masks of different bases, or `out` exists.
    """
    if operation not in (*_OF_TWO, _COMPLEMENT):
        raise unknown("operation", operation, (*_OF_TWO, _COMPLEMENT))
    if len(masks) != (1 if operation == _COMPLEMENT else 2):
        needed = "one mask: A OUT" if operation == _COMPLEMENT else "two masks: A B OUT"
        raise ConfigError(f"{operation} takes {needed}; {len(masks)} given.")
    check_new(out, *masks)
    operands = [_load(path) for path in masks]
    mask = algebra.complement(*operands) if operation == _COMPLEMENT else _OF_TWO[operation](*operands)
    with whole_or_absent(out, *masks) as target:
        save_mask(mask, target)
    print(
        f"{operation}: {mask.zeros:,} of {mask.weights:,} weights are {mask.config.made} ({mask.config.share:.2%}); "
        f"written to {out}"
    )


def _load(path: Path) -> Mask:
    return load_mask(_mask_directory(path))


def _mask_directory(path: Path) -> Path:
    """Accept a mask directory, or what holds one: an artifact of `learn-mask`, a checkpoint that `apply` wrote."""
    inner = path / "mask"
    return inner if inner.is_dir() else path

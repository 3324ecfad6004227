"""Which decoder layers: the text that people write and the indices that it means.

Free of torch, because the command line reads layers while it plans. Grammar: `20-23` (both ends included),
`0,3,8-11`, `last:4`, `middle:4`, `all`."""

from __future__ import annotations

import re

from mft_core.errors import ConfigError

_GRAMMAR = "valid: 'all', 'last:N', 'middle:N', or indices and ranges such as '20-23' or '0,3,8-11'"
_GROUP = re.compile(r"(last|middle):([0-9]{1,9})")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Return the layer indices that `text` means in a model of `n_layers` decoder layers, ascending.

    Raises:
        ConfigError: not of the grammar, outside the model, a reversed range, or a layer named twice.
    """
    text = text.strip()
    if text == "all":
        return tuple(range(n_layers))
    if group := _GROUP.fullmatch(text):
        return _group(group[1], int(group[2]), n_layers)
    chosen: list[int] = []
    for part in text.split(","):
        for layer in _range(part.strip(), text, n_layers):
            if layer in chosen:
                raise ConfigError(f"layers = '{text}': layer {layer} is named twice; ranges must not overlap.")
            chosen.append(layer)
    return tuple(sorted(chosen))


def _group(where: str, count: int, n_layers: int) -> tuple[int, ...]:
    if not 1 <= count <= n_layers:
        raise ConfigError(
            f"layers = '{where}:{count}': the model has {n_layers} layers; valid: {where}:1 to {where}:{n_layers}."
        )
    start = n_layers - count if where == "last" else (n_layers - count) // 2
    return tuple(range(start, start + count))


def _range(part: str, text: str, n_layers: int) -> range:
    found = _RANGE.fullmatch(part)
    if not found:
        raise ConfigError(f"layers = '{text}': cannot read '{part}'; {_GRAMMAR}.")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ConfigError(f"layers = '{text}': the range '{part}' is reversed; write '{last}-{first}'.")
    if last >= n_layers:
        raise ConfigError(
            f"layers = '{text}': layer {last} is outside the model, which has {n_layers} layers; "
            f"valid: 0 to {n_layers - 1}."
        )
    return range(first, last + 1)


def format_layers(layers: tuple[int, ...]) -> str:
    """Return the canonical text of layer indices, e.g. ``'0,3,8-11'``; `parse_layers` reads it back."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)

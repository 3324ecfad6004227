"""YAML as people mean it: a key that stands twice, an alias that blows up or contains itself, is refused.

Reads profiles, studies and the values of `--set`; whoever reads YAML that a user wrote reads it here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mft_core.errors import ConfigError

_MOST_BYTES = 1_000_000
_MOST_NODES = 50_000
"""values of a file with its aliases written out; the shipped profiles have under 500"""
_MOST_BITS = 63
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """The safe loader, which refuses a key that stands twice in a mapping, and what no setting can be."""

    tags: Tags
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.nodes += 1
        if self.nodes > _MOST_NODES:  # reading on would take minutes
            raise ConfigError(f"more than {_MOST_NODES:,} values; is this the right file?")
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in self.tags:
            return self.tags[node.tag](node.value)
        value = super().construct_object(node, deep)
        wrong = None
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            wrong = f"a number of more than {_MOST_BITS} bits"
        elif isinstance(value, str) and _NO_TEXT.search(value):
            wrong = f"{value!r:.60}: a character that no text has (NUL, or half a surrogate pair)"
        if wrong:
            raise ConfigError(f"line {node.start_mark.line + 1}: {wrong}; correct it.")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ConfigError(
                        f"key '{key.value}' stands twice, in lines {lines[key.value]} and {line}; "
                        "the second would replace the first in silence: keep one."
                    )
                lines[key.value] = line
        return super().construct_mapping(node, deep)


Tags = Mapping[str, Callable[[str], Any]]
"""what becomes of the text behind a tag such as `!function`; any other tag is refused"""


def read_yaml(path: Path, tags: Tags | None = None) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: it cannot be read, is not YAML in UTF-8, has a key twice, or is no mapping.
    """
    try:
        if path.is_fifo() or path.is_char_device():  # it would be waited for, or read without end
            raise ConfigError(f"{path}: no file that can be read; is this the right path?")
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path}: more than {_MOST_BYTES // 1_000_000} MB; is this the right file?")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); convert the file to UTF-8.") from error
    loaded = parse_yaml(text, str(path), tags)
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is expected, found {type(loaded).__name__}.")
    for key in loaded:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: key {key!r} is no text; put it in quotes.")
    return loaded


def parse_yaml(text: str, where: str, tags: Tags | None = None) -> Any:
    """Return the value of a YAML text; `where` begins the message of an error."""
    try:
        loader = _Loader(text)
        loader.tags = tags or {}
    except yaml.YAMLError as error:  # of control characters
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MOST_NODES:
            raise ConfigError(f"more than {_MOST_NODES:,} values once its aliases (*name) are written out.")
        return loader.construct_document(node)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:  # PyYAML's constructors raise whatever they meet: of 2026-13-45, `!!bool x`, `!!int ''`
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{where}: not YAML: {reason or type(error).__name__}") from error
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a node with aliases written out; each node is looked at once.

    Raises:
        ConfigError: a value contains itself.
    """
    if id(node) in known:
        if known[id(node)] == 0:
            line = node.start_mark.line + 1
            raise ConfigError(f"the value in line {line} contains itself through an alias (*name).")
        return known[id(node)]
    known[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]

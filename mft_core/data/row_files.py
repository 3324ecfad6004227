"""Rows as they lie in files: a JSONL file (also gzipped), one JSON array, a Parquet file, or a directory laid out as a
hub data set.

What a row says is not looked at here (`mft_core.data.rows` does), but what is no row of JSON is a `ConfigError` that
names file and line. Also for whoever reads the items of a benchmark, or estimates from a file's beginning.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft_core.data import shapes
from mft_core.errors import ConfigError, first_line
from mft_core.recipes import MixturePart

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = {
    b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "compressed with zstd", b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2", b"ARROW1": "an Arrow file", b"\xff\xfe": "in UTF-16", b"\xfe\xff": "in UTF-16",
}  # fmt: skip
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"


def raw_rows(source: Path, part: MixturePart) -> Iterator[tuple[str, Any]]:
    """Yield (file and line, row) of a source, as they stand there.

    Raises:
        ConfigError: missing, empty, damaged, in another format, or laid out otherwise.
    """
    if source.is_dir():
        table = load_table(source, part)
        for start in range(0, len(table), 1_000):
            columns = table[start : start + 1_000]
            for number, values in enumerate(zip(*columns.values(), strict=True), start):
                yield f"{source} row {number}", dict(zip(columns, values, strict=True))
        return
    if (part.split, part.config) != ("train", None):
        raise ConfigError(
            f"data.mixture: split and config are of hub data sets and folders; {source} is one file: leave them out."
        )
    _check_file(source)
    if _begins(source) == _PARQUET:
        yield from ((f"{source} row {number}", row) for number, row in enumerate(_parquet_rows(source)))
    elif _is_array(source):
        yield from ((f"{source} row {number}", row) for number, row in enumerate(_read_array(source)))
    else:
        yield from ((f"{source} line {number}", row) for number, row in read_json_lines(source))


def beginning(path: Path, count: int) -> tuple[int, list[Any]]:
    """Return how many rows a file has, and the first of them as they are, parsed; for estimates.

    Raises:
        ConfigError, OSError, EOFError, ValueError, zlib.error: it cannot be read.
    """
    _check_file(path)
    if _begins(path) == _PARQUET:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            first = next(file.iter_batches(count), None)
            return file.metadata.num_rows, first.to_pylist() if first else []
    if _is_array(path):
        rows = _read_array(path)
        return len(rows), rows[:count]
    with _opened(path) as handle:
        lines = filter(bytes.strip, handle)
        first = [_parse_line(line, str(path)) for line in itertools.islice(lines, count)]
        return len(first) + sum(1 for _ in lines), first


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "a device or pipe, which cannot be read twice" if path.exists() else "no such file"
        raise ConfigError(f"data file {path}: {what}; give the path of a JSONL file, one row per line.")


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    """Open a JSONL file, also a gzipped one."""
    return gzip.open(path) if _begins(path)[:2] == _GZIP else path.open("rb")


def _begins(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(len(_PARQUET))
    except OSError:
        return b""  # whoever reads on says what is wrong


def _is_array(path: Path) -> bool:
    with contextlib.suppress(OSError, EOFError, zlib.error), _opened(path) as handle:
        return handle.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    return False  # or whoever reads on says what is wrong


def _read_array(path: Path) -> list[Any]:
    """Return the rows of a file that is one JSON array; it is parsed as a whole."""
    try:
        with _opened(path) as handle:
            rows: list[Any] = json.loads(handle.read().decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ConfigError(
            f"data file {path}: a JSON array that cannot be read ({first_line(error)}); valid: one array of all rows, "
            "or one JSON object per line."
        ) from error
    if not rows:
        raise ConfigError(f"data file {path}: empty; it needs at least one row.")
    return rows


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1_000, columns=shapes.columns(file.schema_arrow.names)):
                yield from batch.to_pylist()
            empty = file.metadata.num_rows == 0
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"data file {path}: damaged ({first_line(error)}); copy or download it again.") from error
    if empty:
        raise ConfigError(f"data file {path}: empty; it needs at least one row.")


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, parsed JSON) of a JSONL file, also a gzipped one; blank lines are passed over.

    Raises:
        ConfigError: the file is missing, unreadable, empty, not UTF-8, or a line is not JSON.
    """
    _check_file(path)
    found = False
    try:
        with _opened(path) as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    found = True
                    yield number, _parse_line(line, f"{path} line {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"data file {path}: damaged gzip ({first_line(error)}); compress or copy it again."
        ) from error
    except OSError as error:
        raise ConfigError(f"data file {path}: cannot be read ({error.strerror}); check its permissions.") from error
    if not found:
        raise ConfigError(f"data file {path}: empty; it needs at least one row.")


def _parse_line(line: bytes, where: str) -> Any:
    if line.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"["):
        raise ConfigError(
            f"{where}: a JSON array. Valid: one JSON object per line (JSONL); of a file that is one array, "
            "jq -c '.[]' FILE > rows.jsonl makes it."
        )
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        known = next((name for magic, name in _FORMATS.items() if line.startswith(magic)), None)
        what = f"not text: the file is {known}" if known else f"not UTF-8 (byte {error.start})"
        raise ConfigError(f"{where}: {what}; give JSONL in UTF-8 (also gzipped), or Parquet.") from error
    except RecursionError:
        reason = "nested too deeply"
    except json.JSONDecodeError as error:
        reason = "lines end with CR alone; make it LF" if b"\r" in line.strip() else error.msg
    except ValueError:
        reason = "a number of thousands of digits"
    shown = line.decode(errors="replace").strip()
    raise ConfigError(f"{where}: not JSON ({reason}): {shown:.60}. Valid: one JSON object per line (JSONL).")


def load_table(directory: Path, part: MixturePart) -> Dataset:
    """Return a directory's split, memory-mapped, with the columns that are read.

    Raises:
        ConfigError: without data, the split, or the columns of a row.
    """
    import datasets  # a heavy import, and only directories need it

    try:
        splits = datasets.load_dataset(str(directory), part.config)
    except Exception as error:  # datasets raises whatever its readers raise
        configs = _configurations(directory)
        if part.config not in configs and (part.config or len(configs) > 1):
            asked = f"no configuration '{part.config}'" if part.config else "it has several configurations"
            raise ConfigError(
                f"data set {directory}: {asked}; set config of the mixture's part to one of {', '.join(configs)}."
            ) from error
        raise ConfigError(
            f"data set {directory}: cannot be loaded ({first_line(error.__cause__ or error)}); valid: Parquet or JSONL."
        ) from error
    if part.split not in splits:
        raise ConfigError(
            f"data set {directory}: no split '{part.split}'. It has: {', '.join(map(str, splits))}; set split of the "
            "mixture's part to one of them."
        )
    table = splits[part.split]
    shapes.refuse(table.column_names, f"data set {directory}")
    if len(table) == 0:
        raise ConfigError(f"data set {directory}: empty; it needs at least one row.")
    return table.select_columns(shapes.columns(table.column_names))


def _configurations(directory: Path) -> list[str]:
    import datasets

    try:
        return [str(name) for name in datasets.get_dataset_config_names(str(directory))]
    except Exception:  # as above; whoever asks has an error to tell already
        return []

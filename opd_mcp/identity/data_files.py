"""Rows of JSONL and Parquet files, one dictionary each, with errors that name the file and the line."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opd_mcp.schemas.errors import DataError, IntegrityError, PathError, ResourceError, nearest

MAX_LINE_BYTES = 1 << 20
MAX_ROWS = 5_000_000
# Parquet: a tiny file may stand for a huge one, so what it says of itself is looked at before it is decoded.
MAX_ROW_BYTES = 16 << 20
MAX_COLUMN_BYTES = 1 << 30
BATCH_BYTES = 1 << 29
BATCH_ROWS = 1024
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
# What our own artifact directories call their data, so that a file beside it causes no doubt.
ARTIFACT_FILES = ("prompts.jsonl", "responses.parquet")


def data_file(path: Path) -> Path:
    """The one JSONL or Parquet file that a path means: the file itself, or the only one in the directory.

    Raises PathError `not_found`, or DataError `unknown_format` for another kind of file or an unclear directory.
    """
    if path.is_dir():
        return _only_data_file(path)
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PathError(
            "not_found",
            "There is no such file.",
            value=path,
            nearest=[str(path.parent / name) for name in nearest(path.name, siblings)],
            fix="Give the absolute path of a .jsonl or .parquet file.",
        )
    if path.suffix.lower() not in JSONL_SUFFIXES + PARQUET_SUFFIXES:
        raise DataError(
            "unknown_format",
            f"{path.name} is neither JSONL nor Parquet by its name.",
            value=path,
            fix="Give a .jsonl file (one JSON object a line) or a .parquet file.",
        )
    return path


def is_parquet(path: Path) -> bool:
    """Whether a data file is Parquet, by its name."""
    return path.suffix.lower() in PARQUET_SUFFIXES


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) for each row of a data file, lines counted from 1; Parquet rows hold only the named columns.

    Raises DataError `malformed_line`, IntegrityError `damaged_file`, ResourceError `missing_package` (no pyarrow).
    """
    return _parquet_rows(path, columns) if is_parquet(path) else _jsonl_rows(path)


def parquet_header(path: Path) -> tuple[int, list[str]]:
    """(rows, column names) of a Parquet file from its footer; raises as `read_rows` does."""
    with _open_parquet(path) as file:
        return file.metadata.num_rows, file.schema_arrow.names


def malformed_line(path: Path, line: int, why: str, *, fix: str) -> DataError:
    """The error for a row that cannot be used."""
    return DataError("malformed_line", f"{path.name} line {line}: {why}.", value=f"{path}:{line}", fix=fix)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    fix = "Write one JSON object a line, in UTF-8."
    with path.open("rb") as file:
        line = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            line += 1
            if line > MAX_ROWS:
                raise _too_large(path, f"more than {MAX_ROWS} lines")
            if len(data) > MAX_LINE_BYTES:
                raise malformed_line(path, line, f"longer than {MAX_LINE_BYTES} bytes", fix="Split or drop this row.")
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if not data.strip():
                continue
            try:
                row = json.loads(data.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise malformed_line(path, line, f"not JSON ({_short(error)})", fix=fix) from error
            if not isinstance(row, dict):
                raise malformed_line(path, line, f"a JSON {type(row).__name__}, not an object", fix=fix)
            yield line, row


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open_parquet(path) as file:
        wanted = [name for name in file.schema_arrow.names if name in columns]
        line = 0
        for batch in file.iter_batches(batch_size=_batch_rows(path, file.metadata), columns=wanted):
            if batch.nbytes > MAX_ROW_BYTES and any(
                batch.slice(row, 1).nbytes > MAX_ROW_BYTES for row in range(batch.num_rows)
            ):
                raise _too_large(path, f"a row of more than {MAX_ROW_BYTES} bytes, after row {line}")
            for row in batch.to_pylist() if wanted else [{}] * batch.num_rows:
                line += 1
                yield line, {name: value for name, value in row.items() if value is not None}


def _batch_rows(path: Path, metadata: Any) -> int:
    """Rows to decode at a time, so that they fit into memory even if each is as long as its whole column."""
    if metadata.num_rows > MAX_ROWS:
        raise _too_large(path, f"{metadata.num_rows} rows, more than {MAX_ROWS}")
    largest = 1
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            largest = max(largest, column.total_uncompressed_size, 8 * column.num_values)
    if largest > MAX_COLUMN_BYTES:
        raise _too_large(path, f"a column of {largest} bytes in one row group, more than {MAX_COLUMN_BYTES}")
    return max(1, min(BATCH_ROWS, BATCH_BYTES // largest))


def _too_large(path: Path, what: str) -> DataError:
    return DataError(
        "too_large",
        f"{path.name} holds {what}.",
        value=path,
        fix="Give a part of it; runs cycle through their prompts.",
    )


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ResourceError(
            "missing_package", "Reading Parquet needs pyarrow.", value=path, fix="Install pyarrow, or give JSONL."
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    # Decoding meets text that is not UTF-8, and dates and lengths that Python or this machine do not have.
    except (pyarrow.ArrowException, OSError, UnicodeError, OverflowError, MemoryError) as error:
        raise IntegrityError(
            "damaged_file",
            f"{path.name} is not a readable Parquet file ({_short(error)}).",
            value=path,
            fix="Write or copy the file again.",
        ) from error


def _only_data_file(directory: Path) -> Path:
    for name in ARTIFACT_FILES:
        if (directory / name).is_file():
            return directory / name
    suffixes = JSONL_SUFFIXES + PARQUET_SUFFIXES
    found = sorted(p for p in directory.iterdir() if p.suffix.lower() in suffixes and p.is_file())
    if len(found) == 1:
        return found[0]
    raise DataError(
        "unknown_format",
        f"This directory holds {len(found)} data files; exactly one .jsonl or .parquet file is needed.",
        value=directory,
        nearest=[str(path) for path in found[:3]],
        fix="Give the path of the file itself.",
    )


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__

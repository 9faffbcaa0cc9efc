"""Raw rows of data files, in chunks of dictionaries; a row that cannot be read is a `BadRow` in its place."""

import csv
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from opd_mcp.identity.data.sources import Format, Source
from opd_mcp.schemas.errors import DataError, IntegrityError, ResourceError

MAX_LINE_BYTES = 1 << 20
MAX_ROWS = 5_000_000
# Parquet: a tiny file may stand for a huge one, so what it says of itself is looked at before it is decoded.
MAX_ROW_BYTES = 16 << 20
MAX_COLUMN_BYTES = 1 << 30
BATCH_BYTES = 1 << 29
BATCH_ROWS = 1024
# A JSON object that holds the rows in one list is decoded as a whole.
MAX_OBJECT_BYTES = 64 << 20
# Text packs by 3 to 20; what unpacks to more than this share of a large file is no text.
MAX_UNPACKED_BYTES = 64 << 30
MAX_UNPACKED_RATIO = 200
RATIO_FREE_BYTES = 64 << 20
CHUNK_ROWS = 512
READ_BYTES = 1 << 20

Row = dict[str, Any]
SelectColumns = Callable[[Sequence[str]], Sequence[str]]
"""From the columns that a table has to those that are to be read; raises when it cannot be used."""


class BadRow(ValueError):
    """A row that cannot be used: `code` as in the error tree, `why` in a few words, `fix` one next step."""

    def __init__(self, code: str, why: str, fix: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one file, each with its line (of text) or its number (of a table), from 1."""

    file: Path
    lines: Sequence[int]
    rows: list[Row | BadRow]


def read_chunks(source: Source, select: SelectColumns) -> Iterator[Chunk]:
    """The rows of a data set in order; tables hold only the columns that `select` names, and no nulls.

    Raises DataError `too_large` or `malformed_line` (what no row can be told from), IntegrityError `damaged_file`,
    ResourceError `missing_package` where pyarrow is needed and not installed.
    """
    readers: dict[Format, Callable[[Path], Iterator[Chunk]]] = {
        "jsonl": _jsonl_chunks,
        "json": _json_chunks,
        "csv": partial(_csv_chunks, delimiter=","),
        "tsv": partial(_csv_chunks, delimiter="\t"),
        "parquet": partial(_parquet_chunks, select=select),
        "arrow": partial(_arrow_chunks, select=select),
    }
    count = 0
    for file in source.files:
        for chunk in readers[source.format](file):
            count += len(chunk.rows)
            if count > MAX_ROWS:
                raise too_large(file, f"more than {MAX_ROWS} rows")
            yield chunk


def table_header(source: Source) -> tuple[int, list[str]] | None:
    """(rows, column names) of Parquet files from their footers; None for other formats; raises as `read_chunks`."""
    if source.format != "parquet":
        return None
    rows = 0
    names: list[str] = []
    for file in source.files:
        with _open_parquet(file) as opened:
            rows += opened.metadata.num_rows
            names = names or opened.schema_arrow.names
    return rows, names


def too_large(path: Path, what: str) -> DataError:
    """The error for data beyond a limit."""
    return DataError(
        "too_large",
        f"{path.name} holds {what}.",
        value=path,
        fix="Give a part of it; runs cycle through their prompts.",
    )


def malformed(path: Path, line: int, why: str, *, fix: str) -> DataError:
    """The error for a line that makes the rest of a file unreadable."""
    return DataError("malformed_line", f"{path.name} line {line}: {why}.", value=f"{path}:{line}", fix=fix)


class _BoundedStream(io.RawIOBase):
    """What a packed file unpacks to, refused beyond a sensible size."""

    def __init__(self, path: Path, unpacked: Any) -> None:
        self._path = path
        self._unpacked = unpacked
        self._limit = min(MAX_UNPACKED_BYTES, max(RATIO_FREE_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size))
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._unpacked.read(len(buffer))
        self._count += len(data)
        if self._count > self._limit:
            raise too_large(self._path, f"over {self._limit} bytes once it is unpacked")
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _open_text(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a text file, unpacked where its name says that it is packed."""
    suffix = path.suffix.lower()
    if suffix not in (".gz", ".zst"):
        with path.open("rb", buffering=READ_BYTES) as file:
            yield file
        return
    with path.open("rb") as file:
        try:
            unpacked = (
                gzip.GzipFile(fileobj=file) if suffix == ".gz" else _pyarrow(path).CompressedInputStream(file, "zstd")
            )
            yield io.BufferedReader(_BoundedStream(path, unpacked), READ_BYTES)
        except (EOFError, zlib.error, OSError, MemoryError) as error:
            raise _damaged(path, f"{suffix} file", error) from error


def _jsonl_chunks(path: Path) -> Iterator[Chunk]:
    with _open_text(path) as file:
        number = 0
        for lines in _lines(file):
            if number == 0:
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            numbers: Sequence[int] = range(number + 1, number + 1 + len(lines))
            number += len(lines)
            if number > MAX_ROWS:
                raise too_large(path, f"more than {MAX_ROWS} lines")
            rows = _rows_at_once(lines)
            if rows is None:
                numbers = [line for line, data in zip(numbers, lines, strict=True) if data.strip()]
                rows = [_row_of_line(data) for data in lines if data.strip()]
            yield Chunk(path, numbers, rows)


def _lines(file: BinaryIO) -> Iterator[list[bytes]]:
    """Lines without their ends, about READ_BYTES at a time; of one that is too long, its beginning."""
    rest = b""
    while block := file.read(READ_BYTES):
        lines = (rest + block).split(b"\n")
        rest = lines.pop()[: MAX_LINE_BYTES + 1]
        if lines:
            yield lines
    if rest:
        yield [rest]


def _rows_at_once(lines: list[bytes]) -> list[Row | BadRow] | None:
    """The rows of lines that are one object each, decoded by one call; None when they must be looked at one by one."""
    if max(map(len, lines)) > MAX_LINE_BYTES:
        return None
    try:
        rows = json.loads((b"[" + b",".join(lines) + b"]").decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    # A line that breaks off, completed by the next one, makes fewer rows than lines.
    whole = len(rows) == len(lines) and set(map(type, rows)) == {dict}
    return rows if whole else None


def _row_of_line(data: bytes) -> Row | BadRow:
    fix = "Write one JSON object per line, in UTF-8."
    if len(data) > MAX_LINE_BYTES:
        return BadRow("malformed_line", f"longer than {MAX_LINE_BYTES} bytes", "Split or drop this row.")
    try:
        row = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return BadRow("malformed_line", f"not JSON ({short(error)})", fix)
    return row if isinstance(row, dict) else _not_an_object(row)


def _not_an_object(value: object) -> BadRow:
    return BadRow("malformed_line", f"a JSON {type(value).__name__}, not an object", "Write one JSON object per row.")


def _json_chunks(path: Path) -> Iterator[Chunk]:
    """Rows of a `.json` file: a list of objects, an object that holds such a list, or really JSON lines."""
    with _open_text(path) as file:
        head = file.readline(MAX_LINE_BYTES).removeprefix(b"\xef\xbb\xbf").strip()
    if not head.startswith(b"{"):
        yield from _in_chunks(path, _listed_rows(path))
    elif isinstance(_row_of_line(head), dict) and _has_more_lines(path):
        yield from _jsonl_chunks(path)
    else:
        yield from _in_chunks(path, iter(_rows_in_object(path)))


def _has_more_lines(path: Path) -> bool:
    with _open_text(path) as file:
        file.readline()
        return bool(file.readline().strip())


def _listed_rows(path: Path) -> Iterator[Row | BadRow]:
    """The elements of one JSON list, decoded one by one, so that memory holds one of them at a time."""
    fix = "Write one JSON list of objects, in UTF-8."
    decode = json.JSONDecoder().raw_decode
    with _open_text(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
        buffer, number, begun = text.read(READ_BYTES).lstrip(), 0, False
        if not buffer:
            return
        while True:
            buffer = buffer.lstrip()
            if not begun and buffer[:1] != "[":
                raise malformed(path, 1, "neither a JSON list nor an object", fix=fix)
            if begun and buffer[:1] == "]":
                return
            if begun and number and buffer[:1] == ",":
                buffer = buffer[1:].lstrip()
            if not begun:
                begun, buffer = True, buffer[1:].lstrip()
                continue
            try:
                row, end = decode(buffer)
                whole = buffer[end:].lstrip()[:1] in (",", "]") and buffer[end:].strip() != ""
            except (ValueError, RecursionError) as error:
                whole, problem = False, short(error)
            else:
                problem = "the list does not end"
            if whole:
                number += 1
                buffer = buffer[end:]
                yield row if isinstance(row, dict) else _not_an_object(row)
                continue
            more = text.read(READ_BYTES) if len(buffer) <= MAX_ROW_BYTES else ""
            if not more:
                raise malformed(path, number + 1, f"not JSON ({problem})", fix=fix)
            buffer += more


def _rows_in_object(path: Path) -> list[Row | BadRow]:
    """The rows of a JSON object: of the one list of objects in it, else the object itself is one row."""
    with _open_text(path) as file:
        data = file.read(MAX_OBJECT_BYTES + 1)
    if len(data) > MAX_OBJECT_BYTES:
        raise too_large(path, f"a JSON object of more than {MAX_OBJECT_BYTES} bytes")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise malformed(path, 1, f"not JSON ({short(error)})", fix="Write a JSON list of objects, in UTF-8.") from error
    if not isinstance(value, dict):
        return [_not_an_object(value)]
    lists = {key: part for key, part in value.items() if isinstance(part, list) and any(type(i) is dict for i in part)}
    if len(lists) > 1 and not {"prompt", "messages", "conversations"} & lists.keys():
        raise DataError(
            "unknown_format",
            f"The object in {path.name} holds {len(lists)} lists of objects: {', '.join(lists)[:200]}.",
            value=path,
            fix="Give a file with one list of rows.",
        )
    if len(lists) == 1 and not {"prompt", "messages", "conversations"} & lists.keys():
        return [item if isinstance(item, dict) else _not_an_object(item) for item in next(iter(lists.values()))]
    return [value]


def _csv_chunks(path: Path, delimiter: str) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the module's own is 128 KiB, and known to the whole process only
    with _open_text(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, delimiter=delimiter)
        numbers: list[int] = []
        rows: list[Row | BadRow] = []
        try:
            for row in reader:
                numbers.append(reader.line_num)
                rows.append(_row_of_fields(row))
                if len(rows) == CHUNK_ROWS:
                    yield Chunk(path, numbers, rows)
                    numbers, rows = [], []
        except csv.Error as error:
            raise malformed(
                path,
                reader.line_num,
                f"not CSV ({short(error)}); perhaps a quote that never closes",
                fix="Write the table again with every quote inside a field doubled, or give JSONL or Parquet.",
            ) from error
        if rows:
            yield Chunk(path, numbers, rows)


def _row_of_fields(row: dict[Any, Any]) -> Row | BadRow:
    if None in row:
        return BadRow("malformed_line", "more fields than the header names", "Quote fields that hold the separator.")
    return {name: value for name, value in row.items() if value}


def _in_chunks(path: Path, rows: Iterator[Row | BadRow]) -> Iterator[Chunk]:
    number, some = 0, []
    for row in rows:
        some.append(row)
        if len(some) == CHUNK_ROWS:
            yield Chunk(path, range(number + 1, number + 1 + len(some)), some)
            number, some = number + len(some), []
    if some:
        yield Chunk(path, range(number + 1, number + 1 + len(some)), some)


def _parquet_chunks(path: Path, select: SelectColumns) -> Iterator[Chunk]:
    with _open_parquet(path) as file:
        rows_at_once = _batch_rows(path, file.metadata)
        wanted = [name for name in file.schema_arrow.names if name in set(select(file.schema_arrow.names))]
        yield from _table_chunks(path, file.iter_batches(batch_size=rows_at_once, columns=wanted))


def _arrow_chunks(path: Path, select: SelectColumns) -> Iterator[Chunk]:
    """Rows of an Arrow stream, the format of `save_to_disk`; Arrow IPC files (Feather) are refused."""
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as mapped:
            _require_unpacked_stream(path, pyarrow, mapped)
            mapped.seek(0)
            with pyarrow.ipc.open_stream(mapped) as reader:
                wanted = [name for name in reader.schema.names if name in set(select(reader.schema.names))]
                yield from _table_chunks(path, (_checked(batch).select(wanted) for batch in reader))
    except (pyarrow.ArrowException, OSError, UnicodeError, OverflowError, MemoryError) as error:
        raise _damaged(path, "Arrow stream", error) from error


def _checked(batch: Any) -> Any:
    batch.validate(full=True)  # offsets in the file are believed otherwise, and may lead out of it
    return batch


def _table_chunks(path: Path, batches: Iterator[Any]) -> Iterator[Chunk]:
    number = 0
    for whole in batches:
        for start in range(0, max(whole.num_rows, 1), BATCH_ROWS):
            batch = whole.slice(start, BATCH_ROWS)
            if batch.nbytes > MAX_ROW_BYTES and any(
                batch.slice(row, 1).nbytes > MAX_ROW_BYTES for row in range(batch.num_rows)
            ):
                raise too_large(path, f"a row of more than {MAX_ROW_BYTES} bytes, after row {number}")
            yield Chunk(path, range(number + 1, number + 1 + batch.num_rows), _dictionaries(batch))
            number += batch.num_rows


def _dictionaries(batch: Any) -> list[Row | BadRow]:
    names = batch.schema.names
    if not names:
        return [{} for _ in range(batch.num_rows)]
    values = zip(*(column.to_pylist() for column in batch.columns), strict=True)
    if any(column.null_count for column in batch.columns):
        return [{name: value for name, value in zip(names, row, strict=True) if value is not None} for row in values]
    return [dict(zip(names, row, strict=True)) for row in values]


def _batch_rows(path: Path, metadata: Any) -> int:
    """Rows to decode at a time, so that they fit into memory even if each is as long as its whole column."""
    if metadata.num_rows > MAX_ROWS:
        raise too_large(path, f"{metadata.num_rows} rows, more than {MAX_ROWS}")
    largest = 1
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            largest = max(largest, column.total_uncompressed_size, 8 * column.num_values)
    if largest > MAX_COLUMN_BYTES:
        raise too_large(path, f"a column of {largest} bytes in one row group, more than {MAX_COLUMN_BYTES}")
    return max(1, min(BATCH_ROWS, BATCH_BYTES // largest))


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    # Decoding meets text that is not UTF-8, and dates and lengths that Python or this machine do not have.
    except (pyarrow.ArrowException, OSError, UnicodeError, OverflowError, MemoryError) as error:
        raise _damaged(path, "Parquet file", error) from error


def _require_unpacked_stream(path: Path, pyarrow: Any, mapped: Any) -> None:
    """Raise DataError for packed batches: how much they unpack to is known only when memory holds it."""
    if mapped.read(6) == b"ARROW1":
        raise DataError(
            "unknown_format",
            f"{path.name} is an Arrow IPC file (Feather), not a stream as save_to_disk writes it.",
            value=path,
            fix="Write the table as Parquet.",
        )
    mapped.seek(0)
    with pyarrow.ipc.MessageReader.open_stream(mapped) as messages:
        for message in messages:
            if message.type != "schema" and _is_packed(message.metadata.to_pybytes()):
                raise DataError(
                    "unknown_format",
                    f"{path.name} holds packed batches.",
                    value=path,
                    fix="Write the table as Parquet.",
                )


def _is_packed(metadata: bytes) -> bool:
    """Whether a message names a compression: in its flatbuffer, Message.header → RecordBatch.compression."""

    def field(table: int, index: int) -> int:
        """Where the field of a table is; 0 when it is absent."""
        fields = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, fields)[0]
        entry = 4 + 2 * index
        offset = struct.unpack_from("<H", metadata, fields + entry)[0] if entry < size else 0
        return table + offset if offset else 0

    def pointed(position: int) -> int:
        return position + int(struct.unpack_from("<I", metadata, position)[0])

    try:
        header = field(pointed(0), 2)
        kind = metadata[field(pointed(0), 1)]
        batch = pointed(header) if header else 0
        if kind == 2 and batch:  # a dictionary batch holds a record batch
            inner = field(batch, 1)
            batch = pointed(inner) if inner else 0
        return bool(batch) and field(batch, 3) != 0
    except (struct.error, IndexError):
        return True  # what cannot be read is not believed


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ResourceError(
            "missing_package", "Reading this format needs pyarrow.", value=path, fix="Install pyarrow, or give JSONL."
        ) from error
    return pyarrow


def _damaged(path: Path, kind: str, error: Exception) -> IntegrityError:
    return IntegrityError(
        "damaged_file",
        f"{path.name} is not a readable {kind} ({short(error)}).",
        value=path,
        fix="Write or copy the file again.",
    )


def short(error: Exception) -> str:
    """The first line of an exception's text."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__

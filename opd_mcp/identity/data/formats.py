"""Raw rows of data files, in chunks of dictionaries; a row that cannot be read is a `BadRow` in its place."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from opd_mcp.identity.data.rows import BadRow, Chunk, Row
from opd_mcp.identity.data.sources import (
    MAX_ROW_BYTES,
    MAX_ROWS,
    Format,
    Source,
    damaged,
    open_pyarrow,
    short,
    too_large,
)
from opd_mcp.identity.data.tables import SelectColumns, arrow_chunks, parquet_chunks
from opd_mcp.schemas.errors import DataError, ResourceError

MAX_LINE_BYTES = 1 << 20
# A JSON object that holds the rows in one list is decoded as a whole.
MAX_OBJECT_BYTES = 64 << 20
# Text packs by 3 to 20; what unpacks to more than this share of a large file is no text.
MAX_UNPACKED_BYTES = 64 << 30
MAX_UNPACKED_RATIO = 200
RATIO_FREE_BYTES = 64 << 20
CHUNK_ROWS = 512
# Smaller tables are not worth loading pyarrow.
QUICK_CSV_BYTES = 4 << 20
QUICK_CSV_BLOCK = 1 << 18
# What fits into a processor's cache with all that is made of it: a third faster than a megabyte at a time.
READ_BYTES = 1 << 16
# How spreadsheets and pandas write a whole number in a column that has gaps.
_SPACE = re.compile(r"[ \t\r\n]*")
_WHOLE = re.compile(r"\A(-?\d{1,15})\.0\Z")


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
        "parquet": partial(parquet_chunks, select=select),
        "arrow": partial(arrow_chunks, select=select),
    }
    count = 0
    for file in source.files:
        for chunk in readers[source.format](file):
            count += len(chunk)
            if count > MAX_ROWS:
                raise too_large(file, f"more than {MAX_ROWS} rows")
            yield chunk


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
            unpacked = gzip.GzipFile(fileobj=file) if suffix == ".gz" else _zstd(path, file)
            yield io.BufferedReader(_BoundedStream(path, unpacked), READ_BYTES)
        except (EOFError, zlib.error, OSError, MemoryError) as error:
            raise damaged(path, f"{suffix} file", error) from error


def _zstd(path: Path, file: BinaryIO) -> Any:
    return open_pyarrow(path).CompressedInputStream(file, "zstd")


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
            rows = _rows_at_once(lines, _quick_rows)
            if rows is not None:
                yield Chunk(path, numbers, rows, valid_text=True)
                continue
            rows = _rows_at_once(lines, _plain_rows)
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


def _rows_at_once(lines: list[bytes], decode: Callable[[bytes], Any]) -> list[Row | BadRow] | None:
    """The rows of lines that are one object each, decoded by one call; None when they must be looked at one by one."""
    if max(map(len, lines)) > MAX_LINE_BYTES:
        return None
    try:
        rows = decode(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        return None
    # A line that breaks off, completed by the next one, makes fewer rows than lines.
    whole = len(rows) == len(lines) and set(map(type, rows)) == {dict}
    return rows if whole else None


def _plain_rows(data: bytes) -> Any:
    return json.loads(data.decode("utf-8"))


def _quick_rows(data: bytes) -> Any:
    """As `_plain_rows`, in half the time; it refuses half a surrogate pair."""
    return from_json(data, cache_strings="keys")


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
        buffer = text.read(READ_BYTES).lstrip()
        if buffer and buffer[0] != "[":
            raise malformed(path, 1, "neither a JSON list nor an object", fix=fix)
        number, at = 0, 1
        while buffer:
            try:
                at = _next_element(buffer, at, number)
                if buffer[at] == "]":
                    return
                row, end = decode(buffer, at)
                end = _SPACE.match(buffer, end).end()  # type: ignore[union-attr]
                if buffer[end] not in ",]":
                    raise malformed(path, number + 1, "not JSON (no comma after a row)", fix=fix)
            except (ValueError, IndexError, RecursionError) as error:
                if isinstance(error, DataError):
                    raise
                # It breaks off, or there is more of it in the file.
                more = text.read(max(READ_BYTES, len(buffer) - at)) if len(buffer) - at <= MAX_ROW_BYTES else ""
                if not more:
                    problem = "the list does not end" if isinstance(error, IndexError) else short(error)
                    raise malformed(path, number + 1, f"not JSON ({problem})", fix=fix) from error
                buffer, at = buffer[at:] + more, 0
                continue
            number, at = number + 1, end
            yield row if isinstance(row, dict) else _not_an_object(row)


def _next_element(buffer: str, at: int, number: int) -> int:
    """Where the next element of the list begins, or the list ends, behind the comma before it."""
    at = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
    return _SPACE.match(buffer, at + 1).end() if number and buffer[at] == "," else at  # type: ignore[union-attr]


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
    read = 0
    if path.suffix.lower() in (".csv", ".tsv") and path.stat().st_size >= QUICK_CSV_BYTES:
        read, complete = yield from _quick_csv_chunks(path, delimiter)
        if complete:
            return
    numbers: list[int] = []
    rows: list[Row | BadRow] = []
    for number, row in islice(_csv_rows(path, delimiter), read, None):
        numbers.append(number)
        rows.append(_row_of_fields(row))
        if len(rows) == CHUNK_ROWS:
            yield Chunk(path, numbers, rows)
            numbers, rows = [], []
    if rows:
        yield Chunk(path, numbers, rows)


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[Any, Any]]]:
    """The rows of a table, each with the line on which it ends; raises DataError `malformed_line`."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the module's own is 128 KiB, and known to the whole process only
    with _open_text(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, delimiter=delimiter)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise malformed(
                path,
                reader.line_num,
                f"not CSV ({short(error)}); perhaps a quote that never closes",
                fix="Write the table again with every quote inside a field doubled, or give JSONL or Parquet.",
            ) from error


class _CsvLines(Sequence[int]):
    """On which lines the rows of a part of a table end, found by reading it again once a message must say so."""

    def __init__(self, path: Path, delimiter: str, first: int, count: int) -> None:
        self._place = path, delimiter, first
        self._count = count
        self._lines: list[int] = []

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: Any) -> Any:
        path, delimiter, first = self._place
        if not self._lines:
            self._lines = [line for line, _ in islice(_csv_rows(path, delimiter), first, first + self._count)]
        return self._lines[position]


def _quick_csv_chunks(path: Path, delimiter: str) -> Generator[Chunk, None, tuple[int, bool]]:
    """A table's first rows, up to one that must be looked at closely; pyarrow reads them in a tenth of the time.

    Returns how many they are, and whether they are all.
    """
    try:
        pyarrow = open_pyarrow(path)
        from pyarrow import compute
        from pyarrow import csv as table
    except (ResourceError, ImportError):
        return 0, False
    read = 0
    with path.open("rb", buffering=0) as file:
        names = _header_names(file.readline(MAX_LINE_BYTES), delimiter)
        begin = file.tell()
        if names is None or file.read(3) == b"\xef\xbb\xbf":
            return 0, False
        file.seek(begin)
        try:
            batches = table.open_csv(
                file,
                table.ReadOptions(column_names=names, block_size=QUICK_CSV_BLOCK, use_threads=False),
                table.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                table.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False),
            )
            for batch in filter(len, batches):
                lengths = [compute.min_max(compute.binary_length(column)) for column in batch.columns]
                if any(length["max"].as_py() > MAX_LINE_BYTES for length in lengths):
                    return read, False
                columns: dict[str, list[Any]] = {}
                for name, column in zip(names, batch.columns, strict=True):
                    columns[name] = column.to_pylist()
                    if compute.any(compute.ends_with(column, ".0")).as_py():
                        columns[name] = [_WHOLE.sub(r"\1", value) for value in columns[name]]
                lines = _CsvLines(path, delimiter, read, len(batch))
                read += len(batch)
                if all(length["min"].as_py() for length in lengths):
                    yield Chunk(path, lines, columns=columns, valid_text=True)
                    continue
                values = zip(*columns.values(), strict=True)
                rows = [{name: value for name, value in zip(names, row, strict=True) if value} for row in values]
                yield Chunk(path, lines, rows, valid_text=True)
        except pyarrow.ArrowException:
            return read, False  # a row with fewer or more fields, a quote that never closes, bytes that are not UTF-8
    return read, True


def _header_names(line: bytes, delimiter: str) -> list[str] | None:
    """The names in a simple first line; None where another reader must decide what the header is."""
    try:
        text = line.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        return None
    names = text.split(delimiter)
    simple = line.endswith(b"\n") and text and not set(text) & {'"', "\r", "\0"}
    return names if simple and len(set(names)) == len(names) else None


def _row_of_fields(row: dict[Any, Any]) -> Row | BadRow:
    if None in row:
        return BadRow("malformed_line", "more fields than the header names", "Quote fields that hold the separator.")
    return {name: _WHOLE.sub(r"\1", value) for name, value in row.items() if value}


def _in_chunks(path: Path, rows: Iterator[Row | BadRow]) -> Iterator[Chunk]:
    number, some = 0, []
    for row in rows:
        some.append(row)
        if len(some) == CHUNK_ROWS:
            yield Chunk(path, range(number + 1, number + 1 + len(some)), some)
            number, some = number + len(some), []
    if some:
        yield Chunk(path, range(number + 1, number + 1 + len(some)), some)

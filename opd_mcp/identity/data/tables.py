"""Rows of Parquet files and Arrow streams, looked at before they are decoded: a small file may stand for a huge one."""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from opd_mcp.identity.data.rows import Chunk, RawIds
from opd_mcp.identity.data.sources import MAX_ROW_BYTES, MAX_ROWS, Source, damaged, open_pyarrow, too_large
from opd_mcp.schemas.errors import DataError

MAX_COLUMN_BYTES = 1 << 30
BATCH_BYTES = 1 << 29
BATCH_ROWS = 1024
# Small batches are handed on together, up to here.
CHUNK_BYTES = 16 << 20
SelectColumns = Callable[[Sequence[str]], Sequence[str]]
"""From the columns that a table has to those that are to be read; raises when it cannot be used."""


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


def table_ids(source: Source, paths: Sequence[str]) -> RawIds:
    """The extremes of the token ids in all rows of Parquet files, in columns of lists; raises as `read_chunks`."""
    raw, before = RawIds(), 0
    for file in source.files:
        with _open_parquet(file) as opened:
            lists = [field.name for field in opened.schema_arrow if "list<" in str(field.type)]
            names = [path for path in paths if path in lists]
            for batch in opened.iter_batches(batch_size=_batch_rows(file, opened.metadata), columns=names):
                _add_ids(raw, batch, before)
                before += batch.num_rows
    return raw


def _add_ids(raw: RawIds, batch: Any, before: int) -> None:
    """Take in a batch whose columns are lists of ids; `before` rows stand before it."""
    import pyarrow.compute as pc

    totals = [0] * batch.num_rows
    for column in batch.columns:
        totals = [
            total + (length or 0)
            for total, length in zip(totals, pc.list_value_length(column).to_pylist(), strict=True)
        ]
    for row, length in enumerate(totals):
        raw.add(f"row {before + row}", -1, length)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        flat = column.flatten()
        extremes = pc.min_max(flat).as_py()
        for extreme in (extremes["min"], extremes["max"]):
            if extreme is None or 0 <= extreme <= raw.largest:
                continue
            row = pc.list_parent_indices(column)[pc.index(flat, extreme).as_py()].as_py()
            if extreme < 0:
                raise DataError(
                    "malformed_line",
                    f"{name} of row {before + row} holds the id {extreme}.",
                    value=extreme,
                    fix=f"Give {name} as whole numbers from 0.",
                )
            raw.add(f"row {before + row}", int(extreme), totals[row])


def parquet_chunks(path: Path, select: SelectColumns) -> Iterator[Chunk]:
    """Rows of a Parquet file, in batches that fit into memory."""
    with _open_parquet(path) as file:
        rows_at_once = _batch_rows(path, file.metadata)
        wanted = [name for name in file.schema_arrow.names if name in set(select(file.schema_arrow.names))]
        yield from _table_chunks(path, file.iter_batches(batch_size=rows_at_once, columns=wanted))


def arrow_chunks(path: Path, select: SelectColumns) -> Iterator[Chunk]:
    """Rows of an Arrow stream, the format of `save_to_disk`; Arrow IPC files (Feather) are refused."""
    pyarrow = open_pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as mapped:
            _require_unpacked_stream(path, pyarrow, mapped)
            mapped.seek(0)
            with pyarrow.ipc.open_stream(mapped) as reader:
                wanted = [name for name in reader.schema.names if name in set(select(reader.schema.names))]
                yield from _table_chunks(path, (_checked(batch).select(wanted) for batch in reader))
    except (pyarrow.ArrowException, OSError, UnicodeError, OverflowError, MemoryError) as error:
        raise damaged(path, "Arrow stream", error) from error


def _checked(batch: Any) -> Any:
    batch.validate(full=True)  # offsets in the file are believed otherwise, and may lead out of it
    return batch


def _table_chunks(path: Path, batches: Iterator[Any]) -> Iterator[Chunk]:
    first = 1
    held: list[Any] = []
    rows = size = 0
    for whole in batches:
        for start in range(0, whole.num_rows, BATCH_ROWS):
            batch = whole.slice(start, BATCH_ROWS)
            if batch.nbytes > MAX_ROW_BYTES and any(
                batch.slice(row, 1).nbytes > MAX_ROW_BYTES for row in range(batch.num_rows)
            ):
                raise too_large(path, f"a row of more than {MAX_ROW_BYTES} bytes, after row {first + rows - 1}")
            held.append(batch)
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if rows >= BATCH_ROWS or size > CHUNK_BYTES:
                yield _chunk(path, first, held)
                first, held, rows, size = first + rows, [], 0, 0
    if rows:
        yield _chunk(path, first, held)


def _chunk(path: Path, first: int, batches: list[Any]) -> Chunk:
    """The rows of small batches, by column where no value is missing."""
    lines = range(first, first + sum(batch.num_rows for batch in batches))
    names = batches[0].schema.names
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for batch in batches:
        for name, column in zip(names, batch.columns, strict=True):
            columns[name] += python_values(column)
    if names and not any(column.null_count for batch in batches for column in batch.columns):
        return Chunk(path, lines, columns=columns, valid_text=True)
    values = zip(*columns.values(), strict=True) if names else ((),) * len(lines)
    rows = [{name: value for name, value in zip(names, row, strict=True) if value is not None} for row in values]
    return Chunk(path, lines, rows, valid_text=True)


def python_values(column: Any) -> list[Any]:
    """A column as Python's values; lists of structures, as chats are, in a fraction of the time of `to_pylist`."""
    kind = column.type
    if getattr(kind, "value_type", None) is None or not str(kind).startswith("list<") or column.null_count:
        return list(column.to_pylist())
    items = column.flatten()
    if not str(items.type).startswith("struct<") or items.null_count or not items.type.num_fields:
        return list(column.to_pylist())
    names = [items.type.field(place).name for place in range(items.type.num_fields)]
    fields = [python_values(field) for field in items.flatten()]
    made = iter([dict(zip(names, values, strict=True)) for values in zip(*fields, strict=True)])
    return [list(islice(made, length)) for length in column.value_lengths().to_pylist()]


def _batch_rows(path: Path, metadata: Any) -> int:
    """Rows to decode at a time, so that they fit into memory even if each is the longest that its columns can hold."""
    if metadata.num_rows > MAX_ROWS:
        raise too_large(path, f"{metadata.num_rows} rows, more than {MAX_ROWS}")
    longest = 1
    with path.open("rb") as file:
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                size = max(column.total_uncompressed_size, 8 * column.num_values)
                if size > MAX_COLUMN_BYTES:
                    raise too_large(path, f"a column of {size} bytes in one row group, more than {MAX_COLUMN_BYTES}")
                longest = max(longest, _repeatable_bytes(file, column, size))
    return max(1, min(BATCH_ROWS, BATCH_BYTES // longest))


def _repeatable_bytes(file: BinaryIO, column: Any, size: int) -> int:
    """What a row of a column chunk can hold without being stored for itself: an entry of the chunk's dictionary."""
    if "." in column.path_in_schema:  # a row of a nested column may hold all of its values
        return size
    if not column.has_dictionary_page:
        return size if any("DICTIONARY" in encoding for encoding in column.encodings) else 1
    # A page's header is Thrift: field 1 is the page's kind, field 2 its unpacked size, each after its type, 0x15.
    file.seek(column.dictionary_page_offset)
    header = file.read(16)
    position = 0
    numbers: list[int] = []
    while len(numbers) < 2 and header[position : position + 1] == b"\x15":
        value = shift = 0
        for byte in header[position + 1 : position + 6]:
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        numbers.append(value >> 1)
        position += 1
    is_dictionary = len(numbers) == 2 and numbers[0] == 2
    return min(size, max(numbers[1], 1)) if is_dictionary else size


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    pyarrow = open_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    # Decoding meets text that is not UTF-8, and dates and lengths that Python or this machine do not have.
    except (pyarrow.ArrowException, OSError, UnicodeError, OverflowError, MemoryError) as error:
        raise damaged(path, "Parquet file", error) from error


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
    messages = pyarrow.ipc.MessageReader.open_stream(mapped)
    for message in iter(partial(_next_message, messages), None):
        if message.type != "schema" and _is_packed(message.metadata.to_pybytes()):
            raise DataError(
                "unknown_format",
                f"{path.name} holds packed batches.",
                value=path,
                fix="Write the table as Parquet.",
            )


def _next_message(messages: Any) -> Any:
    try:
        return messages.read_next_message()
    except StopIteration:
        return None


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

"""Parquet shards of sequences: exact token ids and log-probs, BYTE_STREAM_SPLIT + zstd, a CRC per row.

Readable by `datasets.load_dataset("parquet", …)` and by pyarrow alone. pyarrow is imported when a shard is touched, so
that training on data in memory needs none.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.data.sequences import Sequences, TeacherPrompts, concatenate
from opd_mcp.identity.files import fsync_directory
from opd_mcp.schemas.cache import Shard
from opd_mcp.schemas.errors import IntegrityError

# ids too are split into byte planes: the high planes of token ids are nearly constant (docs/cache.md has the numbers)
ZSTD_LEVEL = 1
# below this float16 has no finite neighbour worth keeping, and an advantage is clipped long before
LEAST_FLOAT16_LOGPROB = -1e4
TOKEN_COLUMNS = ("teacher_logprobs", "behaviour_logprobs", "topk_ids", "topk_logprobs")
TEACHER_PROMPTS = "teacher_prompt_ids"
"""The column of the prompts that the teacher saw; absent where they are the student's."""
DOMAIN = "teacher_domain"
"""The column of the domains of several teachers; absent where the prompts have none."""


def write_shard(
    path: Path,
    sequences: Sequences,
    *,
    texts: Mapping[str, Sequence[str | None]] | None = None,
    check_fence: Callable[[], None] = lambda: None,
) -> Shard:
    """Write all rows to `path` (temporary name, fsync, rename) and return the shard's manifest entry.

    `check_fence` is asked before the rename and raises when there must be no such shard.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "prompt_id": pa.array(sequences.prompt_row_ids, pa.string()),
        "prompt_ids": _ragged(sequences.prompt_offsets, sequences.prompt_ids),
        "response_ids": _ragged(sequences.response_offsets, sequences.response_ids),
        "finish_reason": pa.array(sequences.finish_reasons, pa.string()),
    }
    seen = sequences.teacher_prompts
    if seen is not None:
        columns[TEACHER_PROMPTS] = _ragged(seen.offsets, seen.ids)
    for name in TOKEN_COLUMNS:
        if name in sequences.columns:
            columns[name] = _ragged(sequences.response_offsets, sequences.columns[name])
    if sequences.domains:
        columns[DOMAIN] = pa.array(sequences.domains, pa.string())
    for name, values in (texts or {}).items():
        columns[name] = pa.array(values, pa.string())
    columns["row_crc"] = pa.array(row_crcs(sequences), pa.uint32())
    table = pa.table(columns)
    ids = ("prompt_ids", "response_ids", TEACHER_PROMPTS)
    split = [name for name in (*ids, *TOKEN_COLUMNS) if name in columns]
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(
        table,
        partial,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=["finish_reason"],
        column_encoding={_leaf(table.schema.field(name)): "BYTE_STREAM_SPLIT" for name in split},
    )
    # Arrow's pool keeps what a shard needed: it would add to the memory of the next shard's scoring
    del table, columns
    pa.default_memory_pool().release_unused()
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    check_fence()
    partial.rename(path)
    fsync_directory(path.parent)
    return Shard(
        file=path.name,
        rows=len(sequences),
        tokens=len(sequences.response_ids),
        prompt_tokens=len(sequences.prompt_ids),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def read_shard(path: Path, *, sha256: str | None = None) -> Sequences:
    """All rows of one shard, float columns widened to float32.

    Raises IntegrityError `damaged_file` if the file's hash or a row's CRC is not what was written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = path.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise damaged(path, "its sha256 is not the manifest's")
    try:
        sequences, crcs = _decoded(pq.read_table(pa.BufferReader(content)).combine_chunks())
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, f"it is not readable Parquet ({error})") from error
    # Columns that are missing, of other types or of other lengths.
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise damaged(path, f"its columns are not those of a shard ({error})") from error
    if len(wrong := np.flatnonzero(row_crcs(sequences) != crcs)):
        raise damaged(path, f"row {wrong[0]} does not match its CRC")
    return widened(sequences)


def _decoded(table: Any) -> tuple[Sequences, NDArray[np.uint32]]:
    prompt_offsets, prompt_ids = _flat(table, "prompt_ids")
    response_offsets, response_ids = _flat(table, "response_ids")
    seen = _flat(table, TEACHER_PROMPTS) if TEACHER_PROMPTS in table.column_names else None
    columns = {name: _flat(table, name)[1] for name in TOKEN_COLUMNS if name in table.column_names}
    if any(values.dtype != np.int32 for values in (prompt_ids, response_ids, *(seen[1:] if seen else ()))):
        raise TypeError("ids are not 32-bit integers")
    if any(len(values) != len(response_ids) or values.dtype.kind not in "if" for values in columns.values()):
        raise ValueError("a column has another length or type than the responses")
    named = ("finish_reason", "prompt_id", *([DOMAIN] if DOMAIN in table.column_names else []))
    texts = {name: table.column(name).to_pylist() for name in named}
    if not all(isinstance(text, str) for values in texts.values() for text in values):
        raise TypeError("a text is missing")
    sequences = Sequences(
        prompt_ids,
        prompt_offsets,
        response_ids,
        response_offsets,
        columns,
        texts["finish_reason"],
        texts["prompt_id"],
        TeacherPrompts(seen[1], seen[0]) if seen else None,
        texts.get(DOMAIN, ()),
    )
    crcs = table.column("row_crc").to_numpy()
    if crcs.dtype != np.uint32:
        raise TypeError("row_crc is not a check sum")
    return sequences, crcs


def widened(sequences: Sequences) -> Sequences:
    """The rows with float16 columns as float32: what is read is always float32."""
    small = {name: values for name, values in sequences.columns.items() if values.dtype == np.float16}
    return sequences.with_columns(**{name: values.astype(np.float32) for name, values in small.items()})


def compacted(sequences: Sequences, dtype: str) -> tuple[Sequences, int]:
    """Float columns in the stored dtype, and how many values were clamped to fit float16."""
    if dtype == "float32":
        return sequences, 0
    clamped, columns = 0, {}
    for name, values in sequences.columns.items():
        if values.dtype.kind == "f":
            clamped += int(np.count_nonzero(np.less(values, LEAST_FLOAT16_LOGPROB)))
            columns[name] = np.maximum(values, LEAST_FLOAT16_LOGPROB).astype(np.float16)
    return sequences.with_columns(**columns), clamped


def read_shards(directory: Path, shards: Sequence[Shard]) -> Sequences:
    """All rows of the shards in order, each checked against its sha256 and its rows' CRCs; there must be one."""
    if not shards:
        raise damaged(directory / "manifest.json", "it names no shard")
    return concatenate([read_shard(directory / shard.file, sha256=shard.sha256) for shard in shards])


def read_texts(path: Path, column: str) -> list[str | None]:
    """A text column of one shard."""
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=[column]).column(column).to_pylist()


def row_crcs(sequences: Sequences) -> NDArray[np.uint32]:
    """crc32 of each row [N] over prompt, response, the token columns in name order, and the teacher's prompt."""
    crcs, seen = np.empty(len(sequences), dtype=np.uint32), sequences.teacher_prompts
    names = sorted(name for name in sequences.columns if name in TOKEN_COLUMNS)
    for row in range(len(sequences)):
        crc = zlib.crc32(sequences.prompt(row).tobytes())
        crc = zlib.crc32(sequences.response(row).tobytes(), crc)
        for name in names:
            crc = zlib.crc32(np.ascontiguousarray(sequences.column(name, row)).tobytes(), crc)
        if seen is not None:
            crc = zlib.crc32(seen.of(row).tobytes(), crc)
        crcs[row] = crc
    return crcs


class ContentHash:
    """sha256 over the rows added, in order: their content, independent of shards and encodings."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, sequences: Sequences) -> None:
        """Take in these rows."""
        names = sorted(name for name in sequences.columns if name in TOKEN_COLUMNS)
        for row in range(len(sequences)):
            texts = f"{sequences.prompt_row_ids[row]}\0{sequences.finish_reasons[row]}"
            texts += f"\0{sequences.domains[row]}" if sequences.domains else ""
            values = [sequences.prompt(row), sequences.response(row), *(sequences.column(name, row) for name in names)]
            values += [] if sequences.teacher_prompts is None else [sequences.teacher_prompts.of(row)]
            parts = [texts.encode(), *(np.ascontiguousarray(part).tobytes() for part in values)]
            self._digest.update(str([len(part) for part in parts]).encode())
            for part in parts:
                self._digest.update(part)

    def hexdigest(self) -> str:
        """The hash in hex."""
        return self._digest.hexdigest()


def damaged(path: Path, why: str) -> IntegrityError:
    """The error for a file whose content is not what was written."""
    return IntegrityError(
        "damaged_file",
        f"{path.name} is damaged: {why}.",
        value=path,
        fix="Restore the file from a copy, or build this artifact again.",
    )


def _ragged(offsets: NDArray[np.int64], values: NDArray[Any]) -> Any:
    import pyarrow as pa

    leaf = pa.array(values.ravel())
    if values.ndim == 2:
        leaf = pa.FixedSizeListArray.from_arrays(leaf, values.shape[1])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), leaf)


def _flat(table: Any, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    column = table.column(name).combine_chunks()
    column = column.chunk(0) if hasattr(column, "chunk") else column
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values
    if hasattr(values.type, "list_size"):
        flat = values.values.to_numpy(zero_copy_only=False).reshape(-1, values.type.list_size)
    else:
        flat = values.to_numpy(zero_copy_only=False)
    return offsets - offsets[0], flat[offsets[0] : offsets[-1]]


def _leaf(field: Any) -> str:
    inner = field.type.value_type
    return f"{field.name}.list.element" + (".list.element" if hasattr(inner, "list_size") else "")

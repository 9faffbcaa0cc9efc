"""A teacher cache to look at: its manifest's figures and two decoded rows, by its files and without torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_mcp.identity.lineage import read_manifest
from opd_mcp.planning.prompts.text_work import TextWork
from opd_mcp.schemas.cache import CacheInspection, CacheManifest, SampleRow
from opd_mcp.schemas.errors import IntegrityError
from opd_mcp.schemas.texts import shortened_bytes

SAMPLE_ROWS = 2
# bytes: a model's tokens are counted by them, and a Chinese character is one token as well as three bytes
TEXT_BYTES, TOKEN_BYTES = 300, 32
FIRST_TOKENS, LAST_TOKENS = 16, 4
COLUMNS = ("prompt_ids", "response_ids", "finish_reason", "teacher_logprobs", "behaviour_logprobs")


def inspect_cache(path: Path, texts: TextWork | None = None) -> CacheInspection:
    """What a cache's directory holds; raises as `read_manifest` and `TextWork.facts`."""
    manifest = read_manifest(path)
    return CacheInspection(
        path=str(path),
        bytes=sum((path / shard.file).stat().st_size for shard in manifest.shards if (path / shard.file).is_file()),
        rows=manifest.rows,
        tokens=manifest.tokens,
        manifest=manifest.model_copy(update={"shards": [], "self_sha256": ""}),
        shards=len(manifest.shards),
        sample=_sample(path, manifest, texts or TextWork()),
    )


def _sample(path: Path, manifest: CacheManifest, texts: TextWork) -> list[SampleRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard = next((shard for shard in manifest.shards if shard.rows), None)
    if shard is None:
        return []
    try:
        file = pq.ParquetFile(path / shard.file)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        rows = next(file.iter_batches(batch_size=SAMPLE_ROWS, columns=columns)).to_pylist()
    # Rows that are not there, and values that Python has no type for.
    except (pa.ArrowException, OSError, StopIteration, ValueError, OverflowError) as error:
        raise _damaged(path / shard.file) from error
    try:
        return _rows(rows, path / "tokenizer", texts)
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise _damaged(path / shard.file) from error


def _rows(rows: list[dict[str, Any]], tokenizer: Path, texts: TextWork) -> list[SampleRow]:
    """The rows as texts, all decoded by one child."""
    shown = [_shown(len(row["response_ids"])) for row in rows]
    sequences: list[list[int]] = []
    for row, places in zip(rows, shown, strict=True):
        sequences += [row["prompt_ids"], row["response_ids"], *([row["response_ids"][place]] for place in places)]
    decoded = iter(texts.decoded(tokenizer, sequences))
    return [_row(row, places, decoded) for row, places in zip(rows, shown, strict=True)]


def _shown(length: int) -> list[int]:
    if length <= FIRST_TOKENS + LAST_TOKENS:
        return list(range(length))
    return [*range(FIRST_TOKENS), *range(length - LAST_TOKENS, length)]


def _row(row: dict[str, Any], places: list[int], decoded: Iterator[str]) -> SampleRow:
    return SampleRow(
        prompt=shortened_bytes(next(decoded), TEXT_BYTES),
        response=shortened_bytes(next(decoded), TEXT_BYTES),
        finish_reason=row["finish_reason"],
        response_tokens=len(row["response_ids"]),
        tokens=[
            _token(next(decoded), place, row["teacher_logprobs"], row.get("behaviour_logprobs")) for place in places
        ],
    )


def _token(
    text: str, place: int, teacher: list[float], student: list[float] | None
) -> tuple[str, float, float] | tuple[str, float]:
    text, logprob = shortened_bytes(text, TOKEN_BYTES), round(float(teacher[place]), 4)
    return (text, logprob) if student is None else (text, logprob, round(float(student[place]), 4))


def _damaged(file: Path) -> IntegrityError:
    return IntegrityError(
        "damaged_file",
        f"{file.name} cannot be read.",
        value=file,
        fix="Run `opd-mcp cache verify`, then restore the file from a copy or build the cache again.",
    )

"""A teacher cache to look at: its manifest's figures and two decoded rows, by its files and without torch."""

from pathlib import Path
from typing import Any

from opd_mcp.identity.lineage import read_manifest
from opd_mcp.schemas.cache import CacheInspection, CacheManifest, SampleRow
from opd_mcp.schemas.errors import IntegrityError
from opd_mcp.schemas.texts import shortened_bytes

SAMPLE_ROWS = 2
# bytes: a model's tokens are counted by them, and a Chinese character is one token as well as three bytes
TEXT_BYTES, TOKEN_BYTES = 300, 32
FIRST_TOKENS, LAST_TOKENS = 16, 4
COLUMNS = ("prompt_ids", "response_ids", "finish_reason", "teacher_logprobs", "behaviour_logprobs")


def inspect_cache(path: Path) -> CacheInspection:
    """What a cache's directory holds; raises as `read_manifest`."""
    manifest = read_manifest(path)
    return CacheInspection(
        path=str(path),
        bytes=sum((path / shard.file).stat().st_size for shard in manifest.shards if (path / shard.file).is_file()),
        rows=manifest.rows,
        tokens=manifest.tokens,
        manifest=manifest.model_copy(update={"shards": [], "self_sha256": ""}),
        shards=len(manifest.shards),
        sample=_sample(path, manifest),
    )


def _sample(path: Path, manifest: CacheManifest) -> list[SampleRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

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
        tokenizer = Tokenizer.from_file(str(path / "tokenizer" / "tokenizer.json"))
    except Exception as error:  # the Rust side raises bare Exception
        raise _damaged(path / "tokenizer" / "tokenizer.json") from error
    try:
        return [_row(row, tokenizer) for row in rows]
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise _damaged(path / shard.file) from error


def _row(row: dict[str, Any], tokenizer: Any) -> SampleRow:
    ids = row["response_ids"]
    shown = range(len(ids))
    if len(ids) > FIRST_TOKENS + LAST_TOKENS:
        shown = [*range(FIRST_TOKENS), *range(len(ids) - LAST_TOKENS, len(ids))]  # type: ignore[assignment]
    teacher, student = row["teacher_logprobs"], row.get("behaviour_logprobs")
    return SampleRow(
        prompt=shortened_bytes(tokenizer.decode(row["prompt_ids"], skip_special_tokens=False), TEXT_BYTES),
        response=shortened_bytes(tokenizer.decode(ids, skip_special_tokens=False), TEXT_BYTES),
        finish_reason=row["finish_reason"],
        response_tokens=len(ids),
        tokens=[_token(tokenizer, ids, place, teacher, student) for place in shown],
    )


def _token(
    tokenizer: Any, ids: list[int], place: int, teacher: list[float], student: list[float] | None
) -> tuple[str, float, float] | tuple[str, float]:
    text = shortened_bytes(tokenizer.decode([ids[place]], skip_special_tokens=False), TOKEN_BYTES)
    logprob = round(float(teacher[place]), 4)
    return (text, logprob) if student is None else (text, logprob, round(float(student[place]), 4))


def _damaged(file: Path) -> IntegrityError:
    return IntegrityError(
        "damaged_file",
        f"{file.name} cannot be read.",
        value=file,
        fix="Run `opd-mcp cache verify`, then restore the file from a copy or build the cache again.",
    )

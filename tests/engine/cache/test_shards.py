"""Shards: exact round trips, readable by others, damage found."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.engine.cache.shards import compacted, read_shard, read_shards, read_texts, write_shard
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.schemas.errors import IntegrityError


def some_sequences(sizes: list[tuple[int, int]], *, k: int = 3, seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    tokens = sum(response for _, response in sizes)
    return build_sequences(
        [rng.integers(0, 150_000, size=prompt).tolist() for prompt, _ in sizes],
        [rng.integers(0, 150_000, size=response).tolist() for _, response in sizes],
        columns={
            "teacher_logprobs": -rng.exponential(size=tokens).astype(np.float32),
            "behaviour_logprobs": -rng.exponential(size=tokens).astype(np.float32),
            "topk_ids": rng.integers(0, 150_000, size=(tokens, k)).astype(np.int32),
            "topk_logprobs": -rng.exponential(size=(tokens, k)).astype(np.float32),
        },
        finish_reasons=["eos" if response else "length" for _, response in sizes],
        prompt_row_ids=[f"row-{row}" for row in range(len(sizes))],
    )


def assert_equal(a: Sequences, b: Sequences) -> None:
    for name in ("prompt_ids", "prompt_offsets", "response_ids", "response_offsets"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert a.columns.keys() == b.columns.keys()
    assert all(np.array_equal(a.columns[name], b.columns[name]) for name in a.columns)
    assert list(a.finish_reasons) == list(b.finish_reasons)
    assert list(a.prompt_row_ids) == list(b.prompt_row_ids)


@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_what_is_written_is_read(sizes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("shard") / "shard-00000.parquet"
    written = some_sequences(sizes)
    entry = write_shard(path, written)
    assert (entry.rows, entry.tokens) == (len(sizes), sum(response for _, response in sizes))
    assert_equal(read_shard(path, sha256=entry.sha256), written)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file stays"


def test_without_the_right_there_is_no_shard_and_the_one_before_stays(tmp_path: Path) -> None:
    path, before = tmp_path / "shard-00000.parquet", some_sequences([(2, 3)])
    entry = write_shard(path, before)

    def lost() -> None:
        raise PermissionError

    with pytest.raises(PermissionError):
        write_shard(path, some_sequences([(4, 5)]), check_fence=lost)
    assert_equal(read_shard(path, sha256=entry.sha256), before)


def test_several_shards_are_one_data_set(tmp_path: Path) -> None:
    whole = some_sequences([(2, 3), (4, 0), (1, 5), (3, 2)])
    entries = [
        write_shard(tmp_path / f"shard-{number}.parquet", whole.slice(start, start + 2))
        for number, start in enumerate((0, 2))
    ]
    assert_equal(read_shards(tmp_path, entries), whole)


def test_datasets_and_pyarrow_read_a_shard_without_us(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    written = some_sequences([(2, 3), (1, 4)])
    write_shard(path, written, texts={"response": ["a", "b"]})
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "datasets"))
    assert rows[1]["response_ids"] == written.response(1).tolist()
    assert np.allclose(rows[0]["topk_logprobs"], written.column("topk_logprobs", 0))
    assert pq.read_table(path).column("finish_reason").to_pylist() == ["eos", "eos"]
    assert read_texts(path, "response") == ["a", "b"]


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    entry = write_shard(path, some_sequences([(2, 3), (1, 4)]))
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(IntegrityError, match="damaged_file"):
            read_shard(path, sha256=entry.sha256)


def test_a_changed_value_in_an_intact_file_is_found_by_its_row_s_crc(tmp_path: Path) -> None:
    path, other = tmp_path / "shard.parquet", tmp_path / "other.parquet"
    write_shard(path, some_sequences([(2, 3), (1, 4)]))
    write_shard(other, some_sequences([(2, 3), (1, 4)], seed=1))
    mixed = pq.read_table(path).set_column(
        pq.read_table(path).column_names.index("teacher_logprobs"),
        "teacher_logprobs",
        pq.read_table(other).column("teacher_logprobs"),
    )
    pq.write_table(mixed, path)
    with pytest.raises(IntegrityError, match="row 0"):
        read_shard(path)


def test_a_missing_or_foreign_file_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(IntegrityError, match="not readable Parquet"):
        read_shard(path)


def test_float16_is_clamped_counted_and_close(tmp_path: Path) -> None:
    written = some_sequences([(2, 3), (1, 4)])
    values = written.columns["teacher_logprobs"].copy()
    values[2] = -1e6
    small, clamped = compacted(written.with_columns(teacher_logprobs=values), "float16")
    write_shard(tmp_path / "shard.parquet", small)
    read = read_shard(tmp_path / "shard.parquet")
    assert clamped == 1
    assert read.columns["teacher_logprobs"].dtype == np.float32
    assert read.columns["teacher_logprobs"][2] == pytest.approx(-1e4, rel=1e-3)
    assert np.allclose(read.columns["behaviour_logprobs"], written.columns["behaviour_logprobs"], atol=4e-3)

"""The same rows from every kind of file, and files that stand for more than they are."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_mcp.identity.data import formats
from opd_mcp.identity.data.reading import read_prompts, read_responses_header
from opd_mcp.identity.data.scan import scan_prompts
from opd_mcp.schemas.errors import DataError, IntegrityError, PathError

ROWS = [{"prompt": f"{i}+1=?", "answer": str(i + 1)} for i in range(1500)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def csv_text(separator: str) -> bytes:
    lines = [f"prompt{separator}answer", *(f'"{row["prompt"]}"{separator}{row["answer"]}' for row in ROWS)]
    return "\r\n".join(lines).encode()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def arrow_stream(path, rows, **options):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=1000)


WRITERS = {
    "p.jsonl": lambda path: path.write_bytes(LINES),
    "p.ndjson": lambda path: path.write_bytes(LINES),
    "p.JSONL": lambda path: path.write_bytes(LINES),
    "p.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "p.jsonl.zst": lambda path: path.write_bytes(zstd(LINES)),
    "p.json": lambda path: path.write_text(json.dumps(ROWS)),
    "indented.json": lambda path: path.write_text("\ufeff" + json.dumps(ROWS, indent=2)),
    "object.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "lines.json": lambda path: path.write_bytes(LINES),
    "p.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "p.csv": lambda path: path.write_bytes(csv_text(",")),
    "p.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_text(","))),
    "p.tsv": lambda path: path.write_bytes(csv_text("\t")),
    "p.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=700),
    "p.arrow": lambda path: arrow_stream(path, ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_holds_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    read = read_prompts(tmp_path / name)
    assert [{"prompt": row.prompt, "answer": row.answer} for row in read] == ROWS
    assert [row.id for row in read] == [str(i) for i in range(len(ROWS))]


def test_json_elements_longer_than_a_block_are_read(tmp_path):
    rows = [{"prompt": letter * (3 << 19)} for letter in "abc"]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    assert [row.prompt[:2] for row in read_prompts(tmp_path / "p.json")] == ["aa", "bb", "cc"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "not JSON"),
        ('[{"prompt": "a"}', "not JSON"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "not JSON"),
        ("3", "neither a JSON list nor an object"),
        ('{"a": [{"prompt": "x"}], "b": [{"prompt": "y"}]}', "2 lists of objects: a, b"),
        ("[]", "no rows"),
        ("", "no rows"),
    ],
)
def test_json_that_is_no_list_of_rows_is_refused(tmp_path, text, words):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_prompts(tmp_path / "p.json")


def test_bad_rows_of_other_formats_are_skipped_too(tmp_path):
    (tmp_path / "p.json").write_text('[{"prompt": "a"}, 3, {"prompt": ""}, {"prompt": "b"}]')
    assert [row.id for row in read_prompts(tmp_path / "p.json")] == ["0", "3"]
    (tmp_path / "p.csv").write_bytes(b'prompt,answer\na,1\n"b, c",2,3\n\xff,1\n"d\nd",4\n')
    scan = scan_prompts(tmp_path / "p.csv")
    assert [row.prompt for row in scan.first] == ["a", "d\nd"]
    assert [row.place for row in scan.understood.skipped_rows] == ["p.csv line 3", "p.csv line 4"]


def test_a_quote_that_never_closes_is_one_error(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\na\n"b\n' + "c\n" * (1 << 20))
    with pytest.raises(DataError, match="quote that never closes"):
        read_prompts(tmp_path / "p.csv")


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl.zst", "p.arrow"])
def test_a_file_that_breaks_off_is_damaged(tmp_path, name):
    WRITERS[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match="damaged_file"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl.zst"])
def test_what_unpacks_to_far_more_than_text_can_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr(formats, "RATIO_FREE_BYTES", 1 << 20)
    data = b'{"prompt": "a"}\n' * (1 << 18)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else zstd(data))
    with pytest.raises(DataError, match="once it is unpacked"):
        read_prompts(tmp_path / name)


def test_packed_arrow_batches_and_feather_files_are_refused(tmp_path):
    arrow_stream(tmp_path / "packed.arrow", ROWS, compression="zstd")
    with pytest.raises(DataError, match="packed batches"):
        read_prompts(tmp_path / "packed.arrow")
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="Feather"):
        read_prompts(tmp_path / "file.arrow")


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    for number in range(3):
        rows = ROWS[number * 2 : number * 2 + 2]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"train-{number:05d}-of-00003.jsonl").write_text(text)
    expected = [row["prompt"] for row in ROWS[:6]]
    for path in (tmp_path, tmp_path / "train-*.jsonl", tmp_path / "train-0000?-of-00003.jsonl"):
        assert [row.prompt for row in read_prompts(path)] == expected
    (tmp_path / "train-00001-of-00003.jsonl").write_text("broken\n")
    skipped = scan_prompts(tmp_path).understood
    assert (skipped.files, skipped.skipped_rows[0].place) == (3, "train-00001-of-00003.jsonl line 1")


def test_splits_are_not_mixed_up_with_shards(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"3 data files of 2 names.*Nearest: .*train-\*\.jsonl"):
        read_prompts(tmp_path)
    assert len(read_prompts(tmp_path / "train-*.jsonl")) == 2
    with pytest.raises(PathError, match="No file matches"):
        read_prompts(tmp_path / "valid-*.jsonl")


def test_a_repository_as_the_hub_lays_it_out_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data" / "train-00000-of-00001.parquet")
    assert len(read_prompts(tmp_path)) == len(ROWS)


def test_what_save_to_disk_writes_is_read(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list([{"question": "1+1=?", "answer": "#### 2"}] * 30)
    saved.save_to_disk(str(tmp_path / "set"), num_shards=2)
    scan = scan_prompts(tmp_path / "set")
    assert (scan.rows, scan.rows_with_answer, scan.understood.files) == (30, 30, 2)
    assert (scan.understood.shape, scan.first[0].answer) == ("question/answer", "2")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="2 splits: train, test"):
        read_prompts(tmp_path / "splits")
    assert len(read_prompts(tmp_path / "splits" / "train")) == 30


def test_a_state_file_leads_to_no_other_folder(tmp_path):
    (tmp_path / "secret.arrow").write_bytes(b"")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(DataError, match="names no data files"):
        read_prompts(tmp_path / "set")


def test_the_header_of_a_large_parquet_file_reads_its_beginning(tmp_path):
    table = pa.table({"prompt": ["a"] * 5000, "response": ["b"] * 5000})
    pq.write_table(table, tmp_path / "r.parquet")
    header = read_responses_header(tmp_path / "r.parquet")
    assert header.rows == 5000
    assert header.understood.notes == ["the first 1024 of 5000 rows were checked"]

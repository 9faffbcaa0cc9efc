"""The quick way to read many rows gives what the plain way gives, row by row: typed rows, hash, counts and messages."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_mcp.identity.data import formats, rows, scan
from opd_mcp.identity.data.reading import RowReader, read_prompts
from opd_mcp.identity.data.rows import Chunk, PromptsHash, turns_of, turns_of_all
from opd_mcp.identity.data.scan import scan_prompts
from opd_mcp.identity.data.shapes import PROMPT_SHAPES, all_prompt_parts, prompt_parts
from opd_mcp.schemas.errors import OpdError

WORDS = st.text(alphabet='ab #é"\\\n\r,１\u0301\u2028\x00\x1f', max_size=6)
ANSWERS = WORDS | st.sampled_from(["8.0", "x #### 7", "####", "\\boxed{3}"]) | st.integers(-3, 3) | st.none()
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", ""]), "content": WORDS})
    | st.fixed_dictionaries({"from": st.sampled_from(["human", "GPT", "user"]), "value": WORDS})
    | st.fixed_dictionaries({"role": st.just("assistant"), "content": WORDS | st.none(), "thinking": WORDS}),
    max_size=3,
)
ROWS = {
    "prompt": st.fixed_dictionaries({"prompt": WORDS, "answer": ANSWERS}),
    "chat": st.fixed_dictionaries({"messages": TURNS, "solution": WORDS | st.just("\\boxed{3}")}),
    "dapo": st.fixed_dictionaries(
        {"prompt": TURNS, "reward_model": st.fixed_dictionaries({"ground_truth": ANSWERS}), "id": ANSWERS}
    ),
    "sharegpt": st.fixed_dictionaries({"conversations": TURNS}, optional={"system": WORDS}),
    "gsm8k": st.fixed_dictionaries({"question": WORDS, "answer": ANSWERS}),
    "mixed": st.dictionaries(st.sampled_from(["id", "prompt", "Prompt", "problem", "solution"]), ANSWERS, max_size=4),
}
FEW = settings(max_examples=60)


def found(path, quick: bool):
    """All that is read of a file, or the error; `quick` decides whether rows may be made many at a time."""
    reader = RowReader(path, PROMPT_SHAPES, prompt_parts, None, all_prompt_parts if quick else None)
    try:
        parts = [part for batch in reader.batches() for part in batch]
    except OpdError as error:
        return str(error), error.value
    return parts, reader.understood()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(formats, "QUICK_CSV_BYTES", 0)
    monkeypatch.setattr(formats, "READ_BYTES", 64)
    monkeypatch.setattr(formats, "CHUNK_ROWS", 3)
    monkeypatch.setattr("opd_mcp.identity.data.tables.BATCH_ROWS", 3)
    monkeypatch.setattr(formats, "QUICK_CSV_BLOCK", 200)


@pytest.fixture
def plain(monkeypatch):
    """A context in which every quick way is off."""

    def switched():
        context = pytest.MonkeyPatch.context()
        patch = context.__enter__()
        patch.setattr(formats, "_quick_rows", formats._plain_rows)
        patch.setattr(formats, "QUICK_CSV_BYTES", 1 << 60)
        patch.setattr(PromptsHash, "_quick_json", staticmethod(lambda prompts: None))
        patch.setattr(scan, "normalised_all", lambda texts: [scan.normalised(text) for text in texts])
        return context

    return switched


@FEW
@given(data=st.data(), shape=st.sampled_from(sorted(ROWS)))
def test_json_lines_and_parquet(tmp_path, small_chunks, plain, data, shape):
    some = data.draw(st.lists(ROWS[shape], min_size=1, max_size=12))
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
    both_ways(file, plain)
    try:
        pq.write_table(pa.Table.from_pylist(some), tmp_path / "p.parquet")
    except (pa.ArrowException, TypeError):
        return  # a column of texts and numbers
    both_ways(tmp_path / "p.parquet", plain)


def both_ways(file, plain):
    quick, quick_scan = found(file, quick=True), scanned(file)
    context = plain()
    try:
        assert quick == found(file, quick=False)
        slow_scan = scanned(file)
    finally:
        context.__exit__(None, None, None)
    assert quick_scan == slow_scan


def scanned(file):
    try:
        return scan_prompts(file, long_bytes=5)
    except OpdError as error:
        return str(error)


CELLS = st.text(alphabet='a",\n\ré.0８ ', max_size=5) | st.sampled_from(["8.0", "-1.0", "x.0", ""])


@FEW
@given(table=st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=20), raw=st.text('a",\n\r', max_size=6))
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_of_text(tmp_path, small_chunks, plain, end, table, raw):
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([["question", "answer"], *table])
    for name, content in (("whole.csv", text.getvalue()), ("raw.csv", text.getvalue() + raw)):
        (tmp_path / name).write_bytes(content.encode())
        both_ways(tmp_path / name, plain)


def test_a_table_that_breaks_in_the_middle_is_read_on_row_by_row(tmp_path, small_chunks, plain):
    lines = [f'"{n}\n+1=?",{n}.0' for n in range(60)]
    lines[45:45] = ["\xff,1", "more,fields,than,two", '"",3']
    (tmp_path / "p.csv").write_bytes("\n".join(["question,answer", *lines]).encode("latin-1"))
    both_ways(tmp_path / "p.csv", plain)
    read = read_prompts(tmp_path / "p.csv")
    assert len(read) == 60
    assert [row.answer for row in read] == [str(n) for n in range(60)]
    skipped = scan_prompts(tmp_path / "p.csv").understood.skipped_rows
    assert [row.place for row in skipped] == [f"p.csv line {line}" for line in (92, 93, 94)]


@pytest.mark.parametrize("path", ["jsonl", "csv", "parquet"])
def test_the_quick_way_is_taken(tmp_path, small_chunks, monkeypatch, path):
    some = [{"question": f"{n}+1=?", "answer": f"so\n#### {n}"} for n in range(300)]
    file = tmp_path / f"p.{path}"
    if path == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
    elif path == "parquet":
        pq.write_table(pa.Table.from_pylist(some), file)
    else:
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, ["question", "answer"])
            writer.writeheader()
            writer.writerows(some)
    one_by_one = []
    monkeypatch.setattr(
        "opd_mcp.identity.data.reading.prompt_parts", lambda *row: one_by_one.append(row) or prompt_parts(*row)
    )
    assert [row.answer for row in read_prompts(file)] == [str(n) for n in range(300)]
    assert len(one_by_one) < 20, "only the first chunk, from which the shape is learned"


@given(values=st.lists(TURNS, max_size=4))
def test_turns_of_many_chats(values):
    quick = turns_of_all(values, valid_text=False)
    if quick is not None:
        assert quick == [turns_of(value, "messages") for value in values]


def test_plain_chats_are_read_at_once():
    values = [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], [{"from": "system", "value": "c"}]]
    assert turns_of_all(values, valid_text=True) == [turns_of(value, "conversations") for value in values]
    chunk = Chunk(None, range(1, 3), [{"messages": value} for value in values])
    assert chunk.fields() == ("messages",)
    assert rows.shown_text(None, turns_of(values[1], "conversations")) == "c"

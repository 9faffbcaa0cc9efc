"""Prompts and responses, read and refused."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_mcp.identity.data.reading import read_prompts, read_responses, read_responses_header
from opd_mcp.identity.data.rows import PromptRow, prompts_hash
from opd_mcp.identity.data.scan import scan_prompts
from opd_mcp.schemas.errors import DataError, IntegrityError, OpdError, PathError

MESSAGES = [{"role": "user", "content": "1+1=?"}]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_rows_become_prompts(tmp_path):
    file = jsonl(
        tmp_path / "p.jsonl", {"prompt": "1+1=?", "answer": 2, "id": "a", "source": "x"}, {"messages": MESSAGES}
    )
    first, second = read_prompts(file)
    assert (first.id, first.prompt, first.answer) == ("a", "1+1=?", "2")
    assert (second.id, second.prompt, second.messages, second.answer) == ("1", None, tuple(MESSAGES), None)
    assert second.text() == "1+1=?"


def test_parquet_holds_the_same_prompts(tmp_path):
    rows = [{"prompt": "1+1=?", "answer": "2", "id": "a", "messages": None}]
    rows.append({"prompt": None, "answer": None, "id": "b", "messages": MESSAGES})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    lines = [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert read_prompts(tmp_path / "p.parquet") == read_prompts(jsonl(tmp_path / "p.jsonl", *lines))


def test_a_directory_with_one_data_file_is_that_file(tmp_path):
    jsonl(tmp_path / "anything.jsonl", {"prompt": "a"})
    (tmp_path / "README.md").write_text("")
    assert len(read_prompts(tmp_path)) == 1
    jsonl(tmp_path / "more.jsonl", {"prompt": "b"})
    with pytest.raises(DataError, match="2 data files") as caught:
        read_prompts(tmp_path)
    assert len(caught.value.nearest) == 2
    jsonl(tmp_path / "prompts.jsonl", {"prompt": "c"})
    assert read_prompts(tmp_path)[0].prompt == "c", "our own artifacts are never unclear"


def test_blank_lines_crlf_and_a_byte_order_mark_are_fine(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert [row.prompt for row in read_prompts(file)] == ["a", "b"]


BAD_LINES = [
    (b"{", "malformed_line", "not JSON"),
    (b"[1]", "malformed_line", "a JSON list"),
    (b"\xff\xfe", "malformed_line", "not JSON"),
    (b"[" * 100_000, "malformed_line", "not JSON"),
    (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', "malformed_line", "longer than"),
    (b'{"prompt": 3}', "malformed_line", "prompt is not a text"),
    (b'{"prompt": "\\ud800"}', "malformed_line", "surrogate"),
    (b'{"prompt": "a", "answer": [1]}', "malformed_line", "answer"),
    (b'{"prompt": "a", "messages": []}', "malformed_line", "both"),
    (b'{"messages": []}', "malformed_line", "messages"),
    (b'{"messages": [{"role": "user"}]}', "malformed_line", "no content"),
    (b'{"messages": [{"role": "assistant", "content": "2"}]}', "malformed_line", "assistant"),
    (b'{"other": "a"}', "missing_field", "`prompt` or `messages`"),
    (b'{"prompt": ""}', "missing_field", "empty"),
]


@pytest.mark.parametrize(("line", "code", "words"), BAD_LINES)
def test_a_bad_line_is_skipped_counted_and_named(tmp_path, line, code, words):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n' + line + b'\n{"prompt": "fine too"}')
    assert [(row.id, row.prompt) for row in read_prompts(file)] == [("0", "fine"), ("2", "fine too")]
    understood = scan_prompts(file).understood
    assert (understood.rows, understood.skipped) == (2, 1)
    assert understood.skipped_rows[0].place == "p.jsonl line 2"
    assert words in understood.skipped_rows[0].reason
    assert sum(understood.skipped_by_reason.values()) == 1


@pytest.mark.parametrize(("line", "code", "words"), BAD_LINES[:-2])
def test_a_file_of_bad_lines_is_one_error(tmp_path, line, code, words):
    file = tmp_path / "p.jsonl"
    file.write_bytes(line + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=words) as caught:
        read_prompts(file)
    assert caught.value.code == code
    assert caught.value.value == f"{file}:1"
    assert "None of the 2 rows" in caught.value.message


def test_only_the_first_bad_rows_are_listed_and_all_are_counted(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n' + "broken\n" * 2000 + '{"prompt": ""}\n' * 30)
    understood = scan_prompts(file).understood
    assert len(understood.skipped_rows) == 5
    assert understood.skipped == 2030
    assert sorted(understood.skipped_by_reason.values()) == [30, 2000]


def test_lines_that_only_make_sense_together_are_bad_rows(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"\n"answer": "1"}\n{"prompt": "b"}\n')
    assert [row.prompt for row in read_prompts(file)] == ["b"]


def test_a_parquet_row_without_a_prompt_is_skipped(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    understood = scan_prompts(tmp_path / "p.parquet").understood
    assert (understood.rows, understood.skipped_rows[0].place) == (1, "p.parquet line 2")
    pq.write_table(pa.table({"other": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="Fields found: other"):
        read_prompts(tmp_path / "p.parquet")


def test_an_empty_file_has_no_data(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / "p.jsonl")
    assert caught.value.code == "empty_data"


def test_a_missing_file_is_not_found_and_its_neighbour_named(tmp_path):
    jsonl(tmp_path / "prompts.jsonl", {"prompt": "a"})
    with pytest.raises(PathError) as caught:
        read_prompts(tmp_path / "promts.jsonl")
    assert caught.value.code == "not_found"
    assert caught.value.nearest == [str(tmp_path / "prompts.jsonl")]


def test_other_formats_are_refused(tmp_path):
    (tmp_path / "p.xlsx").write_text("prompt\na\n")
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.csv") as caught:
        read_prompts(tmp_path / "p.xlsx")
    assert caught.value.code == "unknown_format"


def test_a_damaged_parquet_file_is_named(tmp_path):
    pq.write_table(pa.table({"prompt": ["a" * 50] * 100}), tmp_path / "p.parquet")
    whole = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(whole[:-20])
    with pytest.raises(IntegrityError, match=r"p\.parquet"):
        read_prompts(tmp_path / "p.parquet")


def test_jsonl_needs_no_pyarrow(tmp_path):
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "a"})
    script = (
        "import sys; from pathlib import Path; sys.modules['pyarrow'] = None\n"
        "from opd_mcp.identity.data.reading import read_prompts\n"
        "from opd_mcp.schemas.errors import ResourceError\n"
        "print(read_prompts(Path(sys.argv[1]))[0].prompt)\n"
        "Path(sys.argv[1] + '.parquet').touch()\n"
        "try: read_prompts(Path(sys.argv[1] + '.parquet'))\n"
        "except ResourceError as error: print(error.code)\n"
    )
    answer = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["a", "missing_package"]


def test_responses_have_text_or_token_ids(tmp_path):
    file = jsonl(tmp_path / "r.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "a", "response_ids": [3, 1]})
    text, ids = read_responses(file)
    assert (text.response, text.response_ids) == ("b", None)
    assert (ids.response, ids.response_ids) == (None, (3, 1))
    header = read_responses_header(file)
    assert (header.rows, header.has_text, header.has_ids) == (2, False, False)


def test_the_header_of_a_parquet_file_is_its_footer(tmp_path):
    pq.write_table(
        pa.table({"prompt": ["a"], "response": ["b"], "response_ids": [[1]]}), tmp_path / "responses.parquet"
    )
    header = read_responses_header(tmp_path)
    assert (header.rows, header.has_text, header.has_ids) == (1, True, True)
    assert read_responses(tmp_path)[0].response_ids == (1,)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "a"}, "missing_field"),
        ({"prompt": "a", "response_ids": [1.5]}, "malformed_line"),
        ({"prompt": "a", "response_ids": [-1]}, "malformed_line"),
        ({"prompt": "a", "response": 3}, "malformed_line"),
    ],
)
def test_a_bad_response_is_named(tmp_path, row, code):
    file = jsonl(tmp_path / "r.jsonl", row)
    with pytest.raises(DataError) as caught:
        read_responses_header(file)
    assert caught.value.code == code


def test_the_hash_is_of_the_content_not_the_file(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    first = read_prompts(jsonl(tmp_path / "a.jsonl", *rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert prompts_hash(first) == prompts_hash(read_prompts(tmp_path / "b.parquet"))
    assert prompts_hash(first) != prompts_hash(first[::-1])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
row_lines = st.builds(
    lambda row: json.dumps(row).encode(),
    st.dictionaries(st.sampled_from(["id", "prompt", "messages", "answer", "response", "x"]), json_values, max_size=4),
)


@settings(max_examples=200)
@given(lines=st.lists(st.binary(max_size=40) | row_lines, max_size=5))
def test_any_bytes_are_read_or_refused_with_a_way_out(tmp_path, lines):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"\n".join(lines))
    for read in (read_prompts, read_responses):
        assert outcome(read, file) in {"rows", "malformed_line", "missing_field", "empty_data"}


def outcome(read, file):
    """ "rows", or the code of the error that names a way out."""
    try:
        return "rows" if read(file) else "nothing"
    except OpdError as error:
        return error.code if error.fix else "no way out"


def test_a_small_parquet_that_stands_for_a_huge_one_is_refused(tmp_path):
    file = tmp_path / "bomb.parquet"
    text = pa.array(["x" * (17 << 20)]).dictionary_encode().dictionary
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), text)
    pq.write_table(pa.table({"prompt": repeated}), file, compression="zstd")
    assert file.stat().st_size < 1 << 20, "33 GB of text"
    with pytest.raises(DataError, match="too_large"):
        read_prompts(file)


def test_a_parquet_with_more_rows_than_are_read_is_refused(tmp_path, monkeypatch):
    for module in ("formats", "tables"):
        monkeypatch.setattr(f"opd_mcp.identity.data.{module}.MAX_ROWS", 10)
    pq.write_table(pa.table({"prompt": ["x"] * 11}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="too_large"):
        read_prompts(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="too_large"):
        read_prompts(jsonl(tmp_path / "rows.jsonl", *[{"prompt": "x"}] * 11))


def test_what_the_teacher_sees_instead_is_read_and_counted_in_the_hash(tmp_path):
    turns = [{"role": "user", "content": "1+1=? The answer is 2."}]
    plain = {"id": "a", "prompt": "1+1=?"}
    rows = [plain, {**plain, "id": "b", "teacher_messages": turns}, {**plain, "id": "c", "teacher_messages": None}]
    same = [{**plain, "teacher_messages": [{"role": "user", "content": "1+1=?"}]}, *rows[1:]]
    scans = []
    for number, data in enumerate((rows, same, [plain, *({**row, "teacher_messages": None} for row in rows[1:])])):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in data))
        scans.append(scan_prompts(file))
        assert prompts_hash(read_prompts(file)) == scans[-1].sha256
    read = read_prompts(tmp_path / "0.jsonl")
    assert [row.teacher_messages for row in read] == [None, tuple(turns), None]
    assert scans[0].sha256 == scans[1].sha256 != scans[2].sha256
    assert (scans[0].teacher_turns == scans[1].teacher_turns, scans[2].teacher_turns) == (True, None)
    assert scans[0].rows == 3


def test_the_teachers_messages_may_stand_in_any_shape_and_under_any_name(tmp_path):
    turns = [{"role": "user", "content": "hint"}]
    rows = [
        ({"question": "1+1=?", "answer": "2", "teacher_messages": json.dumps(turns)}, None),
        ({"messages": [{"role": "user", "content": "1+1=?"}], "teacher_messages": turns}, None),
        ({"q": "1+1=?", "privileged": turns}, {"prompt": "q", "teacher_messages": "privileged"}),
    ]
    for row, columns in rows:
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row) + "\n")
        assert [row.teacher_messages for row in read_prompts(file, columns)] == [tuple(turns)]


def test_a_teachers_messages_that_end_with_an_answer_are_no_prompt(tmp_path):
    turns = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "1+1=?", "teacher_messages": turns}) + "\n")
    with pytest.raises(DataError, match="teacher_messages ends with the assistant's turn"):
        read_prompts(file)


def test_the_teachers_system_prompt_comes_first():
    plain = PromptRow("a", prompt="1+1=?")
    assert plain.for_teacher(None) is plain
    assert [turn["content"] for turn in plain.for_teacher("Be brief.").messages] == ["Be brief.", "1+1=?"]
    chat = PromptRow("a", messages=({"role": "system", "content": "Add."}, {"role": "user", "content": "1+1=?"}))
    assert [turn["content"] for turn in chat.for_teacher("Be brief.").messages] == ["Be brief.\n\nAdd.", "1+1=?"]
    hinted = PromptRow("a", prompt="1+1=?", teacher_messages=({"role": "user", "content": "It is 2."},))
    assert [turn["content"] for turn in hinted.for_teacher("Be brief.").messages] == ["Be brief.", "It is 2."]

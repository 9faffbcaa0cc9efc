"""Every known shape of prompts and responses, by the rows that the public data sets have."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_mcp.identity.data.reading import read_prompts, read_responses, read_responses_header
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.identity.data.scan import scan_prompts
from opd_mcp.schemas.errors import ArgumentError, DataError

USER = {"role": "user", "content": "1+1=?"}
ASSISTANT = {"role": "assistant", "content": "It is 2."}
SYSTEM = {"role": "system", "content": "Be brief."}

PROMPTS = {
    "prompt": ({"prompt": "1+1=?", "answer": "2"}, "1+1=?", "2"),
    "messages": ({"messages": [USER], "answer": "2"}, (USER,), "2"),
    "messages, answered": ({"messages": [USER, ASSISTANT]}, (USER,), None),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1+1"}, {"type": "text", "text": "=?"}]}]},
        ({"role": "user", "content": "1+1\n=?"},),
        None,
    ),
    "gsm8k": ({"question": "1+1=?", "answer": "1+1 = <<1+1=2>>2.\n#### 2"}, "1+1=?", "2"),
    "question and answer": ({"question": "1+1=?", "answer": 2}, "1+1=?", "2"),
    "math": (
        {"problem": "1+1=?", "level": "Level 1", "solution": "So $\\boxed{\\frac{4}{2}}$."},
        "1+1=?",
        "\\frac{4}{2}",
    ),
    "math-500": ({"problem": "1+1=?", "solution": "\\boxed{3}", "answer": "2", "unique_id": "a"}, "1+1=?", "2"),
    "aime": ({"Problem": "1+1=?", "Solution": "…", "Answer": 2}, "1+1=?", "2"),
    "numina": (
        {"source": "x", "problem": "1+1=?", "solution": "\\boxed{2}", "messages": [USER, ASSISTANT]},
        (USER,),
        "2",
    ),
    "openr1": (
        {"problem": "1+1=?", "solution": "…", "answer": "2", "generations": ["a", "b"], "messages": [USER, ASSISTANT]},
        (USER,),
        "2",
    ),
    "deepmath": ({"question": "1+1=?", "final_answer": "2", "difficulty": 5.0, "r1_solution_1": "…"}, "1+1=?", "2"),
    "dapo": (
        {"data_source": "x", "prompt": [USER], "reward_model": {"ground_truth": "2", "style": "rule"}},
        (USER,),
        "2",
    ),
    "alpaca": ({"instruction": "Add.", "input": "1 and 1", "output": "2", "text": "…"}, "Add.\n\n1 and 1", None),
    "alpaca without input": ({"instruction": "Add 1 and 1.", "input": "", "output": "2"}, "Add 1 and 1.", None),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "1+1=?"}, {"from": "gpt", "value": "It is 2."}]},
        (USER,),
        None,
    ),
    "openthoughts": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "user", "value": "1+1=?"}, {"from": "assistant", "value": "2"}],
        },
        (SYSTEM, USER),
        None,
    ),
    "prompt and completion": ({"prompt": "1+1=?", "completion": "2"}, "1+1=?", None),
    "metamath": ({"query": "1+1=?", "response": "2"}, "1+1=?", None),
    "text": ({"text": "1+1=?"}, "1+1=?", None),
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_shape_of_prompts_is_recognised(tmp_path, name, kind):
    row, prompt, answer = PROMPTS[name]
    file = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        file.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row, row]), file)
    given = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    assert read_prompts(file) == [PromptRow(id=str(i), answer=answer, **given) for i in range(2)]


CHAT = (SYSTEM, USER, {**ASSISTANT, "reasoning_content": "One and one."})
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = (
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "name": "add"},
    ASSISTANT,
)
RESPONSES = {
    "response": ({"prompt": "1+1=?", "response": "2", "answer": "2"}, "1+1=?", "2", None),
    "messages and response": ({"messages": [USER], "response": "2"}, (USER,), "2", None),
    "chat with reasoning": ({"messages": CHAT}, CHAT[:2], "<think>\nOne and one.\n</think>\n\nIt is 2.", CHAT),
    "chat with think": (
        {"messages": [USER, {"role": "assistant", "content": "<think>x</think>2"}]},
        (USER,),
        "<think>x</think>2",
        (USER, {"role": "assistant", "content": "<think>x</think>2"}),
    ),
    "chat with tools": ({"messages": TOOLS}, TOOLS[:3], "It is 2.", TOOLS),
    "sharegpt": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "1+1=?"}, {"from": "gpt", "value": "It is 2."}],
        },
        (SYSTEM, USER),
        "It is 2.",
        (SYSTEM, USER, ASSISTANT),
    ),
    "trl": ({"prompt": "1+1=?", "completion": "2"}, "1+1=?", "2", None),
    "trl chat": ({"prompt": [USER], "completion": [ASSISTANT]}, (USER,), "It is 2.", (USER, ASSISTANT)),
    "alpaca": ({"instruction": "Add.", "input": "1 and 1", "output": "2"}, "Add.\n\n1 and 1", "2", None),
    "gsm8k": ({"question": "1+1=?", "answer": "It is 2.\n#### 2"}, "1+1=?", "It is 2.\n#### 2", None),
    "math": ({"problem": "1+1=?", "solution": "So \\boxed{2}."}, "1+1=?", "So \\boxed{2}.", None),
    "numina": (
        {"problem": "1+1=?", "solution": "…", "messages": [USER, ASSISTANT]},
        (USER,),
        "It is 2.",
        (USER, ASSISTANT),
    ),
    "deepmath": ({"question": "1+1=?", "final_answer": "2", "r1_solution_1": "So 2."}, "1+1=?", "So 2.", None),
    "metamath": ({"query": "1+1=?", "response": "2"}, "1+1=?", "2", None),
}


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_shape_of_responses_is_recognised(tmp_path, name, kind):
    row, prompt, response, chat = RESPONSES[name]
    file = tmp_path / f"r.{kind}"
    if kind == "jsonl":
        file.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    (read,) = read_responses(file)
    assert (read.prompt.prompt if isinstance(prompt, str) else read.prompt.messages) == prompt
    assert (read.response, read.chat) == (response, chat)
    header = read_responses_header(file)
    assert (header.rows, header.has_text, header.has_ids) == (1, True, False)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [USER]}, "response"),
        ({"messages": [ASSISTANT]}, "nothing to answer"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "image_url"}]}]}, "part of type image_url"),
        ({"prompt": [USER, ASSISTANT], "response": "2"}, "ends with the assistant's turn"),
    ],
)
def test_chats_that_hold_nothing_to_learn_are_refused(tmp_path, row, why):
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=why):
        read_responses(tmp_path / "r.jsonl")


def test_columns_lead_into_nested_fields_and_lists(tmp_path):
    row = {"task": {"q": "1+1=?"}, "golds": [{"v": 2.0}], "key": "a", "extra": 1}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    columns = {"prompt": "task.q", "answer": "golds.0.v", "id": "key"}
    assert read_prompts(tmp_path / "p.jsonl", columns) == [PromptRow("a", "1+1=?", None, "2")]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet", columns) == [PromptRow("a", "1+1=?", None, "2")]
    understood = scan_prompts(tmp_path / "p.jsonl", columns).understood
    assert (understood.shape, understood.columns, understood.unused) == ("columns", columns, ["extra"])


@pytest.mark.parametrize(("gold", "answer"), [("x\n#### 4", "4"), ("so \\boxed{4}", "4"), ("4", "4")])
def test_a_named_answer_is_found_in_its_derivation(tmp_path, gold, answer):
    (tmp_path / "p.jsonl").write_text(json.dumps({"q": "1+3=?", "gold": gold}) + "\n")
    assert read_prompts(tmp_path / "p.jsonl", {"prompt": "q", "answer": "gold"})[0].answer == answer


def test_columns_name_responses_and_system_prompts(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"sys": "Be brief.", "q": "1+1=?", "a": "2", "ids": [3, 1]}) + "\n")
    columns = {"prompt": "q", "system": "sys", "response": "a", "response_ids": "ids"}
    (row,) = read_responses(tmp_path / "r.jsonl", columns)
    assert row.prompt.messages == (SYSTEM, USER)
    assert (row.response, row.response_ids) == ("2", (3, 1))
    assert (
        read_responses_header(tmp_path / "r.jsonl", columns).sha256
        != read_responses_header(tmp_path / "r.jsonl", {**columns, "prompt": "a"}).sha256
    )


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": "questoin", "answer": "gold"}, r"'questoin'.*Fields found: quest.*Nearest: columns=.*\"question\""),
        ({"prompt": "question", "answer": "glod"}, r"'glod'.*Nearest: columns=.*\"answer\": \"gold\""),
    ],
)
def test_a_field_that_is_not_there_is_named_with_the_nearest(tmp_path, kind, columns, words):
    rows = [{"question": "1+1=?", "gold": "2"}]
    file = tmp_path / f"p.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("question,gold\n1+1=?,2\n" if kind == "csv" else json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match=words):
        read_prompts(file, columns)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"promt": "q"}, "Nearest: prompt"),
        ({"prompt": "q", "messages": "m"}, "exactly one"),
        ({"answer": "a"}, "exactly one"),
        ({"prompt": "q", "response": "r"}, "no part 'response'"),
    ],
)
def test_columns_name_known_parts(tmp_path, columns, words):
    (tmp_path / "p.jsonl").write_text('{"q": "a"}\n')
    with pytest.raises(ArgumentError, match=words):
        read_prompts(tmp_path / "p.jsonl", columns)


def test_an_unknown_shape_is_refused_with_the_mapping_that_is_likeliest_meant(tmp_path):
    row = {"quesion": "1+1=?", "meta": {"anser": "2"}, "lang": "en"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / "p.jsonl")
    error = caught.value
    assert error.code == "missing_field"
    assert "Fields found: quesion, meta, meta.anser, lang." in error.message
    assert error.nearest == ['columns={"prompt": "quesion", "answer": "meta.anser"}']
    assert read_prompts(tmp_path / "p.jsonl", {"prompt": "quesion", "answer": "meta.anser"})[0].answer == "2"


def test_whole_numbers_stay_whole_and_missing_stays_missing(tmp_path):
    golds = ("8.0", "NaN", "null", "0.5")
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "a", "answer": {gold}}}\n' for gold in golds))
    assert [row.answer for row in read_prompts(tmp_path / "p.jsonl")] == ["8", None, None, "0.5"]
    (tmp_path / "p.csv").write_text("prompt,answer\na,8.0\nb,\nc,0.5\n")
    assert [row.answer for row in read_prompts(tmp_path / "p.csv")] == ["8", None, "0.5"]
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": [8.0, None]}), tmp_path / "p.parquet")
    assert [row.answer for row in read_prompts(tmp_path / "p.parquet")] == ["8", None]


def test_a_mixed_file_says_both_shapes_and_what_is_unused(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a", "lang": "en"}\n{"messages": [{"role": "user", "content": "b"}]}\n'
    )
    understood = scan_prompts(tmp_path / "p.jsonl").understood
    assert understood.shape == "prompt + messages"
    assert understood.columns == {"prompt": "prompt", "messages": "messages"}
    assert understood.unused == ["lang"]


def test_one_row_at_a_time_reads_what_many_at_once_do(tmp_path):
    rows = [{"prompt": f"{i}é", "answer": i, "id": i} for i in range(40)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "single.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    assert read_prompts(tmp_path / "many.jsonl") == read_prompts(tmp_path / "single.jsonl")

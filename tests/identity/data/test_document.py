"""docs/data.md: every shape of its table is read as it says, and a refusal is what it shows."""

import json
import re
from pathlib import Path

import pytest

from opd_mcp.identity.data.reading import read_prompts, read_responses, read_responses_header
from opd_mcp.identity.data.scan import scan_prompts
from opd_mcp.identity.data.shapes import PROMPT_SHAPES, RESPONSE_SHAPES
from opd_mcp.schemas.errors import DataError

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| `([\w/]+)` \| `(\{.*?\})` \| (.*?) \| (.*?) \| .*? \|$", TEXT, re.MULTILINE)


def test_the_table_has_every_shape():
    known = {shape.name for shape in (*PROMPT_SHAPES, *RESPONSE_SHAPES)} - {"conversation"}
    assert {name for name, *_ in LINES} == known


@pytest.mark.parametrize(("name", "example", "prompts", "responses"), LINES, ids=[line[0] for line in LINES])
def test_a_row_of_the_table_is_read_as_it_says(tmp_path, name, example, prompts, responses):
    file = tmp_path / "rows.jsonl"
    row = json.loads(example)
    file.write_text(json.dumps(row) + "\n")
    (read,) = read_prompts(file)
    assert read.text() == ("Add.\n\n1 and 1" if "input" in row else "1+1=?")
    has_gold = any(field in row for field in ("answer", "final_answer", "solution"))
    assert read.answer == ("2" if has_gold else None)
    understood = scan_prompts(file).understood
    same = re.fullmatch(r"as `([\w/]+)`.*", prompts)
    assert understood.shape == (same[1] if same and same[1] != "messages" else name)
    if responses == "–":
        with pytest.raises(DataError):
            read_responses(file)
        return
    (answered,) = read_responses(file)
    worked = {"question/answer": "answer", "problem/solution": "solution"}
    assert answered.response == (row[worked[name]] if name in worked else "It is 2.")
    assert read_responses_header(file).understood.shape == name


def test_the_refused_shape_is_shown_in_full(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"quesion": "1+1=?", "meta": {"gold": "2", "level": 1}}) + "\n")
    with pytest.raises(DataError) as caught:
        read_prompts(file)
    assert f"```text\n{str(caught.value).replace(str(file), '/data/own.jsonl')}\n```" in TEXT

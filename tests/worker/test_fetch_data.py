"""Data made present: a split saved as Parquet, errors that name the splits, and named columns in our own fields."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_mcp.identity.data.reading import read_prompts, read_responses, responses_sha256
from opd_mcp.identity.data.rows import prompts_hash
from opd_mcp.identity.data.scan import scan_prompts
from opd_mcp.planning.hub_models import hub_data_directory
from opd_mcp.schemas.errors import DataError, IntegrityError
from opd_mcp.schemas.runs import DataInput, RunInputs
from opd_mcp.store.workspace import Workspace
from opd_mcp.worker.fetch_data import save_split, with_present_data

ROWS = [{"question": f"{i}+1=?", "answer": f"so\n#### {i + 1}"} for i in range(5)]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mirror(tmp_path):
    """A data set as the Hub lays it out, with two splits."""
    jsonl(tmp_path / "mirror" / "train.jsonl", ROWS)
    jsonl(tmp_path / "mirror" / "test.jsonl", ROWS[:2])
    return tmp_path / "mirror"


def test_a_split_is_saved_so_that_it_can_be_read(mirror, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    save_split(str(mirror), None, "test", out)
    assert [row.answer for row in read_prompts(out)] == ["1", "2"]
    assert [path.name for path in out.iterdir()] == ["data.parquet"]


@pytest.mark.parametrize("split", [None, "validation"])
def test_the_splits_are_named_where_one_must_be_chosen(mirror, tmp_path, split):
    with pytest.raises(DataError, match=r"2 splits: train, test.*Nearest: .*@train") as caught:
        save_split(str(mirror), None, split, tmp_path)
    assert caught.value.code == "unknown_format"


def test_an_unknown_configuration_is_one_error(mirror, tmp_path):
    with pytest.raises(DataError, match=r"other.*Name its configuration"):
        save_split(str(mirror), "other", "train", tmp_path)


def test_without_a_network_the_error_says_so(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from opd_mcp.schemas.errors import OpdError\n"
        "from opd_mcp.store.workspace import Workspace\n"
        "from opd_mcp.worker.fetch_data import fetched_data\n"
        "workspace = Workspace(Path(sys.argv[1]))\n"
        "try: fetched_data(workspace, 'org/no-such-set:main@train')\n"
        "except OpdError as error: print(error.code, error.value)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", script, str(tmp_path / "home")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert done.stdout.split() == ["offline", "org/no-such-set"]
    assert not any((tmp_path / "home" / "hub").rglob("*.parquet"))


def test_fetched_data_is_given_to_the_stages(tmp_path):
    workspace = Workspace(tmp_path / "home")
    directory = hub_data_directory(workspace, "org/set@train")
    jsonl(directory / "data.jsonl", ROWS)
    inputs = RunInputs(prompts=DataInput(reference="org/set@train", hub_id="org/set@train"))
    assert with_present_data(workspace, tmp_path, inputs, lambda: None).prompts.path == str(directory)


def test_named_columns_become_our_own_fields_with_the_same_hash(tmp_path):
    file = jsonl(tmp_path / "p.jsonl", [{"q": "1+1=?", "gold": 2, "key": "a"}, {"q": "2+2=?"}])
    columns = {"prompt": "q", "answer": "gold", "id": "key"}
    data = DataInput(reference="x", path=str(file), columns=columns, sha256=scan_prompts(file, columns).sha256)
    fenced = []
    inputs = RunInputs(prompts=data, eval_prompts=data)
    present = with_present_data(Workspace(tmp_path), tmp_path, inputs, lambda: fenced.append(1))
    assert present.prompts.path != present.eval_prompts.path != str(file)
    assert prompts_hash(read_prompts(tmp_path / "data" / "prompts.jsonl")) == data.sha256
    assert len(fenced) == 2, "nothing is written behind the back of a newer attempt"


def test_named_columns_of_responses_keep_chats_and_ids(tmp_path):
    chat = [
        {"role": "user", "content": "1+1=?"},
        {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
    ]
    for row, columns in (
        ({"turns": chat}, {"messages": "turns"}),
        ({"turns": chat, "tools": TOOLS, "finish_reason": "length"}, {"messages": "turns"}),
        ({"turns": chat, "functions": TOOLS}, {"messages": "turns", "tools": "functions"}),
        ({"q": "1+1=?", "a": "2", "why": "length"}, {"prompt": "q", "response": "a", "finish_reason": "why"}),
        ({"q": "1+1=?", "a": "2", "ids": [4, 2]}, {"prompt": "q", "response": "a", "response_ids": "ids"}),
    ):
        file = jsonl(tmp_path / "r.jsonl", [row])
        data = DataInput(reference="x", path=str(file), columns=columns, sha256=responses_sha256(file, columns))
        present = with_present_data(Workspace(tmp_path), tmp_path, RunInputs(responses=data), lambda: None)
        (written,), (read,) = read_responses(Path(present.responses.path)), read_responses(file, columns)
        assert written == read
        assert (read.truncated, read.tools is not None) == ("length" in row.values(), TOOLS in row.values())


def test_data_that_changed_since_the_start_stops_the_run(tmp_path):
    file = jsonl(tmp_path / "p.jsonl", ROWS)
    data = DataInput(reference="x", path=str(file), sha256=scan_prompts(file).sha256)
    with_present_data(Workspace(tmp_path), tmp_path, RunInputs(prompts=data), lambda: None)
    jsonl(file, ROWS[:-1])
    with pytest.raises(IntegrityError, match="input_changed"):
        with_present_data(Workspace(tmp_path), tmp_path, RunInputs(prompts=data), lambda: None)

"""`opd-mcp cache …` and `serve-teacher` as a person types them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from opd_mcp.cli import app
from opd_mcp.engine.cache.manifest import read_cache
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
KEY = "verify-s-key"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def cache(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def serving(serve_model):
    """`serving(model)`: the URL of a server of one of the example's models."""
    servers = []

    def started(model: str) -> str:
        servers.append(serve_model(model, KEY))
        return servers[-1].url

    yield started
    for server in servers:
        server.close()


def test_inspect_shows_figures_and_two_rows_with_both_log_probs(cache):
    text = run("cache", "inspect", cache).output
    assert "40 rows" in text
    assert "engine gap" in text
    assert "row 1:" in text
    found = json.loads(run("cache", "inspect", cache, "--json").output)
    token, teacher, student = found["sample"][0]["tokens"][0]
    assert isinstance(token, str)
    assert teacher <= 0
    assert student <= 0
    assert found["manifest"]["hygiene"]["prompts"] == 3200


def test_verify_ends_with_one_when_something_is_wrong(cache):
    good = run("cache", "verify", cache, "--teacher", EXAMPLE / "teacher")
    assert (good.exit_code, "nothing is wrong" in good.output) == (0, True)
    assert "16 rows scored again: largest difference" in good.output
    shard = cache / "shard-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    bad = run("cache", "verify", cache)
    assert bad.exit_code == 1
    assert "PROBLEM shard-00002.parquet is damaged" in bad.output


def test_verify_may_ask_a_server_for_the_teacher(cache, monkeypatch, serving):
    monkeypatch.setenv("OPD_TEACHER_KEY", KEY)
    good = run("cache", "verify", cache, "--teacher-url", serving("teacher"), "--sample", 8)
    assert "8 rows scored again: largest difference" in good.output
    assert (good.exit_code, "nothing is wrong" in good.output) == (0, True)
    other = run("cache", "verify", cache, "--teacher-url", serving("teacher_other_style"))
    assert isinstance(other.exception, ConsistencyError)
    assert "does not serve teacher" in str(other.exception)


def test_merge_writes_one_cache(cache, finished, tmp_path):
    done = run("cache", "merge", tmp_path / "both", cache, finished)
    assert done.exit_code == 0
    assert "80 rows" in done.output
    assert run("cache", "verify", tmp_path / "both").exit_code == 0


def test_datasets_and_pyarrow_alone_read_a_cache(cache, tmp_path):
    rows = read_cache(cache)[1]
    loaded = load_dataset(
        "parquet", data_files=str(cache / "*.parquet"), split="train", cache_dir=str(tmp_path / "datasets")
    )
    assert len(loaded) == 40
    assert loaded[39]["response_ids"] == rows.response(39).tolist()
    assert np.array_equal(np.float32(loaded[39]["teacher_logprobs"]), rows.column("teacher_logprobs", 39))
    program = (
        "import sys, pyarrow.dataset as ds\n"
        "table = ds.dataset(sys.argv[1:], format='parquet').to_table()\n"
        "assert not {'opd_mcp', 'datasets', 'torch'} & set(sys.modules)\n"
        "print(table.num_rows, sum(len(ids) for ids in table['response_ids'].to_pylist()))\n"
    )
    files = [str(file) for file in sorted(cache.glob("*.parquet"))]
    alone = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, check=True)
    assert alone.stdout.split() == ["40", str(len(rows.response_ids))]


def test_a_teacher_that_others_reach_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPD_TEACHER_KEY", raising=False)
    done = run("serve-teacher", EXAMPLE / "teacher", "--host", "0.0.0.0")
    assert isinstance(done.exception, ArgumentError)
    assert "OPD_TEACHER_KEY" in str(done.exception)


def test_an_address_that_is_not_free_is_one_error_before_the_model_is_loaded(serving, monkeypatch):
    port = serving("teacher").rsplit(":", 1)[1]
    monkeypatch.setattr("opd_mcp.engine.scoring.server.open_local", None)
    done = run("serve-teacher", EXAMPLE / "teacher", "--port", port)
    assert isinstance(done.exception, ArgumentError)
    assert "Address already in use" in str(done.exception)

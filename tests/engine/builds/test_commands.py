"""`opd-mcp cache …` and `serve-teacher` as a person types them."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opd_mcp.cli import app
from opd_mcp.schemas.errors import ArgumentError

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def cache(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


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
    shard = cache / "shard-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    bad = run("cache", "verify", cache)
    assert bad.exit_code == 1
    assert "PROBLEM shard-00002.parquet is damaged" in bad.output


def test_merge_writes_one_cache(cache, finished, tmp_path):
    done = run("cache", "merge", tmp_path / "both", cache, finished)
    assert done.exit_code == 0
    assert "80 rows" in done.output
    assert run("cache", "verify", tmp_path / "both").exit_code == 0


def test_a_teacher_that_others_reach_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPD_TEACHER_KEY", raising=False)
    done = run("serve-teacher", EXAMPLE / "teacher", "--host", "0.0.0.0")
    assert isinstance(done.exception, ArgumentError)
    assert "OPD_TEACHER_KEY" in str(done.exception)

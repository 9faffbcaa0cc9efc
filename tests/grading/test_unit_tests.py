"""Generated programs run only when allowed, and then cut off from network and files."""

import socket

import pytest

from opd_mcp.grading.graders import grader_for
from opd_mcp.grading.unit_tests import CodeLimits, code_grade, require_sandbox, unit_tests
from opd_mcp.schemas.errors import ArgumentError, DataError, ResourceError


@pytest.fixture(autouse=True)
def sandbox() -> None:
    try:
        require_sandbox()
    except ResourceError as error:
        pytest.skip(f"this machine allows no user namespaces: {error.message}")


def said(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def test_without_permission_nothing_runs():
    with pytest.raises(ArgumentError, match="allow_code"):
        grader_for("code")


def test_a_program_is_right_when_its_tests_pass(grader):
    code = grader("code", allow_code=True)
    assert code.grade(said("def f(x):\n    return x + 1"), "assert f(1) == 2").correct
    assert not code.grade(said("def f(x):\n    return x"), "assert f(1) == 2").correct
    assert not code.grade(said("def f(x:"), "assert f(1) == 2").correct
    assert not code.grade(said("raise SystemExit(0)"), "assert f(1) == 2").correct
    assert code.grade("I cannot program.", "assert f(1) == 2").extracted is None


def test_a_program_is_right_when_it_prints_what_is_expected(grader):
    code = grader("code", allow_code=True)
    tests = '[{"input": "1\\n", "output": "2"}, {"input": "5\\n", "output": "6\\n"}]'
    assert code.grade(said("print(int(input()) + 1)"), tests).correct
    assert not code.grade(said("print(2)"), tests).correct


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)"
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        assert not code_grade(said(program), "assert True", CodeLimits()).correct


def test_no_file_is_written_or_removed(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("here", encoding="utf-8")
    for attempt in (f"open({str(kept)!r}, 'w')", f"import os; os.remove({str(kept)!r})"):
        assert not code_grade(said(attempt), "assert True", CodeLimits()).correct
    assert kept.read_text(encoding="utf-8") == "here"


def test_time_memory_and_output_are_limited():
    limits = CodeLimits(cpu_seconds=1, wall_seconds=5, memory_bytes=256 << 20, output_bytes=1 << 16)
    assert code_grade(said("while True: pass"), "assert True", limits).timed_out
    assert code_grade(said("import time; time.sleep(60)"), "assert True", CodeLimits(wall_seconds=1)).timed_out
    assert not code_grade(said("x = bytearray(1 << 30)"), "assert True", limits).correct
    assert not code_grade(said("while True: print('x' * 1000)"), "assert True", limits).correct


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("OPD_SECRET", "1")
    assert code_grade(said("import os"), "assert 'OPD_SECRET' not in os.environ", CodeLimits()).correct


@pytest.mark.parametrize("gold", ["42", "", "[]", '[{"input": 1}]', "def f(:"])
def test_an_answer_without_tests_is_an_error(gold):
    with pytest.raises(DataError, match="unknown_format"):
        unit_tests(gold)

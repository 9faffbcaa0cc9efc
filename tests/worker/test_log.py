"""A worker's log: every message has its UTC time, each distinct warning stands there once, tracebacks stay whole."""

import re

import pytest

from opd_mcp.schemas.requests import GetRunLogs

MESSAGE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|ERROR) [\w.]+: .+")


@pytest.fixture
def failed(world, service, finished):
    """A real worker's failed run, with what libraries warned of before, and the lines of its log."""
    overrides = {"sft.optimizer.learning_rate": 777.0}
    run_id = service.start_distillation(world.start_arguments(method="sft", overrides=overrides)).run_id
    status = finished(service, run_id)
    assert status.error.code == "internal_error"
    return status, service.run_logs(GetRunLogs(run_id=run_id, tail=200)).lines


def test_each_distinct_warning_is_one_line(failed):
    _, lines = failed
    warned = [line.split("py.warnings: ")[1] for line in lines if "py.warnings" in line]
    assert [re.sub(r":\d+\)", ")", line) for line in warned] == [
        "FutureWarning: `old` is deprecated. Use `new`. (stand_in_stages.py)",
        "UserWarning: number 0 (stand_in_stages.py)",
        "UserWarning: number 20 (stand_in_stages.py)",
    ]


def test_every_message_has_its_time_and_libraries_speak_through_the_same_log(failed):
    _, lines = failed
    traceback = next(number for number, line in enumerate(lines) if line.startswith("Traceback"))
    assert all(MESSAGE.fullmatch(line) for line in lines[:traceback])
    assert sum("WARNING a_library: a file is missing" in line for line in lines) == 1
    assert "nobody wants to know" not in "\n".join(lines)
    assert any(line.endswith("INFO opd_mcp.worker.journal_reporter: after the noise") for line in lines)


def test_the_traceback_stays_and_the_status_shows_its_end(failed):
    status, lines = failed
    assert lines[-1] == "ZeroDivisionError: the learning rate of the beast"
    assert any("in sft" in line for line in lines)
    assert status.error.log_tail[-1] == lines[-1]
    assert not any(" INFO " in line for line in status.error.log_tail)

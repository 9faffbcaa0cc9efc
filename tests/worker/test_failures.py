"""Failures as agents read them."""

import pytest

from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.supervisor.liveness import lost_failure
from opd_mcp.worker.failures import MemoryFigures, failure_of, log_tail


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


def test_a_known_error_keeps_its_code_value_and_way_out(tmp_path):
    error = RunError("bad_number", "The loss is not finite.", value="step 3", fix="Lower the learning rate.")
    failure = failure_of(error, tmp_path / "none.log")
    assert (failure.code, failure.fix, failure.log_tail) == ("bad_number", "Lower the learning rate.", [])
    assert "step 3" in failure.cause


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_missing_memory_names_the_peak_the_estimate_and_an_override(tmp_path, error):
    failure = failure_of(error, tmp_path / "none.log", MemoryFigures(peak=3 << 30, expected=2 << 30))
    assert failure.code == "not_enough_memory"
    assert "the peak was 3 GiB; the plan expected 2 GiB" in failure.cause
    assert failure.override["distill.micro_batch_tokens"] == 4096


def test_the_log_tail_is_the_last_useful_lines(tmp_path):
    log = tmp_path / "worker.log"
    log.write_text(
        "".join(f"line {i}\n\n2026-08-01T10:00:00.000Z INFO opd_mcp.x: phase\n" for i in range(5000))
        + "x" * 1000
        + "\n"
    )
    tail = log_tail(log)
    assert len(tail) == 15
    assert tail[-2] == "line 4999"
    assert len(tail[-1]) == 300


def test_a_lost_worker_says_how_to_go_on(tmp_path):
    assert lost_failure(tmp_path, 1).call == resume_call(tmp_path.name)

"""Every worker ends: those that do not answer a cancel request or SIGTERM are ended, and their runs can go on."""

import contextlib
import os
import signal
import time

import psutil
import pytest

from opd_mcp.identity.files import write_atomic
from opd_mcp.maintenance.doctor import checks
from opd_mcp.schemas.runs import ACTIVE_STATES
from opd_mcp.store.journal import read_journal, utc_now
from opd_mcp.store.runs import request_cancel
from opd_mcp.store.worker_process import WorkerStop, live_worker, signal_worker, stop_of
from opd_mcp.worker.guardian import Guard

NATIVE, DEAF, BUSY, HEARS_SIGTERM, NEVER_EXITS, LIMITED = 440, 441, 442, 443, 444, 445


@pytest.fixture
def service(world):
    """A service whose workspace gives workers a third of a second to answer."""
    service = world.service()
    (service.workspace.root / "settings.toml").write_text("[stop]\ngrace_seconds = 0.3\n")
    return service


@pytest.fixture
def hanging(world, service, until):
    """`hanging(rate)`: the run, its directory and its worker, once it has stopped answering."""
    killed = []

    def start(rate: int):
        overrides = {"sft.steps": 1, "sft.optimizer.learning_rate": rate}
        run_id = service.start_sft(world.sft_arguments(**overrides)).run_id
        directory = service.workspace.run(run_id)
        until(service, run_id, lambda status: "hangs" in (directory / "worker.log").read_text())
        killed.append(live_worker(directory, 1))
        return run_id, directory, killed[-1]

    yield start
    for worker in killed:
        if worker.is_running():
            worker.kill()


def guardian_of(worker: psutil.Process) -> psutil.Process:
    return next(child for child in worker.children() if any("guardian.py" in word for word in child.cmdline()))


def gone(process: psutil.Process) -> None:
    """Wait for the end of a process that is no child of this one; it may stay a zombie where nobody reaps."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)


def alerts_of(status) -> dict[str, str]:
    return {alert.code: alert.message for alert in status.alerts}


@pytest.mark.parametrize("rate", [NATIVE, DEAF, BUSY])
def test_a_worker_that_does_not_answer_a_cancel_is_killed_and_its_run_can_go_on(
    service, hanging, leases, finished, until, rate
):
    run_id, directory, worker = hanging(rate)
    guardian = guardian_of(worker)
    service.cancel(run_id)
    status = finished(service, run_id)
    assert (status.state, status.error) == ("cancelled", None)
    assert "did not answer the cancel request; it was sent SIGTERM at" in alerts_of(status)["worker_killed"]
    assert "and SIGKILL at" in alerts_of(status)["worker_killed"]
    assert worker.wait(10) in (None, -signal.SIGKILL)
    gone(guardian)
    assert leases.busy(leases.cpu_slot_names()) == []
    assert [record.type for record in read_journal(directory / "journal.jsonl")][-2:] == ["alert", "state"]
    assert service.resume(run_id).state == "queued"
    until(service, run_id, lambda status: status.phase == "sft")
    assert service.store.view(run_id).attempt == 2
    service.cancel(run_id)
    assert finished(service, run_id).state == "cancelled"


def test_a_worker_that_answers_sigterm_ends_itself_and_says_so(service, hanging, finished):
    run_id, directory, _ = hanging(HEARS_SIGTERM)
    service.cancel(run_id)
    status = finished(service, run_id)
    assert (status.state, status.error) == ("cancelled", None)
    assert "SIGTERM at" in alerts_of(status)["worker_signalled"]
    assert "SIGKILL" not in alerts_of(status)["worker_signalled"]
    assert stop_of(directory, 1).sigkill is None


def test_a_worker_that_answers_is_sent_nothing(world, service, until, finished):
    run_id = service.start_sft(world.sft_arguments(**{"sft.steps": 100_000})).run_id
    until(service, run_id, lambda status: status.progress is not None)
    service.cancel(run_id)
    status = finished(service, run_id)
    assert (status.state, alerts_of(status)) == ("cancelled", {})
    assert stop_of(service.workspace.run(run_id), 1) is None


@pytest.mark.parametrize("rate", [NATIVE, BUSY])
def test_sigterm_from_outside_ends_a_worker_that_does_not_answer(service, hanging, finished, rate):
    run_id, _, worker = hanging(rate)
    worker.terminate()
    status = finished(service, run_id)
    assert (status.state, status.error.code) == ("failed", "worker_terminated")
    assert "received SIGTERM and did not end; it was sent SIGKILL at" in status.error.cause
    assert status.next_action.tool == "resume_run"


def test_a_native_call_over_its_processor_time_ends_without_a_cancel(service, hanging, finished):
    run_id, _, _ = hanging(LIMITED)
    status = finished(service, run_id)
    assert (status.state, status.error.code) == ("failed", "too_slow")


def test_a_run_that_has_ended_frees_its_device_also_when_its_process_does_not_exit(service, hanging, leases):
    run_id, _, worker = hanging(NEVER_EXITS)
    worker.wait(20)
    assert service.status(run_id).state == "succeeded"
    assert leases.busy(leases.cpu_slot_names()) == []


def test_without_its_guardian_a_worker_is_ended_by_whoever_looks(service, hanging, finished):
    run_id, _, worker = hanging(NATIVE)
    guardian_of(worker).kill()
    service.cancel(run_id)
    status = finished(service, run_id)
    assert (status.state, status.error) == ("cancelled", None)
    assert "SIGKILL at" in alerts_of(status)["worker_killed"]


def test_a_worker_that_died_of_its_signals_is_cancelled_whichever_of_them_was_noted_last(service, hanging, finished):
    """Guardian and server may signal at the same moment, and the later note need not know of the SIGKILL."""
    run_id, directory, worker = hanging(NATIVE)
    guardian_of(worker).kill()
    noted = WorkerStop(attempt=1, cause="cancel", sigterm=utc_now())
    write_atomic(directory / "stop-1.json", noted.sealed().to_json())
    request_cancel(directory)
    worker.kill()
    status = finished(service, run_id)
    assert (status.state, status.error) == ("cancelled", None)
    assert "SIGTERM at" in alerts_of(status)["worker_killed"]


def test_a_signal_is_noted_beside_those_that_another_process_sent(service, hanging):
    _, directory, worker = hanging(BUSY)
    guardian_of(worker).kill()
    first = WorkerStop(attempt=1, cause="cancel")
    signal_worker(directory, worker, signal.SIGTERM, first)
    signal_worker(directory, worker, signal.SIGKILL, first)
    noted = stop_of(directory, 1)
    assert noted.sigterm is not None
    assert noted.sigkill is not None


def test_another_process_with_the_worker_s_pid_is_left_alone(service, hanging, finished):
    """The pid of a worker that is gone may be anybody's: without the same start time nothing is sent."""
    run_id, directory, worker = hanging(NATIVE)
    guardian_of(worker).kill()
    record = directory / "worker.json"
    started = worker.create_time()
    record.write_text(record.read_text().replace(str(started), str(started - 1)))
    assert live_worker(directory, 1) is None
    service.cancel(run_id)
    end = time.monotonic() + 3 * 0.3
    while time.monotonic() < end:
        assert service.status(run_id).state in ACTIVE_STATES
    assert worker.is_running()


def test_a_stopped_worker_is_shown_and_continues_or_is_cancelled(service, hanging, until, finished):
    run_id, _, worker = hanging(BUSY)
    token = service.wait_token(run_id)
    worker.suspend()
    status = until(service, run_id, lambda status: "worker_stopped" in alerts_of(status))
    assert service.wait_token(run_id) != token
    assert f"kill -CONT {worker.pid}" in alerts_of(status)["worker_stopped"]
    assert f"kill -CONT {worker.pid}" in status.next_action.why
    assert [row.note for row in service.list_runs().rows] == [f"worker stopped, pid {worker.pid}"]
    [check] = [check for check in checks(service) if check.name == "workers"]
    assert (check.well, run_id in check.found) == (False, True)
    worker.resume()
    until(service, run_id, lambda status: "worker_stopped" not in alerts_of(status))
    assert [row.note for row in service.list_runs().rows] == [None]
    worker.suspend()
    service.cancel(run_id)
    assert finished(service, run_id).state == "cancelled"


def test_a_stopped_worker_that_is_cancelled_answers_once_sigterm_continues_it(world, service, until, finished):
    run_id = service.start_sft(world.sft_arguments(**{"sft.steps": 100_000})).run_id
    until(service, run_id, lambda status: status.progress is not None)
    os.kill(live_worker(service.workspace.run(run_id), 1).pid, signal.SIGSTOP)
    service.cancel(run_id)
    status = finished(service, run_id)
    assert status.state == "cancelled"
    assert "SIGKILL" not in alerts_of(status)["worker_signalled"]


def guard(tmp_path) -> Guard:
    return Guard(tmp_path, attempt=1, worker=1, grace=10.0)


def test_expiries_of_processor_time_count_only_when_python_runs_in_none_of_them(tmp_path):
    worker = guard(tmp_path)
    for second in range(0, 1000, 100):  # ten pieces of work, each stopped by its limit
        worker.heard(signal.SIGVTALRM, float(second))
    assert worker.kill_at is None
    for second in range(1000, 1011):
        worker.heard(signal.SIGVTALRM, float(second))
    assert (worker.cause, worker.kill_at) == ("too_slow", 1010.0)


def test_the_first_cause_stays_and_no_later_one_gives_more_time(tmp_path):
    worker = guard(tmp_path)
    worker.ask("cancel", 0.0, terms=True)
    assert (worker.term_at, worker.kill_at) == (10.0, None)
    worker.heard(signal.SIGTERM, 3.0)
    worker.heard(signal.SIGTERM, 9.0)
    worker.heard(signal.SIGALRM, 9.5)
    assert (worker.cause, worker.kill_at) == ("cancel", 13.0)

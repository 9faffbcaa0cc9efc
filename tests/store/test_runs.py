"""Run directories: the record, the lock that is life, the cancel request."""

import os
import signal
import subprocess

import pytest

from opd_mcp.schemas.errors import IntegrityError, RunError, UnknownIdError
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import (
    JOURNAL_FILE,
    RunLock,
    cancel_requested,
    cancel_requested_at,
    create_run,
    is_alive,
    read_record,
    request_cancel,
    run_directory,
)

HOLD_LOCK = """
import sys, time
from pathlib import Path
from opd_mcp.store.runs import RunLock
lock = RunLock.acquire(Path({directory!r}))
print("held", flush=True)
time.sleep(60)
"""
ADOPT_LOCK = """
import subprocess, sys, time
from pathlib import Path
from opd_mcp.store.runs import RunLock
lock = RunLock.adopt(Path({directory!r}), {descriptor})
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
print(helper.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(workspace, make_record):
    return create_run(workspace, make_record())


def test_a_record_is_read_as_it_was_written(workspace, make_record):
    record = make_record()
    assert read_record(create_run(workspace, record)) == record.sealed()


def test_an_id_is_taken_once(workspace, make_record):
    record = make_record()
    create_run(workspace, record)
    with pytest.raises(FileExistsError):
        create_run(workspace, record)


def test_a_damaged_record_is_an_error(run):
    (run / "run.json").write_text("{}")
    with pytest.raises(IntegrityError) as caught:
        read_record(run)
    assert caught.value.code == "damaged_file"


def test_an_unknown_run_names_the_nearest(workspace, run):
    with pytest.raises(UnknownIdError) as caught:
        run_directory(workspace, run.name[:-1])
    assert caught.value.code == "unknown_run"
    assert caught.value.nearest == [run.name]
    with pytest.raises(UnknownIdError):
        run_directory(workspace, "../" + run.name)
    assert run_directory(workspace, run.name) == run


def test_a_run_is_alive_while_its_lock_is_held(run):
    assert not is_alive(run)
    with RunLock.acquire(run):
        assert is_alive(run)
        assert is_alive(run), "looking does not disturb"
    assert not is_alive(run)


def test_a_lock_has_one_holder(run, monkeypatch):
    monkeypatch.setattr("opd_mcp.store.runs.ACQUIRE_SECONDS", 0.05)
    with RunLock.acquire(run), pytest.raises(RunError) as caught:
        RunLock.acquire(run)
    assert caught.value.code == "run_locked"
    RunLock.acquire(run).release()


def test_a_killed_process_is_lost_and_its_run_can_be_taken_over(run, python):
    with subprocess.Popen(python(HOLD_LOCK.format(directory=str(run))), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with JournalWriter(run / JOURNAL_FILE, 1) as writer:
            writer.append("state", {"state": "running"})
        view = RunView(run)
        assert view.refresh().state == "running"
        os.kill(process.pid, signal.SIGKILL)
    assert view.refresh().state == "lost"
    with RunLock.acquire(run):
        assert view.refresh().state == "running"


def test_a_lock_passed_to_a_child_lives_on_in_it_but_not_in_the_childs_children(run, python):
    lock = RunLock.acquire(run)
    code = ADOPT_LOCK.format(directory=str(run), descriptor=lock.descriptor)
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True, pass_fds=(lock.descriptor,))
    lock.release()
    helper = 0
    try:
        assert is_alive(run), "no moment in which a queued run looks lost"
        assert process.stdout is not None
        helper = int(process.stdout.readline())
        assert is_alive(run)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        os.kill(helper, 0)
        assert not is_alive(run), "the grandchild is alive and holds nothing"
    finally:
        process.kill()
        process.stdout.close()  # type: ignore[union-attr]
        if helper:
            os.kill(helper, signal.SIGKILL)


def test_only_the_runs_own_lock_is_adopted(run, tmp_path):
    with (tmp_path / "other").open("w") as other, pytest.raises(RunError) as caught:
        RunLock.adopt(run, other.fileno())
    assert caught.value.code == "run_locked"
    with RunLock.acquire(run), (run / "lock").open() as second, pytest.raises(RunError):
        RunLock.adopt(run, second.fileno())


def test_a_cancel_request_is_a_file(run):
    assert (cancel_requested(run), cancel_requested_at(run)) == (False, None)
    request_cancel(run)
    assert cancel_requested(run)
    os.utime(run / "cancel", (0, 0))
    request_cancel(run)
    assert cancel_requested_at(run) == "1970-01-01T00:00:00.000Z"

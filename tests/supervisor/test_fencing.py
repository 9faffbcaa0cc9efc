"""A worker that slept while another attempt took its run over writes nothing: real engine, real signals."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from opd_mcp.schemas.runs import ACTIVE_STATES
from opd_mcp.service import JobService
from opd_mcp.store.runs import RunLock, begin_attempt, taken_up
from opd_mcp.store.worker_process import note_start
from opd_mcp.worker.main import RunWorker, WorkerSettings

SLEEPING_WORKER = Path(__file__).parents[1] / "stand_ins" / "sleeping_worker.py"
MANY_CHECKPOINTS = {"sft.steps": 20, "sft.batch_size": 2, "checkpoint.steps": 2}


@pytest.fixture
def wishes(tmp_path) -> Path:
    (tmp_path / "wishes").mkdir()
    return tmp_path / "wishes"


@pytest.fixture
def sleepy(world, wishes) -> JobService:
    """A service whose workers go to sleep where `wishes` says."""
    command = (sys.executable, str(SLEEPING_WORKER), str(wishes))
    return dataclasses.replace(world, settings=dataclasses.replace(world.settings, worker_command=command)).service()


def asleep(service, run_id, until, *, besides: int = 0) -> psutil.Process:
    """The run's worker once it has suspended itself; `besides` is the pid of another one that sleeps as well."""
    found: list[psutil.Process] = []

    def sleeps(status) -> bool:
        workers = [p for p in psutil.process_iter(["cmdline"]) if run_id in (p.info["cmdline"] or [])]
        found[:] = [p for p in workers if p.pid != besides and p.status() == psutil.STATUS_STOPPED]
        return bool(found)

    until(service, run_id, sleeps)
    return found[0]


def replace_lock(directory: Path) -> None:
    """Another file in the lock's place: a suspended process would hold the first one for ever."""
    shutil.copy(directory / "lock", directory / "another")
    os.replace(directory / "another", directory / "lock")


def tree(directory: Path) -> dict[str, int]:
    """Every file below a directory, with the time of its last change."""
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_worker_that_slept_in_its_checkpoint_s_thread_removes_none_of_the_next_attempt(
    world, sleepy, wishes, until, finished
):
    (wishes / "published").touch()
    run_id = sleepy.start_sft(world.sft_arguments(**MANY_CHECKPOINTS)).run_id
    old, directory = asleep(sleepy, run_id, until), sleepy.workspace.run(run_id)
    replace_lock(directory)
    assert sleepy.status(run_id).state == "lost"
    (wishes / "building").touch()
    assert not sleepy.resume(run_id).reused
    new = asleep(sleepy, run_id, until, besides=old.pid)
    before, log = tree(directory / "checkpoints"), directory / "worker.log"
    assert any("/.building-" in name for name in before), "the new attempt is at work on a checkpoint"
    journal, said = (directory / "journal.jsonl").read_bytes(), log.read_text()
    old.resume()
    old.wait(20)
    assert tree(directory / "checkpoints") == before
    assert (directory / "journal.jsonl").read_bytes() == journal
    last_words = log.read_text().removeprefix(said)
    assert "attempt_superseded" in last_words
    assert "Traceback" not in last_words
    new.resume()
    assert finished(sleepy, run_id).state == "succeeded"


def test_a_new_attempt_takes_away_what_a_sleeper_would_publish(world, sleepy, wishes, leases, until, finished):
    """Also before the new attempt has a device: there is no moment at which the old one could still rename."""
    (wishes / "renaming").touch()
    run_id = sleepy.start_sft(world.sft_arguments(**MANY_CHECKPOINTS)).run_id
    old, directory = asleep(sleepy, run_id, until), sleepy.workspace.run(run_id)
    [other_slot] = set(leases.cpu_slot_names()) - set(leases.busy(leases.cpu_slot_names()))
    lease = leases.acquire("somebody-else", [other_slot], 1, lambda: False)
    replace_lock(directory)
    sleepy.resume(run_id)
    before = tree(directory / "checkpoints")
    old.resume()
    old.wait(20)
    assert tree(directory / "checkpoints") == before
    assert len([name for name in before if name.count("/") == 1]) == 2
    lease.release()
    assert finished(sleepy, run_id).state == "succeeded"


@pytest.fixture
def superseded(world, service, busy_machine, finished):
    """The directory and the journal of a run's first attempt, whose lock another one has taken meanwhile."""
    run_id = service.start_sft(world.sft_arguments()).run_id
    service.cancel(run_id)
    assert finished(service, run_id).state not in ACTIVE_STATES
    directory = service.workspace.run(run_id)
    old = RunLock.acquire(directory)
    begin_attempt(old)
    journal = taken_up(old)
    replace_lock(directory)
    with RunLock.acquire(directory) as new:
        begin_attempt(new)
        yield directory, old, journal
    journal.close()
    old.release()


def test_a_worker_that_slept_before_it_began_notes_nothing(superseded, service, leases):
    """It had taken up its attempt, and not yet written which process makes it."""
    directory, _, journal = superseded
    note_start(directory, 3)
    before = tree(directory)
    assert RunWorker(service.store, directory, journal, WorkerSettings(leases)).work() == 1
    assert tree(directory) == before


def test_opening_a_journal_without_the_lock_cuts_nothing_off(superseded):
    directory, old, _ = superseded
    journal = directory / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"seq":9,"half of a line that the new attempt writes')
    before = journal.read_bytes()
    taken_up(old).close()
    assert journal.read_bytes() == before

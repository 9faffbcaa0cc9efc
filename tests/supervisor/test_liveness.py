"""How dead workers are seen and what is known of their ends; the workers are real processes that really die."""

import dataclasses
import signal
import sys
import time

import psutil
import pytest

from opd_mcp.schemas.next_action import resume_call
from opd_mcp.store.runs import is_alive
from opd_mcp.store.store import Store
from opd_mcp.store.worker_process import CGROUPS, WorkerProcess, boot_id, note_start, oom_counter, oom_kills
from opd_mcp.supervisor.liveness import Loss, loss_of, same_boot

LONG = {"sft.steps": 100_000}


@pytest.fixture
def running(world, service, until):
    """A run in the middle of its SFT, as id and directory."""
    run_id = service.start_distillation(world.start_arguments(overrides=LONG)).run_id
    until(service, run_id, lambda status: status.phase == "sft")
    return run_id, service.workspace.run(run_id)


def noted(directory) -> WorkerProcess:
    return WorkerProcess.from_json((directory / "worker.json").read_bytes())


def end(directory, number: int = signal.SIGKILL) -> None:
    """Send the worker a signal, and wait until the kernel has freed its lock."""
    psutil.Process(noted(directory).pid).send_signal(number)
    while is_alive(directory):
        pass


def test_the_worker_notes_which_process_it_is(running):
    worker = noted(running[1])
    process = psutil.Process(worker.pid)
    assert running[0] in process.cmdline()
    assert (worker.attempt, worker.started, worker.boot) == (1, process.create_time(), boot_id())
    process.kill()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_worker_that_a_signal_ended_is_lost_at_the_next_look_with_the_signal(service, running, number, name):
    run_id, directory = running
    end(directory, number)
    status = service.status(run_id)
    assert (status.state, status.error.code) == ("lost", "worker_lost")
    assert status.error.cause == f"The worker process was ended by signal {number} ({name})."
    assert status.next_action.call_text() == f"Call resume_run(run_id='{run_id}')"
    assert loss_of(directory, 1).cause == status.error.cause, "any other server reads the same"
    assert "no server saw how" in loss_of(directory, 2).cause, "another attempt's end says nothing"


def test_an_exit_code_is_told(world, finished):
    settings = dataclasses.replace(world.settings, worker_command=(sys.executable, "-c", "raise SystemExit(7)"))
    service = dataclasses.replace(world, settings=settings).service()
    status = finished(service, service.start_distillation(world.start_arguments()).run_id)
    assert (status.state, "exit code 7" in status.error.cause) == ("lost", True)


def test_a_zombie_is_not_alive(service, running):
    run_id, directory = running
    worker = psutil.Process(noted(directory).pid)
    worker.kill()
    store, deadline = Store(service.workspace), time.monotonic() + 10
    # Its main thread is a zombie a little before its other threads have let go of the lock.
    while worker.status() != psutil.STATUS_ZOMBIE or store.view(run_id).state != "lost":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert worker.status() == psutil.STATUS_ZOMBIE, "nobody has reaped it"
    assert service.status(run_id).state == "lost"
    assert not psutil.pid_exists(worker.pid)


@pytest.fixture
def counted(running, tmp_path):
    """`counted(kills)`: the run's worker notes a control group of its own, in which so many were killed since."""
    directory = running[1]
    (tmp_path / "own").write_text("0::/box\n")
    (counter := tmp_path / "cgroup" / "box" / "memory.events").parent.mkdir(parents=True)
    counter.write_text("oom 3\noom_kill 3\n")
    worker = noted(directory)
    note_start(directory, 1, tmp_path / "cgroup", tmp_path / "own")
    mine = noted(directory)
    assert (mine.oom_counter, mine.oom_kills) == (str(counter), 3)
    group = {"oom_counter": mine.oom_counter, "oom_kills": mine.oom_kills}
    (directory / "worker.json").write_text(worker.model_copy(update=group).sealed().to_json())
    return lambda kills: counter.write_text(f"oom 9\noom_kill {3 + kills}\n")


@pytest.mark.parametrize(("kills", "processes"), [(1, "1 process"), (2, "2 processes")])
def test_the_out_of_memory_killer_is_named_when_the_kernel_counted_it(service, running, counted, kills, processes):
    run_id, directory = running
    counted(kills)
    end(directory)
    status = service.status(run_id)
    assert status.error.cause == (
        "The worker process was ended by signal 9 (SIGKILL). "
        f"The kernel's out-of-memory killer ended {processes} of its control group meanwhile."
    )
    assert status.error.override["sft.micro_batch_tokens"] == 4096
    assert status.error.call == resume_call(status.run_id)
    counted(7)
    assert service.status(run_id).error == status.error, "what is killed later is not counted"


def test_without_a_kill_or_with_another_signal_memory_is_not_blamed(service, running, counted):
    counted(1)
    end(running[1], signal.SIGSEGV)
    assert service.status(running[0]).error.cause == "The worker process was ended by signal 11 (SIGSEGV)."
    assert service.status(running[0]).error.override is None


def test_where_no_server_saw_the_end_the_counter_still_speaks(service, running, counted):
    directory = running[1]
    end(directory)
    unseen = "The worker process ended without finishing, and no server saw how: it was killed, or crashed."
    assert loss_of(directory, 1) == Loss(cause=unseen)
    counted(1)
    known = " The kernel's out-of-memory killer ended 1 process of its control group since it began."
    assert loss_of(directory, 1) == Loss(cause=unseen + known, out_of_memory=True)


def test_the_counter_of_this_machine_can_be_read_or_is_absent():
    counter = oom_counter()
    assert (counter is None) == (oom_kills(counter) is None)
    if counter is not None:
        assert counter.is_relative_to(CGROUPS)
        assert oom_kills(counter) >= 0


def test_a_restart_of_the_machine_is_recognised(service, running):
    run_id, directory = running
    worker = noted(directory)
    (directory / "worker.json").write_text(worker.model_copy(update={"boot": "another"}).sealed().to_json())
    end(directory)
    assert service.status(run_id).error.cause == "The machine was restarted while the run was going."


def test_boot_times_that_differ_by_a_correction_of_the_clock_are_one_boot():
    assert same_boot(boot_id(), boot_id())
    assert same_boot("at 1000", "at 1003")
    assert not same_boot("at 1000", "at 2000")
    assert not same_boot("at 1000", "127d949f")


@pytest.mark.parametrize(
    ("groups", "file", "content"),
    [
        ("0::/user.slice/run.scope\n", "user.slice/run.scope/memory.events", "low 0\noom_kill 2\n"),
        ("0::/outside/of/the/container\n", "memory.events", "oom 3\noom_kill 2\noom_group_kill 1\n"),
        ("8:pids:/x\n4:memory:/box/1\n0::/\n", "memory/box/1/memory.oom_control", "under_oom 0\noom_kill 2\n"),
        ("4:memory:/box/1\n", "memory/memory.oom_control", "oom_kill_disable 0\noom_kill 2\n"),
    ],
)
def test_the_counter_of_a_memory_group_is_found_in_both_versions(tmp_path, groups, file, content):
    (tmp_path / "own").write_text(groups)
    place = tmp_path / "cgroup" / file
    place.parent.mkdir(parents=True)
    place.write_text(content)
    found = oom_counter(tmp_path / "cgroup", tmp_path / "own")
    assert (found, oom_kills(found)) == (place, 2)
    place.unlink()
    assert oom_counter(tmp_path / "cgroup", tmp_path / "own") is None

"""Leases between real processes: order of arrival, and freedom when a holder dies."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from opd_mcp.jobs.leases import LeaseFolder
from opd_mcp.schemas.errors import PathError

HOLDER = """
import sys, time
from pathlib import Path
from opd_mcp.jobs.leases import LeaseFolder

folder = LeaseFolder(Path(sys.argv[1]), 2)
lease = folder.acquire(sys.argv[2], folder.cpu_slot_names(), int(sys.argv[3]), lambda: False)
print(*lease.slots, flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold(leases):
    """`hold(owner, count)`: a process that takes so many slots and keeps them; its first line names them."""
    processes = []

    def start(owner: str, count: int = 1) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(leases.root), owner, str(count)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def waits(leases: LeaseFolder, owner: str) -> None:
    while leases.queue_position(owner) is None:
        pass


def test_as_many_runs_as_slots_and_the_next_one_waits(leases, hold):
    held = {hold(owner).stdout.readline().strip() for owner in ("a", "b")}
    assert held == {"cpu-0", "cpu-1"}
    assert leases.busy(leases.cpu_slot_names()) == ["cpu-0", "cpu-1"]
    hold("c")
    waits(leases, "c")
    assert leases.queue_position("c") == 1
    assert leases.queue_position("a") is None


def test_a_killed_holder_frees_its_slot_for_the_first_in_line(leases, hold):
    first, second = hold("a"), hold("b", 1)
    first.stdout.readline()
    second.stdout.readline()
    third = hold("c")
    waits(leases, "c")
    fourth = hold("d")
    waits(leases, "d")
    assert (leases.queue_position("c"), leases.queue_position("d")) == (1, 2)
    first.kill()
    assert third.stdout.readline().strip().startswith("cpu-")
    second.kill()
    assert fourth.stdout.readline().strip().startswith("cpu-")


def test_a_dead_ticket_does_not_hold_up_the_queue(leases, hold):
    blocker = hold("a", 2)
    blocker.stdout.readline()
    waiting = hold("b")
    waits(leases, "b")
    behind = hold("c")
    waits(leases, "c")
    waiting.kill()
    waiting.wait()
    assert leases.queue_position("c") == 1
    blocker.kill()
    assert behind.stdout.readline().strip().startswith("cpu-")


def test_a_run_of_two_threads_gets_both_slots_before_later_small_ones(leases, hold):
    small = hold("a")
    small.stdout.readline()
    large = hold("b", 2)
    waits(leases, "b")
    later = hold("c")
    waits(leases, "c")
    small.kill()
    assert sorted(large.stdout.readline().split()) == ["cpu-0", "cpu-1"]
    large.kill()
    assert later.stdout.readline().strip().startswith("cpu-")


def test_whoever_is_told_to_stop_leaves_queue_and_slots(leases, busy_machine):
    stop = threading.Event()
    answers = []
    slots = leases.cpu_slot_names()
    waiter = threading.Thread(target=lambda: answers.append(leases.acquire("b", slots, 1, stop.is_set)))
    waiter.start()
    waits(leases, "b")
    stop.set()
    waiter.join()
    assert answers == [None]
    assert leases.queue_position("b") is None


def test_gpu_runs_and_cpu_runs_do_not_wait_for_each_other(leases, busy_machine):
    lease = leases.acquire("g", ["gpu-GPU-1", "gpu-GPU-2"], 1, lambda: False)
    assert lease.slots == ["gpu-GPU-1"]
    assert leases.busy(["gpu-GPU-1", "gpu-GPU-2"]) == ["gpu-GPU-1"]
    lease.release()
    lease.release()
    assert leases.busy(["gpu-GPU-1"]) == []


@pytest.mark.parametrize("fault", ["a link", "for everybody", "another user's"])
def test_a_lease_folder_that_others_control_is_refused(tmp_path, fault):
    folder = LeaseFolder(tmp_path / "leases", 1)
    if fault == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.root.symlink_to(tmp_path / "elsewhere")
    else:
        folder.root.mkdir()
        if fault == "for everybody":
            folder.root.chmod(0o1777)
        elif os.geteuid() == 0:
            os.chown(folder.root, 12345, 12345)
        else:
            pytest.skip("only root can give a folder away")
    with pytest.raises(PathError, match="XDG_RUNTIME_DIR"):
        folder.acquire("me", folder.cpu_slot_names(), 1, lambda: False)
    assert not list((tmp_path / "leases").iterdir())


def test_a_lease_folder_that_others_could_enter_is_closed(tmp_path):
    folder = LeaseFolder(tmp_path / "leases", 1)
    folder.root.mkdir()
    folder.root.chmod(0o777)
    folder.acquire("me", folder.cpu_slot_names(), 1, lambda: False).release()
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700

"""Leases between real processes: order of arrival, and freedom when a holder dies."""

import subprocess
import sys
import threading

import psutil
import pytest

from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.store.runs import is_alive

HOLDER = """
import sys, time
from pathlib import Path
from opd_mcp.devices.leases import LeaseFolder

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
    while leases.place(owner) is None:
        pass


def test_as_many_runs_as_slots_and_the_next_one_waits(leases, hold):
    held = {hold(owner).stdout.readline().strip() for owner in ("a", "b")}
    assert held == {"cpu-0", "cpu-1"}
    assert leases.busy(leases.cpu_slot_names()) == ["cpu-0", "cpu-1"]
    hold("c")
    waits(leases, "c")
    assert leases.place("c").position == 1
    assert leases.place("a") is None


def test_a_killed_holder_frees_its_slot_for_the_first_in_line(leases, hold):
    first, second = hold("a"), hold("b", 1)
    first.stdout.readline()
    second.stdout.readline()
    third = hold("c")
    waits(leases, "c")
    fourth = hold("d")
    waits(leases, "d")
    assert (leases.place("c").position, leases.place("d").position) == (1, 2)
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
    assert leases.place("c").position == 1
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


def test_two_runs_that_want_all_slots_get_them_one_after_the_other(leases, hold):
    """Neither holds one slot while it waits for the other's, though a third run gives its slots back one by one."""
    small = [hold("small"), hold("other")]
    for process in small:
        process.stdout.readline()
    first = hold("first", 2)
    waits(leases, "first")
    second = hold("second", 2)
    waits(leases, "second")
    small[1].kill()
    small[0].kill()
    assert sorted(first.stdout.readline().split()) == ["cpu-0", "cpu-1"]
    assert leases.place("second").position == 1
    first.kill()
    assert sorted(second.stdout.readline().split()) == ["cpu-0", "cpu-1"]


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
    assert leases.place("b") is None


def test_whoever_waits_is_told_for_what_and_who_has_it(leases, hold):
    for owner in ("sft-x", "cache-y"):
        hold(owner).stdout.readline()
    hold("next")
    waits(leases, "next")
    assert leases.place("next").text() == "waits for a CPU slot: 2 of 2 held by sft-x, cache-y"
    hold("large", 2)
    waits(leases, "large")
    place = leases.place("large")
    assert place.position == 2
    assert place.text() == "waits for 2 CPU slots: 2 of 2 held by sft-x, cache-y; behind next"


def test_no_child_inherits_a_lock(leases, tmp_path):
    """A holder of a run's lock and of a lease starts a child that would inherit all it can, and is killed."""
    code = """
import subprocess, sys, time
from pathlib import Path
from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.store.runs import RunLock

folder, run = LeaseFolder(Path(sys.argv[1]), 2), Path(sys.argv[2])
lock = RunLock.acquire(run)
lease = folder.acquire("a", folder.cpu_slot_names(), 2, lambda: False)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
print(child.pid, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(leases.root), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        child = psutil.Process(int(holder.stdout.readline()))
        assert (len(leases.busy(leases.cpu_slot_names())), is_alive(tmp_path)) == (2, True)
        holder.kill()
        holder.stdout.close()
        holder.wait()
    try:
        assert child.is_running()
        assert (leases.busy(leases.cpu_slot_names()), is_alive(tmp_path)) == ([], False)
    finally:
        child.kill()


def test_gpu_runs_and_cpu_runs_do_not_wait_for_each_other(leases, busy_machine):
    lease = leases.acquire("g", ["gpu-GPU-1", "gpu-GPU-2"], 1, lambda: False)
    assert lease.slots == ["gpu-GPU-1"]
    assert leases.busy(["gpu-GPU-1", "gpu-GPU-2"]) == ["gpu-GPU-1"]
    lease.release()
    lease.release()
    assert leases.busy(["gpu-GPU-1"]) == []


SHORT_HOLDER = """
import sys, time
from pathlib import Path
from opd_mcp.devices.leases import LeaseFolder, Wish

folder = LeaseFolder(Path(sys.argv[1]), 2)
regular = folder.cpu_slot_names()
admission = Path(sys.argv[3])
wishes = [Wish(regular), Wish(folder.short_slots(regular), 1, lambda slot: admission.exists())]
lease = folder.acquire_any(sys.argv[2], wishes, lambda: False, needs=100)
print(*lease.slots, flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold_short(leases, tmp_path):
    """`hold_short(owner)`: a process with a short run; without a file `admission` it is not let into the short slot."""
    processes = []
    (tmp_path / "admission").touch()

    def start(owner: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SHORT_HOLDER, str(leases.root), owner, str(tmp_path / "admission")]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_short_run_does_not_wait_behind_long_ones(leases, hold, hold_short):
    long = hold("long", 2)
    long.stdout.readline()
    hold("next-long")
    waits(leases, "next-long")
    first = hold_short("sample-a")
    assert first.stdout.readline() == "short-cpu\n"
    second = hold_short("sample-b")
    waits(leases, "sample-b")
    while "short runs" not in (said := leases.place("sample-b").text()):
        pass  # it has entered the first of its two queues
    assert said == "waits for a CPU slot for short runs: 1 of 1 held by sample-a"
    assert leases.place("next-long").text().endswith("2 of 2 held by long")
    first.kill()
    assert second.stdout.readline() == "short-cpu\n"


def test_short_runs_use_the_other_slots_of_an_idle_machine_as_well(leases, hold_short):
    slots = {hold_short(f"sample-{name}").stdout.readline().strip() for name in "abc"}
    assert slots == {"cpu-0", "cpu-1", "short-cpu"}


def test_a_short_run_whose_memory_is_taken_waits_for_memory_or_its_turn(leases, hold, hold_short, tmp_path):
    long = hold("long", 2)
    long.stdout.readline()
    (tmp_path / "admission").unlink()
    first, second = hold_short("sample-a"), hold_short("sample-b")
    for owner in ("sample-a", "sample-b"):
        waits(leases, owner)
    assert leases.busy(["short-cpu"]) == []
    (tmp_path / "admission").touch()
    places = [first.stdout, second.stdout]
    while not leases.busy(["short-cpu"]):
        pass
    long.kill()
    assert {place.readline().strip()[:4] for place in places} == {"shor", "cpu-"}


def test_the_holder_of_a_slot_says_how_much_memory_it_needs(leases, hold, hold_short):
    hold("long", 2).stdout.readline()
    assert leases.needed("gpu-GPU-1") == 0
    assert leases.needed("cpu-0") is None
    hold_short("sample-a").stdout.readline()
    assert leases.needed("short-cpu") == 100
    assert leases.holders(["short-cpu"]) == ["sample-a"]


def test_the_slots_for_short_runs_are_one_on_each_device(leases):
    assert leases.short_slots(["cpu-0", "cpu-1"]) == ["short-cpu"]
    assert leases.short_slots(["gpu-GPU-1", "gpu-GPU-2"]) == ["short-gpu-GPU-1", "short-gpu-GPU-2"]

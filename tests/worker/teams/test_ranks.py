"""Ranks as the worker sees them: heard, ended together, and named when one is lost."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from opd_mcp.schemas.errors import OpdError, RunError
from opd_mcp.worker.teams.far_ranks import FarRank, Gate, come_in, even_nodes, share_of
from opd_mcp.worker.teams.ranks import RankTeam, RankWork

STAND_IN = Path(__file__).parents[2] / "stand_ins" / "stand_in_rank.py"
SUMMARY = {"steps": 1, "seconds": 1.0, "seconds_per_step": 1.0, "trained_tokens": 5, "parameters": 7, "device": "CPU"}
FOREVER = ["sleep", 600]


def started_here(host: str, command: Sequence[str]) -> list[str]:
    """Another machine's rank, by a process between as srun is one."""
    waiting = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode % 256)"
    return [sys.executable, "-c", waiting, *command]


@pytest.fixture
def team(tmp_path: Path):
    """`team(acts of rank 0, acts of rank 1, …)`: the team, and what its ranks reported."""
    heard: list[tuple[object, ...]] = []

    def make(
        *acts: list[list[object]], group_seconds: float = 5.0, here: int | None = None, start_far=started_here
    ) -> tuple[RankTeam, list[tuple[object, ...]]]:
        answers = {
            "metric": lambda step, values: heard.append(("metric", step, values)),
            "alert": lambda code, message: heard.append(("alert", code)),
            "position": lambda: 17,
        }
        command = (sys.executable, "-P", str(STAND_IN))
        count = len(acts) if here is None else here
        far = [FarRank(f"node-{number}", None, "localhost") for number in range(count, len(acts))]
        facts = {"acts": acts}
        work = RankWork(facts, [None] * count, tmp_path, group_seconds, command, far, start_far)
        return RankTeam(work, answers, {"made_here": lambda path: path == "/here"}), heard

    return make


def living(team: RankTeam) -> list[int]:
    return [rank.number for rank in team.ranks if psutil.pid_exists(rank.process.pid)]


def test_rank_0_reports_and_every_rank_may_ask_what_a_stage_must_know(team, tmp_path: Path) -> None:
    first = [["tell", "alert", "note", "said"], ["ask", "position"], ["ask", "made_here", "/there"], ["done", SUMMARY]]
    some, heard = team(first, [["ask", "made_here", "/here"]])
    with pytest.raises(KeyError, match="metric"):  # another rank reports nothing
        some.trained()
    some, heard = team(first, [])
    assert some.trained().trained_tokens == 5
    assert heard[-3:] == [("alert", "note"), ("metric", 0, {"answer": 17}), ("metric", 0, {"answer": False})]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("acts", "named"),
    [
        (([FOREVER], [["signal", "SIGKILL"]]), r"Rank 1 of 2 .* was ended by SIGKILL"),
        (([["signal", "SIGSEGV"]], [FOREVER]), r"Rank 0 of 2 .* was ended by SIGSEGV"),
        (([FOREVER], [FOREVER], [["exit", 3]]), r"Rank 2 of 3 .* ended with status 3"),
        (([], []), r"Rank 0 of 2 .* ended without a result"),
        # who lost the group is not who left it
        (([["raise", "group"]], [["sleep", 0.2], ["signal", "SIGKILL"]]), r"Rank 1 of 2 .* SIGKILL"),
        (([["raise", "group"]], [["signal", "SIGSTOP"]]), r"Rank 1 of 2 .* within 5 s: its process is suspended"),
        (([["raise", "group"]], [["raise", "group"]]), r"Rank 0 of 2 .* lost the others .*Connection closed"),
    ],
)
def test_one_lost_rank_ends_all_and_is_named(team, acts, named: str) -> None:
    some, _ = team(*acts)
    with pytest.raises(RunError, match=named) as raised:
        some.trained()
    assert raised.value.code == "rank_lost"
    assert raised.value.call.tool == "resume_run"
    assert living(some) == []


def test_what_a_stage_raised_in_any_rank_is_raised(team) -> None:
    some, _ = team([FOREVER], [["raise", "run"]])
    with pytest.raises(OpdError) as raised:
        some.trained()
    error = raised.value
    assert (error.code, error.value, error.fix) == ("bad_number", "nan", "Lower the rate.")
    for kind, expected in (("memory", MemoryError), ("disk", OSError)):
        some, _ = team([["raise", "group"]], [["raise", kind]])
        with pytest.raises(expected):
            some.trained()
        assert living(some) == []


def test_ranks_end_with_a_killed_worker(tmp_path: Path) -> None:
    code = """
import sys, threading, time
from pathlib import Path
from opd_mcp.worker.teams.far_ranks import FarRank, Gate, come_in, share_of
from opd_mcp.worker.teams.ranks import RankTeam, RankWork

work = RankWork({"acts": [[["tell", "up"], ["sleep", 600]]] * 2}, [None] * 2, Path(sys.argv[1]), 5.0, sys.argv[2:])
team = RankTeam(work, {}, {"up": lambda: print(*[rank.process.pid for rank in team.ranks], flush=True)})
team.trained()
"""
    command = [sys.executable, "-c", code, str(tmp_path), sys.executable, "-P", str(STAND_IN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        for _ in range(2):
            pids = [int(pid) for pid in worker.stdout.readline().split()]
        worker.kill()
        worker.stdout.close()
    deadline = time.monotonic() + 30
    while any(_lives(pid) for pid in pids) and time.monotonic() < deadline:
        os.sched_yield()
    assert [pid for pid in pids if _lives(pid)] == []


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ranks_of_other_machines_ask_and_are_heard_as_those_here(team) -> None:
    first = [["ask", "made_here", "/here"], ["done", SUMMARY]]
    some, heard = team(first, [["ask", "made_here", "/there"]], here=1)
    with pytest.raises(KeyError, match="metric"):
        some.trained()
    some, heard = team(first, [], [], here=1)
    assert some.trained().trained_tokens == 5
    assert heard[-1] == ("metric", 0, {"answer": True})


@pytest.mark.parametrize("act", [["exit", 3], ["raise", "run"]])
def test_one_that_ends_on_another_machine_is_named_by_it(team, act) -> None:
    some, _ = team([FOREVER], [FOREVER], [act], here=1)
    with pytest.raises(OpdError, match=r"bad_number" if act[0] == "raise" else r"Rank 2 of 3 \(on node-2\) ended with"):
        some.trained()
    assert living(some) == []


def test_one_that_does_not_come_is_lost(team) -> None:
    some, _ = team([FOREVER], [], here=1, start_far=lambda host, command: ["sleep", "600"], group_seconds=1.0)
    with pytest.raises(RunError, match=r"Rank 1 of 2 \(on node-1\) did not come within 1 s"):
        some.trained()
    assert living(some) == []


def test_ranks_of_other_machines_end_with_their_worker(tmp_path: Path) -> None:
    """Their processes are not the worker's children there, so only the line tells them."""
    note = tmp_path / "pids"
    noting = f"import os; open({str(note)!r}, 'a').write(f'{{os.getpid()}} '); exec(open({str(STAND_IN)!r}).read())"
    code = f"""
import sys
from pathlib import Path
from opd_mcp.worker.teams.far_ranks import FarRank
from opd_mcp.worker.teams.ranks import RankTeam, RankWork
far = [FarRank("node", None, "localhost")] * 2
apart = lambda host, command: ["setsid", "--wait", *command]
acts = [[["tell", "up"], ["sleep", 600]]] * 3
work = RankWork({{"acts": acts}}, [None], Path(sys.argv[1]), 20.0, (sys.executable, "-c", {noting!r}), far, apart)
RankTeam(work, {{"up": lambda: print("up", flush=True)}}, {{"up": lambda: None}}).trained()
"""
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "up\n"
    deadline = time.monotonic() + 60
    while len(note.read_text().split()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [psutil.Process(int(pid)) for pid in note.read_text().split()]
    worker.kill()
    worker.wait()
    _, left = psutil.wait_procs(ranks, timeout=20)
    assert left == []


def test_who_has_not_the_token_does_not_come_in() -> None:
    with Gate(["localhost"]) as gate:
        facts = gate.facts(1)
        stranger = come_in({**facts, "token": "0" * 64})
        other = come_in({**facts, "rank": 7})
        mine = come_in(facts)
        lines = gate.admitted([1], lambda: False, 20.0)
        assert list(lines) == [1]
        assert (stranger.recv(1), other.recv(1)) == (b"", b"")
        mine.sendall(b"x")
        assert lines[1].recv(1) == b"x"
        for line in (stranger, other, mine, lines[1]):
            line.close()


@pytest.mark.parametrize(
    ("devices", "hosts", "shares"), [(8, 1, [8]), (8, 2, [4, 4]), (5, 2, [3, 2]), (4, 3, [2, 2, 0]), (1, 2, [1, 0])]
)
def test_devices_are_divided_among_machines(devices: int, hosts: int, shares: list[int]) -> None:
    assert share_of(devices, hosts) == shares


@pytest.mark.parametrize(
    ("here", "there", "nodes"), [(4, [], 1), (2, ["b", "b"], 2), (1, ["b", "c"], 3), (3, ["b", "b"], 1)]
)
def test_ranks_know_on_how_many_machines_equally_many_are(here: int, there: list[str], nodes: int) -> None:
    assert even_nodes(here, [FarRank(host, None, "a") for host in there]) == nodes

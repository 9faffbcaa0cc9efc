"""Helpers as the worker sees them: told of jobs, missed when they end, and gone with the phase."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from opd_mcp.schemas.recipes import RuntimeRecipe
from opd_mcp.worker.teams.helpers import HelperTeam

# writes each line that it is told to a file of its own
LISTENER = """
import sys
from pathlib import Path
for number, line in enumerate(sys.stdin):
    (Path(sys.argv[1]) / f"{__import__('os').getpid()}-{number}").write_text(line)
"""


@pytest.fixture
def team(tmp_path: Path):
    """`team(count)`: the team, with what it alerted."""
    told = tmp_path / "told"
    told.mkdir()

    def make(count: int = 2) -> tuple[HelperTeam, list[tuple[str, str]]]:
        alerts: list[tuple[str, str]] = []
        command = [sys.executable, "-c", LISTENER, str(told)]
        runtime = RuntimeRecipe(threads=2)
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        return HelperTeam([None] * count, runtime, run, lambda *alert: alerts.append(alert), command=command), alerts

    return make


def test_helpers_begin_with_the_first_job_and_hear_of_every_one(team, tmp_path: Path) -> None:
    some, alerts = team()
    (tmp_path / "run" / "helpers-old").mkdir()
    with some.working() as helpers:
        assert [path.name for path in (tmp_path / "run").iterdir()] == [helpers.folder.name]
        assert helpers.processes == []
        for name in ("one", "two"):
            helpers.share(Path(name))
        for process in helpers.processes:
            process.stdin.close()
            assert process.wait() == 0
        pids = [process.pid for process in helpers.processes]
    for pid in pids:
        lines = [json.loads((tmp_path / "told" / f"{pid}-{number}").read_bytes()) for number in range(3)]
        assert lines[0]["worker"] == os.getpid()
        assert lines[0]["runtime"]["threads"] == 2
        assert lines[1:] == [{"job": "one"}, {"job": "two"}]
    assert alerts == []
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lost_helper_is_told_of_once_and_jobs_go_on(team) -> None:
    some, alerts = team()
    with some.working() as helpers:
        helpers.share(Path("one"))
        helpers.check()
        assert alerts == []
        os.kill(helpers.processes[0].pid, signal.SIGKILL)
        helpers.processes[0].wait()
        helpers.check()
        helpers.share(Path("two"))
        helpers.check()
        assert [code for code, _ in alerts] == ["helper_lost"]
        assert "Helper 1 of 2" in alerts[0][1]
        assert "SIGKILL" in alerts[0][1]
        helpers.give_up()
        helpers.give_up()
        helpers.check()
        assert [code for code, _ in alerts] == ["helper_lost", "helper_lost"]
        assert all(process.poll() is not None for process in helpers.processes)


def test_helpers_end_with_the_phase_and_with_a_killed_worker(team, tmp_path: Path) -> None:
    some, _ = team()

    def stage() -> None:
        with some.working() as helpers:
            helpers.share(Path("one"))
            raise RuntimeError("the stage failed")

    with pytest.raises(RuntimeError, match="the stage failed"):
        stage()
    assert all(process.poll() is not None for process in some.processes)
    code = """
import sys
from pathlib import Path
from opd_mcp.schemas.recipes import RuntimeRecipe
from opd_mcp.worker.teams.helpers import HelperTeam

team = HelperTeam([None], RuntimeRecipe(), Path(sys.argv[1]), print)
with team.working():
    team.share(Path("nowhere"))
    print(team.processes[0].pid, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        helper = psutil.Process(int(worker.stdout.readline()))
        worker.kill()
    assert helper.wait(timeout=30) is None or not helper.is_running()

"""Parts of one job: each is computed once, whoever computes them, and a dead process's by another."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opd_mcp.engine.context import Context
from opd_mcp.engine.parts import Job, claimed, computed_together, part_file, work_off
from opd_mcp.schemas.errors import RunError

JOB = Job(kind="score", model=Path("m"), form="plain", parts=6, settings={})
# eight processes, one of which dies at its first part; each part that was computed is a line of the log
CLAIMERS = """
import os, signal, sys, traceback
from pathlib import Path
import numpy as np
from opd_mcp.engine.parts import work_off

folder, log, parts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def compute(number):
    if claimer == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{number} {claimer}\\n".encode())
    os.close(descriptor)
    return {"number": np.array([number])}

for claimer in range(8):
    if os.fork() == 0:
        try:
            work_off(folder, parts, compute)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
print([os.wait()[1] for _ in range(8)].count(signal.SIGKILL))
"""


class Alone:
    """Helpers of whom nobody ever comes."""

    def __init__(self, folder: Path, patience: float = 60.0) -> None:
        self.folder, self.patience, self.count = folder, patience, 3
        self.jobs: list[Path] = []
        self.given_up = False

    def share(self, job: Path) -> None:
        self.jobs.append(job)

    def check(self) -> None:
        pass

    def give_up(self) -> None:
        self.given_up = True


def test_of_eight_claimers_one_owns_each_part_and_a_dead_ones_part_is_computed_by_another(tmp_path: Path) -> None:
    parts, log = 100, tmp_path / "log"
    log.touch()
    command = [sys.executable, "-c", CLAIMERS, str(tmp_path), str(log), str(parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
    computed = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    assert sorted(number for number, _ in computed) == list(range(parts))
    assert all(part_file(tmp_path, number).is_file() for number in range(parts))


def test_one_process_computes_all_parts_in_order_and_leaves_no_job(tmp_path: Path) -> None:
    helpers, heard = Alone(tmp_path), []
    context = Context(helpers=helpers)
    rows = {"ids": np.arange(6)}
    found = computed_together(JOB, rows, lambda number: {"n": rows["ids"][number : number + 1]}, context, heard.append)
    assert [int(part["n"][0]) for part in found] == [0, 1, 2, 3, 4, 5]
    assert heard == [1, 2, 3, 4, 5, 6]
    assert len(helpers.jobs) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_another_process_is_at_is_waited_for_until_patience_ends(tmp_path: Path) -> None:
    helpers = Alone(tmp_path, patience=0.0)
    held = []

    def share(job: Path) -> None:
        held.append(claimed(part_file(job, 3)))
        assert held[0].__enter__()
        with claimed(part_file(job, 3)) as again:
            assert not again

    def give_up() -> None:
        if not helpers.given_up:
            helpers.given_up = True
            held[0].__exit__(None, None, None)

    helpers.share, helpers.give_up = share, give_up
    found = computed_together(JOB, {}, lambda number: {"n": np.array([number])}, Context(helpers=helpers))
    assert helpers.given_up
    assert [int(part["n"][0]) for part in found] == [0, 1, 2, 3, 4, 5]


def test_a_cancel_ends_the_job(tmp_path: Path) -> None:
    context = Context(helpers=Alone(tmp_path))
    context.reporter.should_stop = lambda: True
    with pytest.raises(RunError, match="run_cancelled"):
        computed_together(JOB, {}, lambda number: {"n": np.array([number])}, context)
    assert list(tmp_path.iterdir()) == []


def test_a_job_whose_folder_is_gone_is_over(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()

    def compute(number: int) -> dict[str, np.ndarray]:
        folder.rename(tmp_path / "gone")
        return {"n": np.array([number])}

    with pytest.raises(FileNotFoundError):
        work_off(folder, 2, compute)
    assert not any(path.suffix == ".safetensors" for path in (tmp_path / "gone").iterdir())

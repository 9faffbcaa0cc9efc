"""The processes that the chaos test starts; each runs this file, never a person.

- `python processes.py worker PLAN LOG RUN_ID --workspace …`: the real worker over failpoints, with the command line of
  `opd-mcp worker` after the plan and the log.
- `python processes.py server ROOT PLAN LOG`: the real stdio server over failpoints, with idle workers. SIGUSR1 makes it
  read the plan: from then on hits count.
- `python processes.py idle SECONDS RUN_ID --workspace …`: a worker that computes nothing. It holds the run's lock
  or renews its heartbeat, keeps its journal, and ends after these seconds or on a cancel request.
- `python processes.py hanging HOW RUN_ID --workspace …`: the real worker with a stage that hangs as the file HOW says
  (one of `HANGS`), or is over at once where there is no such file.

Failpoints lie under the standard library, so opd_mcp is imported only once they are installed.
"""

import argparse
import atexit
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.chaos.failpoints import Failpoints, Plan, install, patch_native_writers

IDLE_SECONDS = 60.0


def command(kind: str, *arguments: object) -> tuple[str, ...]:
    """The command line that starts one of the processes."""
    return (sys.executable, str(Path(__file__).resolve()), kind, *map(str, arguments))


def failing_worker(plan_file: Path, log: Path, rest: list[str]) -> None:
    """The real worker; ends with its exit status, if the plan lets it."""
    plan = Plan(**json.loads(plan_file.read_text(encoding="utf-8"))) if plan_file.exists() else None
    points = install(plan, log)
    points.note("started")
    from opd_mcp.worker import main as worker

    load = worker.engine_stages

    def engine_over_failpoints() -> object:
        stages = load()
        patch_native_writers(points)
        return stages

    settings = worker.WorkerSettings.__init__
    settings.__defaults__ = tuple(  # the command line gives no stages of its own
        engine_over_failpoints if value is load else value for value in settings.__defaults__ or ()
    )
    sys.argv = ["opd-mcp", "worker", *rest]
    from opd_mcp.cli import main as command_line

    command_line()


def failing_server(root: Path, plan_file: Path, log: Path) -> None:
    """The real server; serves until the client closes stdin, or the plan ends it."""
    points = install(None, log)

    def arm(*_: Any) -> None:
        points.plan, points.hits = Plan(**json.loads(plan_file.read_text(encoding="utf-8"))), 0
        points.note("armed")

    signal.signal(signal.SIGUSR1, arm)
    _patch_launch(points)
    from opd_mcp.devices.settings import JobSettings
    from opd_mcp.server.serve import ServerSettings, serve_stdio
    from opd_mcp.service import JobService
    from opd_mcp.store.roots import AllowedRoots
    from opd_mcp.store.workspace import Workspace

    idle = command("idle", IDLE_SECONDS)
    settings = JobSettings(lease_folder=root / "leases", cpu_slots=2, worker_command=idle)
    points.note("started")
    serve_stdio(lambda: JobService(Workspace(root / "home"), AllowedRoots([]), settings), ServerSettings())


def _patch_launch(points: Failpoints) -> None:
    """Put a failpoint under the start of a worker process."""
    start = subprocess.Popen.__init__

    def failing_start(self: Any, *given: Any, **named: Any) -> None:
        points.around("launch", lambda: start(self, *given, **named), needs_space=False)

    subprocess.Popen.__init__ = failing_start  # type: ignore[method-assign]


def idle_worker(words: list[str]) -> None:
    """A run that writes three metrics, waits, and succeeds, or is cancelled on request."""
    from opd_mcp.store.claims import RunClaim
    from opd_mcp.store.runs import RunLock, taken_up

    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float)
    parser.add_argument("run_id")
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--lock-fd", type=int)
    parser.add_argument("--ticket")
    given, _ = parser.parse_known_args(words)
    directory = given.workspace / "runs" / given.run_id
    end = time.monotonic() + given.seconds
    if given.ticket is not None:
        right: RunClaim | RunLock = RunClaim.begun_by(directory, given.ticket, 0).beating()
    else:
        right = RunLock.adopt(directory, given.lock_fd)
    with right, taken_up(right) as journal:
        journal.append("state", {"state": "running"})
        journal.append("phase", {"phase": "sft", "event": "started"})
        for step in range(1, 4):
            journal.append("metric", {"step": step, "values": {"loss": 1.0 / step}}, durable=False)
        while time.monotonic() < end and not (directory / "cancel").exists():
            time.sleep(0.05)
        stopped = (directory / "cancel").exists()
        journal.append("state", {"state": "cancelled" if stopped else "succeeded"})


def hanging_worker(how: Path, words: list[str]) -> None:
    """The real worker, whose stage is not the engine's; ends with the worker's exit status."""
    from opd_mcp.cli import main as command_line
    from opd_mcp.schemas.reports import StageCost
    from opd_mcp.worker import main as worker

    class HangingStages:
        def sample(self, section: Any, inputs: Any, output: Path, context: Any) -> StageCost:
            if how.exists():
                hang = HANGS[how.read_text(encoding="utf-8")]
                how.with_suffix(".begun").touch()
                hang()
            output.mkdir()
            (output / "samples.json").write_text("[]", encoding="utf-8")
            return StageCost(stage="sample", seconds=0.0)

    settings = worker.WorkerSettings.__init__
    settings.__defaults__ = tuple(  # the command line gives no stages of its own
        HangingStages if value is worker.engine_stages else value for value in settings.__defaults__ or ()
    )
    sys.argv = ["opd-mcp", "worker", *words]
    command_line()


def native() -> None:
    """A comparison that takes years, in one call that holds the interpreter's lock."""
    one, other = [0] * 10_000, [0] * 10_000
    for _ in range(6):
        one, other = [one] * 10_000, [other] * 10_000
    assert one == other


def blocked() -> None:
    """Every signal that can be blocked is."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    busy()


def busy() -> None:
    """Python code that asks nobody."""
    while True:
        time.sleep(0.01)


def never_exits() -> None:
    """The run ends, its process does not."""
    atexit.register(native)


HANGS: dict[str, Callable[[], None]] = {
    "native": native,
    "blocked": blocked,
    "busy": busy,
    "never_exits": never_exits,
}

if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    match kind:
        case "worker":
            failing_worker(Path(words[0]), Path(words[1]), words[2:])
        case "server":
            failing_server(*map(Path, words[:3]))
        case "idle":
            idle_worker(words)
        case "hanging":
            hanging_worker(Path(words[0]), words[1:])
        case _:
            sys.exit(f"{kind} is not worker, server, idle or hanging.")

"""Whether a worker still answers, how one that does not is ended, and why one ended without a final state."""

import re
import signal
import time
from pathlib import Path

from opd_mcp.planning.costs.admission import MEMORY_OVERRIDE
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.runs import ACTIVE_STATES, Alert, Failure
from opd_mcp.store.claims import is_placed, newest_attempt, read_beginning, read_ending
from opd_mcp.store.logs import log_tail
from opd_mcp.store.run_view import RunView, seconds_of
from opd_mcp.store.runs import LOG_FILE
from opd_mcp.store.worker_process import (
    WORKER_FILE,
    WorkerExit,
    WorkerProcess,
    WorkerStop,
    boot_id,
    conclude,
    live_worker,
    oom_kills,
    read_process_record,
    signal_worker,
    stop_of,
    stopped_worker,
)

# How many grace times after a request the worker's guardian must have acted; after that it is gone itself.
LATE = 1.5
END_SECONDS = 2.0
# Where the kernel has no boot id, the time of the start stands for it; corrections of the clock move it a little.
BOOT_SECONDS = 120.0


def attend(view: RunView, grace: float) -> None:
    """Do for an active or lost run what its worker's guardian should have done, and refresh the view.

    A worker that has not answered a cancel request gets SIGTERM, later SIGKILL; then the run gets its final state.
    """
    directory, attempt = view.directory, view.attempt
    if view.state == "lost" and stop_of(directory, attempt) is not None:
        conclude(directory, attempt)  # or its guardian has, since this view was read
        view.refresh()
    if view.cancel_requested is None or time.time() - seconds_of(view.cancel_requested) < LATE * grace:
        return
    worker = live_worker(directory, attempt)
    stop = stop_of(directory, attempt) or WorkerStop(attempt=attempt, cause="cancel")
    if worker is None or stop.sigkill is not None:
        return
    if stop.sigterm is None:
        signal_worker(directory, worker, signal.SIGTERM, stop)
    elif time.time() - seconds_of(stop.sigterm) >= LATE * grace:
        signal_worker(directory, worker, signal.SIGKILL, stop)
        end = time.monotonic() + END_SECONDS
        while not conclude(directory, attempt) and time.monotonic() < end:
            time.sleep(0.02)
        view.refresh()


def worker_alert(view: RunView) -> Alert | None:
    """What is wrong with the process of an active run now: stopped, or killed and still there; else None."""
    if view.state not in ACTIVE_STATES:
        return None
    at, pid = view.updated_at or "", stopped_worker(view.directory, view.attempt)
    if pid is not None:
        message = (
            f"The worker (pid {pid}) was stopped by a signal or a debugger: it computes nothing and keeps its device. "
            f"`kill -CONT {pid}` continues it; a cancel ends it."
        )
        return Alert(time=at, code="worker_stopped", message=message)
    stop = stop_of(view.directory, view.attempt)
    if stop is None or stop.sigkill is None:
        return None
    message = f"{stop.text()} It waits in the kernel, on a disk or a driver, and ends with that wait or a restart."
    return Alert(time=at, code="worker_stuck", message=message)


class Loss(Schema):
    """Why a worker is gone, as far as it is known; `out_of_memory` where the kernel's counter makes that likely."""

    cause: str
    out_of_memory: bool = False


def lost_failure(directory: Path, attempt: int) -> Failure:
    """The failure of a run whose process ended without a final state, with its cause as far as it is known."""
    loss = loss_of(directory, attempt)
    fix = "Resume the run: it continues from its last checkpoint; a phase without one starts again."
    if loss.out_of_memory:
        fix += " Wait until memory is free, or start again with the suggested overrides."
    return Failure(
        code="worker_lost",
        cause=loss.cause,
        fix=fix,
        call=resume_call(directory.name),
        override=dict(MEMORY_OVERRIDE) if loss.out_of_memory else None,
        log_tail=log_tail(directory / LOG_FILE),
    )


def loss_of(directory: Path, attempt: int) -> Loss:
    """Why the worker of an attempt ended without a final state, in one or two sentences."""
    if is_placed(directory):
        return _placed_loss(directory, attempt)
    worker = read_process_record(directory / WORKER_FILE, WorkerProcess, attempt)
    ended = read_process_record(directory / f"exit-{attempt}.json", WorkerExit, attempt)
    if worker is not None and not same_boot(worker.boot, boot_id()):
        return Loss(cause="The machine was restarted while the run was going.")
    stop = stop_of(directory, attempt)
    if stop is not None and stop.sigkill is not None:
        return Loss(cause=stop.text())
    kills = _kills_since(worker, ended)
    # The counter is the group's, which other processes may be in as well; it does not say whom it was.
    known = (
        f" The kernel's out-of-memory killer ended {kills} process{'es' if kills > 1 else ''} of its control group "
        f"{'meanwhile' if ended else 'since it began'}."
    )
    if ended is None:
        cause = "The worker process ended without finishing, and no server saw how: it was killed, or crashed."
        return Loss(cause=cause + (known if kills else ""), out_of_memory=bool(kills))
    if ended.signal is None:
        return Loss(cause=f"The worker process ended with exit code {ended.exit_code} and no final state.")
    name = signal_name(ended.signal)
    cause = f"The worker process was ended by signal {ended.signal} ({name})."
    killed = kills > 0 and ended.signal == signal.SIGKILL  # the killer's signal; another one has another cause
    return Loss(cause=cause + (known if killed else ""), out_of_memory=killed)


def _placed_loss(directory: Path, attempt: int) -> Loss:
    newest = newest_attempt(directory)
    ending, stop = read_ending(directory, newest), stop_of(directory, attempt)
    if stop is not None and stop.sigkill is not None:
        return Loss(cause=stop.text())
    if ending is not None:
        return Loss(cause=ending.cause)
    begun = read_beginning(directory, newest)
    where = f" on {begun.host}" if begun else ""
    return Loss(cause=f"The worker{where} has given no sign of life for longer than its lease.")


def same_boot(one: str, other: str) -> bool:
    """Whether two boot ids are of the same start of the machine."""
    times = [re.fullmatch(r"at (\d+)", text) for text in (one, other)]
    if times[0] and times[1]:
        return abs(float(times[0][1]) - float(times[1][1])) < BOOT_SECONDS
    return one == other


def signal_name(number: int) -> str:
    """A signal's name, e.g. SIGKILL; its number where it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _kills_since(worker: WorkerProcess | None, ended: WorkerExit | None) -> int:
    if worker is None or worker.oom_kills is None or worker.oom_counter is None:
        return 0
    now = ended.oom_kills if ended else oom_kills(Path(worker.oom_counter))
    return max((now or 0) - worker.oom_kills, 0)

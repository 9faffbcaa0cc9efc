"""How a worker's process began and ended: the evidence once its lock is free and no final state was written.

`worker.json` is written by the worker itself; `exit-<attempt>.json` by the server that launched it, once it has reaped
the process; `stop-<attempt>.json` by the process that signals a worker which does not end by itself, before the signal.
None of them decides whether a run is alive: its lock does.
"""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

import psutil
from pydantic import ValidationError

from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.base import Record
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.runs import ACTIVE_STATES, Failure
from opd_mcp.store.claims import RunClaim, is_placed, newest_attempt, read_submission
from opd_mcp.store.journal import utc_now
from opd_mcp.store.logs import log_tail
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import LOG_FILE, RunLock, cancel_requested, taken_up

WORKER_FILE = "worker.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


class WorkerProcess(Record):
    """`worker.json`: the process that makes an attempt; pid and start time together name one process of a boot."""

    attempt: int
    pid: int
    started: float
    boot: str
    oom_counter: str | None = None
    oom_kills: int | None = None


class WorkerExit(Record):
    """`exit-<attempt>.json`: how the process ended, as its parent saw it."""

    attempt: int
    exit_code: int | None = None
    signal: int | None = None
    oom_kills: int | None = None
    time: str


StopCause = Literal["cancel", "sigterm", "too_slow", "out_of_hours"]


class WorkerStop(Record):
    """`stop-<attempt>.json`: why a worker had to end and did not, which signals it was sent, and when."""

    attempt: int
    cause: StopCause
    sigterm: str | None = None
    sigkill: str | None = None

    def text(self) -> str:
        """What the journal says of it."""
        sent = [f"{name} at {at}" for name, at in (("SIGTERM", self.sigterm), ("SIGKILL", self.sigkill)) if at]
        return f"{UNANSWERED[self.cause]}; it was sent {' and '.join(sent)}."


UNANSWERED: dict[StopCause, str] = {
    "cancel": "The worker did not answer the cancel request",
    "sigterm": "The worker received SIGTERM and did not end",
    "too_slow": "A native call in the worker used far more processor time than its work may take",
    "out_of_hours": "The run was over max_gpu_hours and its worker did not end",
}
RESUMES = "Resume the run: it continues from its last checkpoint; a phase without one starts again."
FAILURES: dict[StopCause, tuple[str, str]] = {
    "cancel": ("worker_terminated", RESUMES),
    "sigterm": ("worker_terminated", RESUMES),
    "too_slow": (
        "too_slow",
        "Look at the chat template and the tokenizer of the models, and at the longest texts in the data; the end of "
        "the log shows the phase.",
    ),
    "out_of_hours": ("quota_exceeded", "Raise quotas.max_gpu_hours in the workspace's settings.toml, then resume."),
}
RecordT = TypeVar("RecordT", WorkerProcess, WorkerExit, WorkerStop)


def note_start(directory: Path, attempt: int, cgroups: Path = CGROUPS, own: Path = OWN_GROUPS) -> None:
    """Record this process as the worker of a run's attempt; for the holder of the run's lock.

    `cgroups` is where the kernel lists memory groups; `own` names those of this process.
    """
    counter = oom_counter(cgroups, own)
    me = WorkerProcess(
        attempt=attempt,
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        boot=boot_id(),
        oom_counter=str(counter) if counter else None,
        oom_kills=oom_kills(counter),
    )
    write_atomic(directory / WORKER_FILE, me.sealed().to_json(indent=2) + "\n")


def has_begun(view: RunView) -> bool:
    """Whether a worker has adopted the run's attempt, so that it continues without the process that began it."""
    return (
        view.written != "queued"
        or (is_placed(view.directory) and read_submission(view.directory, view.attempt) is not None)
        or read_process_record(view.directory / WORKER_FILE, WorkerProcess, view.attempt) is not None
    )


def note_exit(directory: Path, attempt: int, returncode: int) -> None:
    """Record how a reaped worker ended (`returncode` as `Popen` has it); nothing for one that ended normally."""
    if returncode == 0:
        return
    worker = read_process_record(directory / WORKER_FILE, WorkerProcess, attempt)
    ended = WorkerExit(
        attempt=attempt,
        exit_code=returncode if returncode >= 0 else None,
        signal=-returncode if returncode < 0 else None,
        oom_kills=oom_kills(Path(worker.oom_counter)) if worker and worker.oom_counter else None,
        time=utc_now(),
    )
    with suppress(OSError):  # on a full disk the cause is lost; the answer must not be
        write_atomic(directory / f"exit-{attempt}.json", ended.sealed().to_json(indent=2) + "\n")


def live_worker(directory: Path, attempt: int) -> psutil.Process | None:
    """The process that makes the attempt, by pid, start time and boot; None when it is gone or unknown."""
    worker = read_process_record(directory / WORKER_FILE, WorkerProcess, attempt)
    if worker is None or worker.boot != boot_id():
        return None
    try:
        process = psutil.Process(worker.pid)
        return process if process.create_time() == worker.started else None
    except psutil.Error:
        return None


def stopped_worker(directory: Path, attempt: int) -> int | None:
    """The pid of the attempt's worker if it is stopped (SIGSTOP, or a debugger holds it)."""
    process = live_worker(directory, attempt)
    try:
        halted = process is not None and process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return None
    return process.pid if process is not None and halted else None


def signal_worker(directory: Path, process: psutil.Process, number: signal.Signals, stop: WorkerStop) -> WorkerStop:
    """Send SIGTERM to a worker, or SIGKILL to its process group; `stop` with that noted is on the disk before.

    A stopped worker is continued after SIGTERM, so that it can answer. A group that the worker does not lead is left
    alone: then the worker was started by hand and shares the group with others.
    """
    known = stop_of(directory, stop.attempt) or stop  # the guardian and a server may both signal the worker
    noted = known.model_copy(update={number.name.lower(): utc_now()})
    with suppress(OSError):  # on a full disk the cause is lost; the worker must end all the same
        write_atomic(stop_file(directory, stop.attempt), noted.sealed().to_json(indent=2) + "\n")
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if number == signal.SIGKILL and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)  # looks at the start time once more
        if number == signal.SIGTERM:
            process.send_signal(signal.SIGCONT)
    return noted


def stop_file(directory: Path, attempt: int) -> Path:
    """Where it stands how an attempt's worker was ended by signals."""
    return directory / f"stop-{attempt}.json"


def stop_of(directory: Path, attempt: int) -> WorkerStop | None:
    """Which signals the attempt's worker was sent since it did not end by itself; None for one that was sent none."""
    return read_process_record(stop_file(directory, attempt), WorkerStop, attempt)


def conclude(directory: Path, attempt: int) -> bool:
    """Write the final state of a run whose worker died of a signal sent here; False while its lock is held.

    The lock is free once the worker is gone; what is written ends the worker's own attempt. Nothing is written where
    the run has ended or begun another attempt meanwhile.
    """
    stop = stop_of(directory, attempt)
    if stop is None:
        return True
    lock: RunLock | RunClaim
    if is_placed(directory):
        if live_worker(directory, attempt) is not None:
            return False
        lock = RunClaim(directory, newest_attempt(directory))
    else:
        try:
            lock = RunLock.acquire(directory)
        except RunError:
            return False
    with lock:
        view = RunView(directory).fold()
        if view.attempt != attempt or view.written not in ACTIVE_STATES:
            return True
        with taken_up(lock) as journal:
            journal.append("alert", {"code": "worker_killed", "message": stop.text()})
            cancelled = cancel_requested(directory)
            if not cancelled:
                code, fix = FAILURES[stop.cause]
                call = resume_call(directory.name) if code == "worker_terminated" else None
                failure = Failure(
                    code=code, cause=stop.text(), fix=fix, call=call, log_tail=log_tail(directory / LOG_FILE)
                )
                journal.append("error", failure.to_dict())
            journal.append("state", {"state": "cancelled" if cancelled else "failed"})
    return True


def boot_id() -> str:
    """An identifier of this boot of the machine."""
    if _BOOT_ID.exists():
        return _BOOT_ID.read_text().strip()
    return f"at {psutil.boot_time():.0f}"


def oom_counter(cgroups: Path = CGROUPS, own: Path = OWN_GROUPS) -> Path | None:
    """The file in which the kernel counts out-of-memory kills of this process's memory group (cgroup v2 or v1)."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    parts = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    groups = {controller: path for _, controllers, path in parts for controller in controllers.split(",")}
    below = {name: groups.get(name, "/").strip("/") for name in ("", "memory")}
    places = [
        cgroups / "memory" / below["memory"] / "memory.oom_control",
        cgroups / below[""] / "memory.events",
        # In a container the paths are those outside it, and its own group is the root.
        cgroups / "memory" / "memory.oom_control",
        cgroups / "memory.events",
    ]
    return next((place for place in places if oom_kills(place) is not None), None)


def oom_kills(counter: Path | None) -> int | None:
    """The count in a counter file; None if there is none."""
    try:
        text = counter.read_text() if counter else ""
    except OSError:
        return None
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def read_process_record(file: Path, kind: type[RecordT], attempt: int) -> RecordT | None:
    """The record in a file, if it is that of the attempt; None where there is none or it cannot be read."""
    try:
        found = kind.from_json(file.read_bytes())
    except (OSError, ValidationError):
        return None  # unknown is absent
    return found if found.attempt == attempt else None

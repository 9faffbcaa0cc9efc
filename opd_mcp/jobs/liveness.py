"""How a worker's process began and ended: what its run says once nobody holds the lock and no final state was written.

`worker.json` is written by the worker itself; `exit-<attempt>.json` by the server that launched it, once it has reaped
the process. Neither decides whether a run is alive: its lock does.
"""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
from pydantic import ValidationError

from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.base import Record, Schema
from opd_mcp.store.journal import utc_now
from opd_mcp.store.view import RunView

WORKER_FILE = "worker.json"
# Where the kernel has no boot id, the time of the start stands for it; corrections of the clock move it a little.
BOOT_SECONDS = 120.0
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
    """`exit-<attempt>.json`: how the process ended, as its parent was told."""

    attempt: int
    exit_code: int | None = None
    signal: int | None = None
    oom_kills: int | None = None
    time: str


RecordT = TypeVar("RecordT", WorkerProcess, WorkerExit)


class Loss(Schema):
    """Why a worker is gone, as far as it is known; `out_of_memory` where the kernel's counter makes that likely."""

    cause: str
    out_of_memory: bool = False


def note_start(directory: Path, attempt: int, cgroups: Path = CGROUPS, own: Path = OWN_GROUPS) -> None:
    """Record this process as the worker of a run's attempt; for the holder of the run's lock.

    `cgroups` and `own` are where the kernel tells of memory groups and of those that this process is in.
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
    """Whether a worker has taken up the run's attempt, so that it goes on without whoever began it."""
    return view.written != "queued" or _read(view.directory / WORKER_FILE, WorkerProcess, view.attempt) is not None


def note_exit(directory: Path, attempt: int, returncode: int) -> None:
    """Record how a reaped worker ended (`returncode` as `Popen` has it); nothing for one that did as it should."""
    if returncode == 0:
        return
    worker = _read(directory / WORKER_FILE, WorkerProcess, attempt)
    ended = WorkerExit(
        attempt=attempt,
        exit_code=returncode if returncode >= 0 else None,
        signal=-returncode if returncode < 0 else None,
        oom_kills=oom_kills(Path(worker.oom_counter)) if worker and worker.oom_counter else None,
        time=utc_now(),
    )
    with suppress(OSError):  # a full disk costs the cause, and must not cost the answer
        write_atomic(directory / f"exit-{attempt}.json", ended.sealed().to_json(indent=2) + "\n")


def loss_of(directory: Path, attempt: int) -> Loss:
    """Why the worker of an attempt ended without a final state, in one or two sentences."""
    worker = _read(directory / WORKER_FILE, WorkerProcess, attempt)
    ended = _read(directory / f"exit-{attempt}.json", WorkerExit, attempt)
    if worker is not None and not same_boot(worker.boot, boot_id()):
        return Loss(cause="The machine was restarted while the run was going.")
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


def boot_id() -> str:
    """What tells this start of the machine from any other one."""
    if _BOOT_ID.exists():
        return _BOOT_ID.read_text().strip()
    return f"at {psutil.boot_time():.0f}"


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
        # In a container the paths are those outside of it, and its own group is the root.
        cgroups / "memory" / "memory.oom_control",
        cgroups / "memory.events",
    ]
    return next((place for place in places if oom_kills(place) is not None), None)


def oom_kills(counter: Path | None) -> int | None:
    """What a counter file says; None where it says nothing."""
    try:
        text = counter.read_text() if counter else ""
    except OSError:
        return None
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def _kills_since(worker: WorkerProcess | None, ended: WorkerExit | None) -> int:
    if worker is None or worker.oom_kills is None or worker.oom_counter is None:
        return 0
    now = ended.oom_kills if ended else oom_kills(Path(worker.oom_counter))
    return max((now or 0) - worker.oom_kills, 0)


def _read(file: Path, kind: type[RecordT], attempt: int) -> RecordT | None:
    try:
        found = kind.from_json(file.read_bytes())
    except (OSError, ValidationError):
        return None  # unknown is absent
    return found if found.attempt == attempt else None

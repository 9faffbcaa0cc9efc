"""How a worker's process began and ended: the evidence once its lock is free and no final state was written.

`worker.json` is written by the worker itself; `exit-<attempt>.json` by the server that launched it, once it has reaped
the process. Neither decides whether a run is alive: its lock does.
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
from pydantic import ValidationError

from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.base import Record
from opd_mcp.store.journal import utc_now
from opd_mcp.store.run_view import RunView

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


RecordT = TypeVar("RecordT", WorkerProcess, WorkerExit)


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

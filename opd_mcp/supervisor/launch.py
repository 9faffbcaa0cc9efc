"""From a queued run to its detached worker process.

The command line is `opd-mcp worker RUN_ID --workspace PATH --lock-fd N --lease-folder PATH --cpu-slots N`, with this
Python and not by way of a shell or PATH; it ends in `opd_mcp.worker.main.main`, whose answer is the exit status.
"""

import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.errors import RunError
from opd_mcp.store.logs import open_log
from opd_mcp.store.runs import LOG_FILE, RunLock
from opd_mcp.store.worker_process import note_exit
from opd_mcp.store.workspace import Workspace


def worker_command(workspace: Workspace, run_id: str, lock_fd: int, settings: JobSettings) -> list[str]:
    """The worker's argument list."""
    return [
        *(*settings.worker_command, run_id),
        *("--workspace", str(workspace.root)),
        *("--lock-fd", str(lock_fd)),
        *("--lease-folder", str(settings.lease_folder)),
        *("--cpu-slots", str(settings.cpu_slots)),
    ]


def launch_worker(workspace: Workspace, lock: RunLock, settings: JobSettings) -> subprocess.Popen[bytes]:
    """The run's detached process, which inherits the lock; the caller's copy is closed.

    The lock never goes free in between, so a queued run never looks lost. Raises RunError `launch_failed`.
    """
    run_id = lock.directory.name
    try:
        with open_log(lock.directory / LOG_FILE) as log:
            return subprocess.Popen(
                worker_command(workspace, run_id, lock.descriptor, settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=lock.directory,
                start_new_session=True,
                pass_fds=(lock.descriptor,),
                # Python's own way of finding this package must survive the change of folder.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(absolute_import_path()), "PYTHONUNBUFFERED": "1"},
            )
    except OSError as error:
        raise RunError(
            "launch_failed",
            f"The worker process could not be started ({error}).",
            value=run_id,
            fix="Check the machine's process and memory limits, then start again.",
        ) from error
    finally:
        lock.release()


def absolute_import_path() -> list[str]:
    """The PYTHONPATH of this process with every entry absolute."""
    given = os.environ.get("PYTHONPATH", "")
    return [str(Path(entry).absolute()) for entry in given.split(os.pathsep) if entry]


# Between freeing its locks and becoming a zombie, a process takes microseconds; a loaded machine a little longer.
SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Child:
    """A worker process and the attempt that it makes."""

    directory: Path
    attempt: int
    process: subprocess.Popen[bytes]


class Children:
    """The workers of one server; safe to share between threads."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._lock = threading.Lock()

    def add(self, directory: Path, attempt: int, process: subprocess.Popen[bytes]) -> None:
        """Watch over a worker that was just launched."""
        with self._lock:
            self._children.append(Child(directory, attempt, process))

    def reap(self) -> None:
        """Take the exit status of every worker that has ended; until somebody does, it stays a zombie."""
        with self._lock:
            ended = [child for child in self._children if child.process.poll() is not None]
            self._children = [child for child in self._children if child not in ended]
            for child in ended:
                note_exit(child.directory, child.attempt, child.process.returncode)

    def settle(self, directory: Path) -> None:
        """Wait for the worker of a run whose lock is free: it is about to be reapable."""
        with self._lock:
            mine = [child.process for child in self._children if child.directory == directory]
        for process in mine:
            try:
                process.wait(SETTLE_SECONDS)
            except subprocess.TimeoutExpired:
                continue  # suspended, and its lock was taken from it
        self.reap()

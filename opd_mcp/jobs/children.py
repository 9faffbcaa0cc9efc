"""The workers that this server launched: reaped when they have ended, and their ends recorded."""

import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.jobs.liveness import note_exit

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

"""The guardian: a small process next to a worker, which ends it when it does not end by itself.

It holds no lock, is in a session of its own, and loads only the standard library until it must act. It sees the cancel
request, and through a pipe the number of every signal that reaches the worker: the interpreter's own handler writes
it, also while a native call never returns to Python. It ends with the worker.

    cancel request ── grace ──► SIGTERM ── grace ──► SIGKILL for the worker's process group
    SIGTERM from others, or the end of its hours ── grace ──► SIGKILL
    processor time over (SIGVTALRM, once per second until Python runs again) ── grace ──► SIGKILL
    final state written ── grace ──► SIGKILL

After SIGKILL it takes the run's lock, which is then free, and writes what happened and the final state.
"""

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5
FINISHED = 0
# Seconds without SIGVTALRM after which the next one is of another piece of work.
PAUSE_SECONDS = 30.0
CONCLUDE_SECONDS = 10.0
CANCEL_FILE = "cancel"


@dataclass
class Guard:
    """What a guardian knows of its worker, and what is due; times by the monotonic clock."""

    directory: Path
    attempt: int
    worker: int
    grace: float
    cause: str | None = None
    term_at: float | None = None
    kill_at: float | None = None
    expiries: list[float] = field(default_factory=list)

    def ask(self, cause: str, now: float, *, terms: bool = False) -> None:
        """The worker has to end from now on; the first cause stays."""
        if self.cause is None:
            self.cause = cause
        if terms and self.term_at is None:
            self.term_at = now + self.grace
        if not terms and (self.kill_at is None or self.kill_at > now + self.grace):
            self.kill_at = now + self.grace

    def heard(self, number: int, now: float) -> None:
        """A signal reached the worker, or it has written its final state."""
        if number == FINISHED:
            self.ask("finished", now)
        elif number == signal.SIGTERM:
            self.ask("sigterm", now)
        elif number == signal.SIGALRM:
            self.ask("out_of_hours", now)
        elif number == signal.SIGVTALRM:
            if self.expiries and now - self.expiries[-1] > PAUSE_SECONDS:
                self.expiries.clear()
            self.expiries.append(now)
            if len(self.expiries) > self.grace:  # one per second of processor time, and Python ran in none of them
                self.cause, self.kill_at = self.cause or "too_slow", now


def watch(guard: Guard) -> bool:
    """Watch until the worker is gone; whether it was signalled, so that it may have written no final state."""
    poll, listening, killed, signalled = min(POLL_SECONDS, guard.grace / 4), [0], False, False
    while os.getppid() == guard.worker:  # a child learns of its parent's end at once, and no pid is used again before
        if listening and not select.select(listening, [], [], poll)[0]:
            heard = b""
        elif listening:
            heard = os.read(0, 1 << 12)
            listening = listening if heard else []
        else:
            heard = b""
            time.sleep(poll)
        now = time.monotonic()
        for number in heard:
            guard.heard(number, now)
        if guard.cause is None and (guard.directory / CANCEL_FILE).exists():
            guard.ask("cancel", now, terms=True)
        if guard.kill_at is None and guard.term_at is not None and now >= guard.term_at:
            signalled = True
            act(guard, signal.SIGTERM)
            guard.kill_at = time.monotonic() + guard.grace
        if guard.kill_at is not None and now >= guard.kill_at and not killed:
            killed = signalled = True
            act(guard, signal.SIGKILL)
    return signalled and guard.cause != "finished"


def act(guard: Guard, number: signal.Signals) -> None:
    """Send the signal to the worker, noted in its run's directory."""
    import psutil

    from opd_mcp.store.worker_process import WorkerStop, signal_worker, stop_of

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(guard.worker)
        if os.getppid() != guard.worker:
            return
        if guard.cause == "finished":
            process.kill()
            return
        cause: Any = guard.cause
        stop = stop_of(guard.directory, guard.attempt) or WorkerStop(attempt=guard.attempt, cause=cause)
        signal_worker(guard.directory, process, number, stop)


def conclude_soon(guard: Guard) -> None:
    """Write the run's final state as soon as its lock is free."""
    from opd_mcp.store.worker_process import conclude

    end = time.monotonic() + CONCLUDE_SECONDS
    while not conclude(guard.directory, guard.attempt) and time.monotonic() < end:
        time.sleep(0.1)


@contextlib.contextmanager
def guarded(directory: Path, attempt: int, grace: float) -> Iterator[None]:
    """Start the guardian of this process, for the rest of its life; after the block it only has to exit.

    A machine that cannot start another process is no reason to do nothing: then servers and `opd-mcp cancel` end the
    worker.
    """
    facts = {"directory": str(directory), "attempt": attempt, "worker": os.getpid(), "grace": grace}
    # Without `site` it starts in 20 ms; what it imports when it must act is found where this process finds it.
    command = [sys.executable, "-I", "-S", __file__, json.dumps({"guard": facts, "path": sys.path})]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        guardian = subprocess.Popen(command, stdin=reading, start_new_session=True)
    except OSError as error:
        logger.warning("No guardian watches over this worker: %s", error)
        yield
        return
    finally:
        os.close(reading)
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        guardian.returncode = 0  # it outlives this block, and nobody waits for it
        with contextlib.suppress(OSError):  # the guardian was killed
            os.write(writing, bytes([FINISHED]))


def main(given: str) -> None:
    """Guard the worker that the JSON in `given` describes."""
    facts = json.loads(given)
    sys.path[:] = [str(Path(__file__).parents[2]), *facts["path"]]
    described = facts["guard"]
    guard = Guard(**{**described, "directory": Path(described["directory"])})
    if watch(guard):
        conclude_soon(guard)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])

"""Run directories: the immutable record, the lock that shows whether the run is alive, and the cancel request."""

import fcntl
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from opd_mcp.identity.files import fsync_directory, write_atomic
from opd_mcp.schemas.base import first_problem
from opd_mcp.schemas.errors import IntegrityError, RunError, UnknownIdError, nearest
from opd_mcp.schemas.executors import Placing
from opd_mcp.schemas.next_action import next_call
from opd_mcp.schemas.runs import RunRecord
from opd_mcp.store.claims import ATTEMPTS, BeatWatch, RunClaim, is_placed, newest_attempt, placed_alive, read_claim
from opd_mcp.store.journal import JournalWriter, next_attempt, utc_text
from opd_mcp.store.workspace import Workspace, is_id

RECORD_FILE = "run.json"
JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = "lock"
CANCEL_FILE = "cancel"
LOG_FILE = "worker.log"
CHECKPOINTS = "checkpoints"
RESERVE_FILE = "reserve"
RESERVE_BYTES = 64 << 10
# A liveness check holds a shared lock for microseconds; an acquirer waits longer than that.
ACQUIRE_SECONDS = 1.0


def create_run(workspace: Workspace, record: RunRecord) -> Path:
    """Make a run's directory with its record, durably; FileExistsError when the id is taken."""
    directory = workspace.run(record.run_id)
    directory.mkdir(mode=0o700)
    try:
        (directory / CHECKPOINTS).mkdir(mode=0o700)
        (directory / LOCK_FILE).touch(mode=0o600)
        if record.request.executor is not None:
            (directory / ATTEMPTS).mkdir(mode=0o700)
        write_atomic(directory / RECORD_FILE, record.sealed().to_json(indent=2) + "\n")
        fsync_directory(workspace.runs)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def set_reserve(directory: Path) -> None:
    """Reserve bytes, so that a run that a full disk ends can still record this; raises OSError without room."""
    descriptor = os.open(directory / RESERVE_FILE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, os.urandom(RESERVE_BYTES))  # random: no file system can compress it
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def use_reserve(directory: Path) -> None:
    """Give the reserved bytes back to the disk."""
    (directory / RESERVE_FILE).unlink(missing_ok=True)


def read_record(directory: Path) -> RunRecord:
    """A run's record; raises IntegrityError `damaged_file`."""
    file = directory / RECORD_FILE
    try:
        return RunRecord.from_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else error.strerror
        raise IntegrityError(
            "damaged_file",
            f"run.json cannot be used ({why}).",
            value=file,
            fix="Start the run again; its artifacts are still found and reused.",
        ) from error


def run_directory(workspace: Workspace, run_id: str) -> Path:
    """The directory of an existing run; raises UnknownIdError `unknown_run` with the nearest ids."""
    if is_id(run_id) and (workspace.run(run_id) / RECORD_FILE).is_file():
        return workspace.run(run_id)
    raise UnknownIdError(
        "unknown_run",
        "There is no such run in this workspace.",
        value=run_id,
        nearest=nearest(run_id, run_ids(workspace)),
        fix="Give 'latest', or the id or name of a run that is listed.",
        call=next_call("list_runs"),
    )


def run_ids(workspace: Workspace) -> list[str]:
    """The ids of all runs that have a record, sorted."""
    return sorted(path.name for path in workspace.runs.iterdir() if (path / RECORD_FILE).is_file())


def request_cancel(directory: Path) -> None:
    """Ask a run to stop at its next step; a second request changes nothing."""
    if not cancel_requested(directory):
        write_atomic(directory / CANCEL_FILE, "")


def withdraw_cancel(directory: Path) -> None:
    """Remove the cancel request of the previous attempt."""
    (directory / CANCEL_FILE).unlink(missing_ok=True)


def cancel_requested(directory: Path) -> bool:
    """Whether this run was asked to stop."""
    return (directory / CANCEL_FILE).exists()


def cancel_requested_at(directory: Path) -> str | None:
    """When this run was asked to stop, in the journal's form; None without a request."""
    try:
        written = (directory / CANCEL_FILE).stat().st_mtime
    except FileNotFoundError:
        return None
    return utc_text(written)


def is_alive(directory: Path, watch: BeatWatch | None = None) -> bool:
    """Whether a process holds the run's lock now; the kernel frees it when the process ends, however it ends.

    A run on an executor's machines lives by its heartbeats, which `watch` follows; without one, in doubt it lives.
    """
    if is_placed(directory):
        return placed_alive(directory, watch)
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@dataclass
class RunLock:
    """The exclusive lock of a run; `descriptor` may be passed to a child, and the lock lives on in it."""

    directory: Path
    descriptor: int

    @classmethod
    def acquire(cls, directory: Path) -> Self:
        """Take the lock; raises RunError `run_locked` when another process has it."""
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + ACQUIRE_SECONDS
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock = cls(directory, descriptor)
                if lock.holds():
                    return lock
                os.close(descriptor)  # the file was replaced in between
                return cls.acquire(directory)
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise RunError(
                    "run_locked",
                    "Another process is working on this run.",
                    value=directory.name,
                    fix="Follow the run, or cancel it.",
                    call=next_call("get_run_status", run_id=directory.name),
                )
            time.sleep(0.005)

    @classmethod
    def adopt(cls, directory: Path, descriptor: int) -> Self:
        """Adopt the lock that the parent process acquired and passed on; children of this process do not inherit it.

        Raises RunError `run_locked` when the descriptor is not this run's lock, or does not hold it.
        """
        os.set_inheritable(descriptor, False)
        lock = cls(directory, descriptor)
        with suppress(BlockingIOError):
            if lock.holds():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
        raise RunError(
            "run_locked",
            "The descriptor that was handed over is not this run's lock.",
            value=directory.name,
            fix="Start the run again.",
        )

    def holds(self) -> bool:
        """Whether the descriptor still is the run's lock file; a replaced file is another lock."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.directory / LOCK_FILE))
        except OSError:  # the file is gone, or the descriptor is closed
            return False

    def release(self) -> None:
        """Close the descriptor; the lock is free once no other process has it."""
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def claimed_attempt(directory: Path) -> int:
    """The newest attempt that an executor's machines were asked to make; 0 for a run of this machine."""
    return newest_attempt(directory) if is_placed(directory) else 0


def acquire_run(directory: Path, seen: int = 0, placing: Placing | None = None) -> RunLock | RunClaim:
    """The right to begin a run's next attempt, on this machine or as placed; raises RunError `run_locked`.

    `seen` is the `claimed_attempt` that the caller has then found dead.
    """
    if not is_placed(directory):
        return RunLock.acquire(directory)
    before = read_claim(directory, seen) if seen else None
    placing = placing or (before.placing if before else None)
    return RunClaim.after(directory, seen, placing or Placing(executor="", kind="", lease_seconds=1.0))


def begin_attempt(lock: RunLock | RunClaim) -> int:
    """Queue the run durably under the next attempt number, and return it; earlier attempts can no longer write.

    For the process that has just acquired the lock; it may pass the lock on to a process that continues the attempt.
    """
    journal = lock.directory / JOURNAL_FILE
    set_reserve(lock.directory)
    attempt = lock.attempt if isinstance(lock, RunClaim) else next_attempt(journal)
    with JournalWriter(journal, attempt, lock.holds) as writer:
        writer.append("state", {"state": "queued"})
        # An earlier attempt that was suspended between its last check and its rename then has nothing to rename.
        for building in (lock.directory / CHECKPOINTS).glob("*/.building-*"):
            shutil.rmtree(building, ignore_errors=True)
        return writer.attempt


def taken_up(lock: RunLock | RunClaim) -> JournalWriter:
    """The journal of the attempt begun by the process that passed the lock on, or that died as it began it."""
    journal = lock.directory / JOURNAL_FILE
    if isinstance(lock, RunClaim):
        if next_attempt(journal) <= lock.attempt:
            begin_attempt(lock)
        return JournalWriter(journal, lock.attempt, lock.holds)
    return JournalWriter(journal, max(next_attempt(journal) - 1, 1), lock.holds)

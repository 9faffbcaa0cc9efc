"""Who makes an attempt of a run on another machine, and whether it still does: for file systems without trusted locks.

Below `attempts/` of the run's directory, each file made with O_EXCL, so that exactly one process makes it:

    00001.claim   who may make the attempt; the highest number counts, and an earlier attempt may no longer write
    00001.job     where its job is, once it is handed to the executor
    00001.begun   the one process that makes it; until then it waits in the executor's queue
    00001.gone    that nothing makes it any more, and why, as the executor or a launcher said

A claim is always "the attempt that I saw dead, plus one". Whoever makes an attempt renews `heartbeat.json`; it lives
while that changes within the lease by the reader's own clock: no clock of another machine is read. One that is late by
half a lease by its own clock has lost the right to write for good, before anybody else may take it.
"""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from pydantic import ValidationError

from opd_mcp.identity.files import fsync_directory, write_atomic
from opd_mcp.schemas.base import Record
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.executors import Beginning, Claim, Ending, Heartbeat, Placing, Submission
from opd_mcp.schemas.next_action import next_call

logger = logging.getLogger(__name__)
ATTEMPTS = "attempts"
HEARTBEAT_FILE = "heartbeat.json"
BEATS_PER_LEASE = 9
# Of a claim whose maker died before it was written.
UNKNOWN_LEASE = 90.0
RecordT = TypeVar("RecordT", bound=Record)


def is_placed(directory: Path) -> bool:
    """Whether a run is made on an executor's machines; its life is then told by heartbeats, not by its lock."""
    return (directory / ATTEMPTS).is_dir()


def newest_attempt(directory: Path) -> int:
    """The number of the newest claim; 0 where there is none. The folder is listed: NFS remembers missing names."""
    names = os.listdir(directory / ATTEMPTS)
    return max((int(name[:-6]) for name in names if name.endswith(".claim") and name[:-6].isdigit()), default=0)


def read_claim(directory: Path, attempt: int) -> Claim | None:
    """The claim of an attempt; None where its maker died before it was written."""
    return _read(Claim, directory, attempt, "claim")


def read_submission(directory: Path, attempt: int) -> Submission | None:
    """Where the job of an attempt is; None while it is not handed over."""
    return _read(Submission, directory, attempt, "job")


def read_beginning(directory: Path, attempt: int) -> Beginning | None:
    """The process that makes an attempt; None while it waits."""
    return _read(Beginning, directory, attempt, "begun")


def read_ending(directory: Path, attempt: int) -> Ending | None:
    """Why nothing makes an attempt any more; None while that is not known."""
    return _read(Ending, directory, attempt, "gone")


def note_submission(directory: Path, attempt: int, submission: Submission) -> None:
    """Record where the job of an attempt is."""
    write_atomic(_file(directory, attempt, "job"), submission.sealed().to_json() + "\n")


def note_ending(directory: Path, attempt: int, cause: str) -> None:
    """Record that nothing makes an attempt any more; the first cause stays."""
    if read_ending(directory, attempt) is None:
        write_atomic(_file(directory, attempt, "gone"), Ending(cause=cause).sealed().to_json() + "\n")


def begin(directory: Path, attempt: int, life: int = 0) -> bool:
    """Become the one process that makes an attempt; False where another one is."""
    me = Beginning(host=socket.gethostname(), pid=os.getpid(), life=life)
    return _made(_file(directory, attempt, "begun"), me)


class BeatWatch:
    """What one process has seen of heartbeats, by its own clock; safe to share between threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[Path, tuple[object, float]] = {}
        self._lock = threading.Lock()

    def is_fresh(self, directory: Path, sign: object, lease: float) -> bool:
        """Whether a run's sign of life has changed within the lease; one that is seen first has just changed."""
        now = self._clock()
        with self._lock:
            known = self._seen.get(directory)
            if known is None or known[0] != sign:
                self._seen[directory] = sign, now
                return True
            return now - known[1] <= lease


def placed_alive(directory: Path, watch: BeatWatch | None = None) -> bool:
    """Whether the newest attempt waits in its executor's queue or is being made; without a watch, in doubt it is."""
    attempt = newest_attempt(directory)
    if attempt == 0 or read_ending(directory, attempt) is not None:
        return False
    begun = read_beginning(directory, attempt)
    if begun is None and read_submission(directory, attempt) is not None:
        return True  # a queue may take days; that it was left is told by `00001.gone`
    claim = read_claim(directory, attempt)
    lease = claim.placing.lease_seconds if claim else UNKNOWN_LEASE
    return watch is None or watch.is_fresh(directory, (attempt, begun is None, _beat(directory, attempt)), lease)


def _beat(directory: Path, attempt: int) -> int:
    try:
        found = Heartbeat.from_json((directory / HEARTBEAT_FILE).read_bytes())
    except (OSError, ValidationError):
        return 0
    return found.beat if found.attempt == attempt else 0


@dataclass
class RunClaim:
    """The right to make one attempt of a placed run; `holds` until a newer attempt is claimed, or its heart is late."""

    directory: Path
    attempt: int
    heart: "Heart | None" = field(default=None, repr=False)

    @classmethod
    def after(cls, directory: Path, seen: int, placing: Placing, ticket: str | None = None) -> Self:
        """Claim the attempt after the one that was seen dead; raises RunError `run_locked` where another process has.

        `ticket` is that of the job that makes the attempt; by default a new one.
        """
        claim = Claim(attempt=seen + 1, placing=placing, ticket=ticket or secrets.token_hex(8))
        if not _made(_file(directory, seen + 1, "claim"), claim):
            raise _claimed(directory)
        return cls(directory, seen + 1)

    @classmethod
    def begun_by(cls, directory: Path, ticket: str, life: int) -> Self:
        """The attempt that the job with this ticket makes, begun by this process; the next one after its restart.

        Raises RunError `run_locked` where another job or process makes the run.
        """
        attempt = newest_attempt(directory)
        claim = read_claim(directory, attempt) if attempt else None
        if claim is None or claim.ticket != ticket:
            raise _claimed(directory)
        if begin(directory, attempt, life):
            return cls(directory, attempt)
        begun = read_beginning(directory, attempt)
        if begun is None or begun.life >= life:
            raise _claimed(directory)
        # The executor restarts a job only once its processes are gone.
        following = cls.after(directory, attempt, claim.placing, ticket)
        if read := read_submission(directory, attempt):
            note_submission(directory, following.attempt, read)
        if not begin(directory, following.attempt, life):
            raise _claimed(directory)
        return following

    def next(self) -> "RunClaim":
        """The next attempt, claimed for the same job, which is about to be restarted."""
        claim = read_claim(self.directory, self.attempt)
        if claim is None:
            raise _claimed(self.directory)
        following = RunClaim.after(self.directory, self.attempt, claim.placing, claim.ticket)
        if read := read_submission(self.directory, self.attempt):
            note_submission(self.directory, following.attempt, read)
        return following

    def beating(self) -> Self:
        """Renew the heartbeat from now on, until `release`."""
        claim = read_claim(self.directory, self.attempt)
        assert claim is not None, "it was read when the attempt began"
        self.heart = Heart(self.directory, self.attempt, claim.placing.lease_seconds)
        self.heart.start()
        return self

    def holds(self) -> bool:
        """Whether this attempt may still write."""
        return (self.heart is None or self.heart.in_time()) and newest_attempt(self.directory) == self.attempt

    def release(self) -> None:
        """Stop the heartbeat; the claim itself stays."""
        if self.heart is not None:
            self.heart.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Heart:
    """Renews the heartbeat of an attempt from a thread of its own."""

    def __init__(self, directory: Path, attempt: int, lease: float, clock: Callable[[], float] = time.monotonic):
        self.directory = directory
        self.attempt = attempt
        self._lease = lease
        self._clock = clock
        self._beat = 0
        self._last = clock()
        self._late = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="heartbeat", daemon=True)

    def start(self) -> None:
        """The first beat now, the others from the thread."""
        self.renew()
        self._thread.start()

    def stop(self) -> None:
        """No beat after this."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def in_time(self) -> bool:
        """Whether no beat was ever late by more than half a lease."""
        self._late = self._late or self._clock() - self._last > self._lease / 2
        return not self._late

    def renew(self) -> None:
        """One beat, unless it comes too late or a newer attempt has begun."""
        before = self._clock()
        if not self.in_time() or newest_attempt(self.directory) != self.attempt:
            return
        self._beat += 1
        write_atomic(self.directory / HEARTBEAT_FILE, Heartbeat(attempt=self.attempt, beat=self._beat).to_json())
        self._last = before

    def _renew(self) -> None:
        while not self._over.wait(self._lease / BEATS_PER_LEASE):
            try:
                self.renew()
            except OSError as error:  # a disk that is full or hangs: this side notices that it is late
                logger.warning("The heartbeat could not be renewed: %s", error)


def _file(directory: Path, attempt: int, kind: str) -> Path:
    return directory / ATTEMPTS / f"{attempt:05d}.{kind}"


def _made(path: Path, record: Record) -> bool:
    """Make a file that must not be there yet; False where it is."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(record.sealed().to_json() + "\n")
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(path.parent)
    return True


def _read(kind: type[RecordT], directory: Path, attempt: int, name: str) -> RecordT | None:
    try:
        return kind.from_json(_file(directory, attempt, name).read_bytes())
    except (OSError, ValidationError):
        return None  # absent, or not whole yet


def _claimed(directory: Path) -> RunError:
    return RunError(
        "run_locked",
        "Another process is working on this run.",
        value=directory.name,
        fix="Follow the run, or cancel it.",
        call=next_call("get_run_status", run_id=directory.name),
    )

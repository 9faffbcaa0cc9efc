"""The mirror: follows one run's journal and tells one tracker, in a process that the training does not know of.

It sends each line at least once: its place is noted after the tracker has taken it. Steps that a resumed attempt
computes again are not sent again, since they are the same numbers. A tracker that fails is opened again later, and
again, while the run goes on and some hours longer.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field, ValidationError

from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.redaction import environment_secrets, redacted
from opd_mcp.schemas.runs import TrackerName, TrackingSettings
from opd_mcp.store.claims import BeatWatch
from opd_mcp.store.runs import JOURNAL_FILE, is_alive
from opd_mcp.tracking.feed import Entry, Event, JournalFeed, Metrics, TrackedRun, final_figures
from opd_mcp.tracking.trackers import Tracker

logger = logging.getLogger(__name__)
POLL_SECONDS = 2.0
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
BATCH = 500
PROBLEM_CHARACTERS = 500


class Position(Schema):
    """How far a run is mirrored to a tracker, kept next to the mirror's log."""

    tracked_id: str | None = Field(None, description="of the run at the tracker")
    offset: int = Field(0, description="bytes of the journal that the tracker has")
    reached: dict[str, int] = Field(default_factory=dict, description="the last step that it has, by phase")
    complete: bool = Field(False, description="whether the run ended there with all of its lines")
    problem: str | None = Field(None, description="why the tracker does not have the rest")


def read_position(folder: Path, tracker: TrackerName) -> Position:
    """The noted place; the beginning where there is none or it cannot be read."""
    try:
        return Position.from_json((folder / f"{tracker}.json").read_bytes())
    except (OSError, ValidationError):
        return Position()


@dataclass
class Mirror:
    """One run's way to one tracker; `attempt` is the newest one that this mirror sends."""

    directory: Path
    folder: Path
    name: TrackerName
    run: TrackedRun
    open_tracker: Callable[[], Tracker]
    settings: TrackingSettings
    attempt: int
    clock: Callable[[], float] = time.monotonic
    watch: BeatWatch = field(default_factory=BeatWatch)
    _tracker: Tracker | None = None
    _waiting: list[Entry] = field(default_factory=list)
    _failures: int = 0
    _ended_at: float | None = None

    def __post_init__(self) -> None:
        self._feed = JournalFeed(self.directory / JOURNAL_FILE)
        self.position = read_position(self.folder, self.name)

    def look(self) -> float | None:
        """Send what is new; the seconds until the next look, or None once nothing is left to do."""
        alive = is_alive(
            self.directory, self.watch
        )  # before the journal: all that a process wrote before it ended is then seen
        if not self._waiting:
            self._waiting = self._feed.entries(BATCH)
        if self._feed.attempt > self.attempt or not self.directory.is_dir():
            return None  # a newer attempt has a mirror of its own; or the run was deleted
        whole = len(self._waiting) < BATCH
        ended = whole and (self._feed.ended or not alive)
        try:
            self._send()
            if ended:
                self._close()
                return None
        except Exception as error:  # a tracker's package may raise anything, and none of it concerns the run
            return self._pause(error, alive)
        self._failures = 0
        return POLL_SECONDS if whole else 0.0

    def _send(self) -> None:
        if self._tracker is None:
            tracker = self.open_tracker()
            self._note(tracked_id=tracker.open(self.run, self.position.tracked_id), complete=False)
            self._tracker = tracker
        told = [entry.told for entry in self._waiting if entry.told and entry.offset > self.position.offset]
        reached, fresh = dict(self.position.reached), list[Metrics | Event]()
        for item in told:
            if isinstance(item, Metrics):
                if item.step <= reached.get(item.phase, -1):
                    continue
                reached[item.phase] = item.step
            fresh.append(item)
        if fresh:
            self._tracker.send(fresh)
        if self._waiting:
            offset = max(self.position.offset, self._waiting[-1].offset)
            self._note(offset=offset, reached=reached, problem=None)
        self._waiting = []

    def _close(self) -> None:
        assert self._tracker is not None, "it was sent to"
        state = self._feed.state if self._feed.ended else "lost"
        self._tracker.close(str(state), final_figures(self._feed.result))
        self._tracker = None
        self._note(complete=True, problem=None)

    def _pause(self, error: Exception, alive: bool) -> float | None:
        """The seconds until the tracker is tried again; None once it was tried for long enough after the run."""
        self._tracker = None
        text = redacted(f"{type(error).__name__}: {error}", environment_secrets(os.environ))[:PROBLEM_CHARACTERS]
        if text != self.position.problem:
            logger.warning("%s: %s", self.name, text)
            self._note(problem=text)
        now = self.clock()
        if alive:
            self._ended_at = None
        elif self._ended_at is None:
            self._ended_at = now
        if self._ended_at is not None and now - self._ended_at >= self.settings.keep_trying_hours * 3600:
            logger.warning("%s is given up; `opd-mcp track %s` sends the rest", self.name, self.run.run_id)
            return None
        self._failures += 1
        return min(FIRST_PAUSE * 2.0 ** min(self._failures - 1, 10), LONGEST_PAUSE)

    def _note(self, **changes: object) -> None:
        position = self.position.model_copy(update=changes)
        if position != self.position:
            self.position = position
            write_atomic(self.folder / f"{self.name}.json", position.to_json() + "\n")


def follow(mirror: Mirror, pause: Callable[[float], None] = time.sleep, *, wait: bool = True) -> Position:
    """Look until nothing is left to do; where the tracker then stands. One process at a time follows a run for it.

    Without `wait` it raises RunError `run_locked` where another process does.
    """
    descriptor = os.open(mirror.folder / f"{mirror.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # The mirror of an earlier attempt ends once it sees this one's lines.
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        mirror.position = read_position(mirror.folder, mirror.name)
        while (seconds := mirror.look()) is not None:
            pause(seconds)
    except BlockingIOError as error:
        raise RunError(
            "run_locked",
            f"Another process sends this run to {mirror.name}.",
            value=mirror.run.run_id,
            fix="Let it go on; its log is next to the workspace's runs, in tracking/runs.",
        ) from error
    finally:
        os.close(descriptor)
    return mirror.position

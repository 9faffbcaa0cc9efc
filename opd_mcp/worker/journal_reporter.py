"""A stage's reports, written into the run's journal."""

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from opd_mcp.schemas.runs import PhaseName
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.runs import cancel_requested
from opd_mcp.worker.watchdog import Pulse

logger = logging.getLogger(__name__)
PROGRESS_SECONDS = 0.5
CANCEL_SECONDS = 0.1
LOGGED_SECONDS = 15.0
"""Between two lines of the log on a phase's progress; its first and last steps have one in any case."""
LOGGED_METRICS = 6
ALERTS_PER_CODE = 5
LONGEST_ALARM = 1e8
STEPS = "steps"


class JournalReporter:
    """The engine's reporter of a run: at most two progress lines per second, one metric line per step, few alerts."""

    def __init__(self, journal: JournalWriter, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._journal = journal
        self._directory = directory
        self._clock = clock
        self._unit = ""
        self._next_progress = 0.0
        self._next_line = 0.0
        self._values: Mapping[str, float] = {}
        self._next_cancel_check = 0.0
        self._cancelled = False
        self.current: PhaseName | None = None
        """The current phase of the run."""
        self.pulse = Pulse(clock)
        """The ends of training steps, for the watchdog."""
        self.terminated = False
        """Whether this process has received SIGTERM."""
        self.deadline: float | None = None
        """When the run must give up its device, by the monotonic clock."""
        self._alerts: Counter[str] = Counter()

    def begin(self, phase: PhaseName, number: int | None = None) -> None:
        """A phase of the run begins; `number` is that of its round, of several."""
        self.current = phase
        self._unit, self._values = "", {}
        self.pulse.reset()
        of_round = {} if number is None else {"round": number}
        self._journal.append("phase", {"phase": phase, "event": "started", **of_round})

    def resumed(self, step: int) -> None:
        """The phase continues after a step of an earlier attempt; metrics of later steps are superseded."""
        self._journal.append("phase", {"phase": self.current, "event": "resumed", "step": step})

    def position(self) -> int:
        """The number of the last record, once all up to it are on the disk."""
        self.pulse.pause()  # a checkpoint
        return self._journal.sync()

    def phase(self, name: str) -> None:
        """A part of the stage begins; only logged, since the journal's phases are the run's."""
        logger.info("%s", name)

    def progress(self, done: int, total: int, unit: str) -> None:
        """A progress line when half a second has passed, at the end, and for each new unit."""
        if done >= total and unit == STEPS:
            self.pulse.pause()  # the last step: saving the model follows
        now = self._clock()
        if now >= self._next_line or done >= total or unit != self._unit:
            self._next_line = now + LOGGED_SECONDS
            logger.info("%s", self._progress_line(done, total, unit))
        if now < self._next_progress and done < total and unit == self._unit:
            return
        self._unit, self._next_progress = unit, now + PROGRESS_SECONDS
        self._journal.append("progress", {"done": done, "total": total, "unit": unit}, durable=False)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """A metric line; durable with the next checkpoint, since lost steps are computed again."""
        self.pulse.beat()
        self._values = values
        self._journal.append("metric", {"step": step, "values": dict(values)}, durable=False)

    def _progress_line(self, done: int, total: int, unit: str) -> str:
        """E.g. `distill 40/400 steps: loss 0.1234, reverse_kl_k1 0.5`."""
        shown = [f"{name} {value:.4g}" for name, value in list(self._values.items())[:LOGGED_METRICS]]
        place = f"{self.current} {done}/{total} {unit}"
        return f"{place}: {', '.join(shown)}" if shown and unit == STEPS else place

    def alert(self, code: str, message: str) -> None:
        """An alert line; the same code is recorded a few times, not at every step."""
        self._alerts[code] += 1
        if self._alerts[code] <= ALERTS_PER_CODE:
            self._journal.append("alert", {"code": code, "message": message})

    @property
    def out_of_time(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and self._clock() >= self.deadline

    def limit(self, seconds: float | None) -> None:
        """Make the run end its phase this many seconds from now; None: never."""
        self.deadline = None if seconds is None else self._clock() + seconds
        if seconds is not None and threading.current_thread() is threading.main_thread():
            # Only the guardian listens to the alarm: a native call may never come to the deadline above.
            signal.signal(signal.SIGALRM, lambda number, frame: None)
            signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 0.001), LONGEST_ALARM))

    def should_stop(self) -> bool:
        """Whether the user asked to stop or this process must end; the cancel file is checked ten times per second."""
        if self.terminated or self.out_of_time:
            return True
        now = self._clock()
        if not self._cancelled and now >= self._next_cancel_check:
            self._next_cancel_check = now + CANCEL_SECONDS
            self._cancelled = cancel_requested(self._directory)
        return self._cancelled

    @contextmanager
    def ending_on_sigterm(self) -> Iterator[None]:
        """Make SIGTERM end the stage at its next step, with a checkpoint; only the main thread receives signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True

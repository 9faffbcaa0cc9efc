"""Watches training steps: one that takes ten times the median raises an alert and writes the stacks to the log."""

import faulthandler
import logging
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opd_mcp.schemas.errors import RunError

logger = logging.getLogger(__name__)
REMEMBERED_STEPS = 50


@dataclass(frozen=True)
class WatchSettings:
    """A step is stalled after `factor` medians of at least `steps` steps, and not before `floor` seconds.

    The floor prevents alerts about steps of milliseconds on a loaded machine; `poll` is the interval in seconds.
    """

    factor: float = 10.0
    steps: int = 5
    floor: float = 5.0
    poll: float = 0.5


@dataclass(frozen=True)
class Stall:
    """A step that does not end: its time so far, and the median of the steps before it, in seconds."""

    seconds: float
    median: float


class Pulse:
    """When the steps of a phase ended; written by the training's thread, read by the watchdog's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._durations: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._last: float | None = None
        self._told = False

    def beat(self) -> None:
        """A step has ended."""
        with self._lock:
            now = self._clock()
            if self._last is not None:
                self._durations.append(now - self._last)
            self._last, self._told = now, False

    def pause(self) -> None:
        """The time until the next step's end is not a step: a checkpoint, or saving the model."""
        with self._lock:
            self._last = None

    def reset(self) -> None:
        """Another phase begins; its steps are not comparable."""
        with self._lock:
            self._durations.clear()
            self._last = None

    def new_stall(self, settings: WatchSettings) -> Stall | None:
        """The current stall, once; None while the step is within its time, or without steps."""
        with self._lock:
            if self._last is None or self._told or len(self._durations) < settings.steps:
                return None
            stall = Stall(self._clock() - self._last, statistics.median(self._durations))
            if stall.seconds < max(settings.factor * stall.median, settings.floor):
                return None
            self._told = True
            return stall


@contextmanager
def watching(pulse: Pulse, alert: Callable[[str, str], None], settings: WatchSettings) -> Iterator[None]:
    """Check the pulse until the end of the block; a stall becomes an alert `step_stalled` and a dump on stderr."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(settings.poll):
            stall = pulse.new_stall(settings)
            if stall is None:
                continue
            logger.warning("Step stalled for %.1f s; the stacks of all threads:", stall.seconds)
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
            try:
                alert(
                    "step_stalled",
                    f"The present step takes {stall.seconds:.1f} s by now; the median is {stall.median:.3g} s. "
                    "The stacks of the worker are in its log.",
                )
            except RunError:
                return  # a newer attempt has begun; this process notices at its next step

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

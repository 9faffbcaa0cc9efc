"""A limit for work whose length somebody else's text decides: regular expressions and chat templates."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TooSlow(Exception):
    """The work took more processor time than it was given."""


@contextmanager
def processor_seconds(limit: float) -> Iterator[None]:
    """Raise TooSlow inside when this process has spent `limit` seconds of processor time there.

    Python's matcher and interpreter both look at signals as they go; a main thread alone gets them, so work in
    another thread is not limited. Waiting and a suspended machine do not count.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)

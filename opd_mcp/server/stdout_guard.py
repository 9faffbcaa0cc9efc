"""Keeps stray prints off the wire until the SDK takes it over; imports nothing heavy."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Inside, whatever is written to fd 1 or sys.stdout goes to stderr; after it, fd 1 is the wire again.

    Over stdio one stray line breaks the protocol, and libraries do print while they are imported.
    """
    sys.stdout.flush()
    wire = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(wire, 1)
        os.close(wire)

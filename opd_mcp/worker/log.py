"""The worker's log: one line per message with its UTC time, each distinct warning of a library once."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_mcp.store.journal import utc_text

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
OURS, WARNINGS = "opd_mcp", "py.warnings"


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Log messages of opd_mcp, warnings, and errors of libraries until the end of the block."""
    root, ours, captured = logging.getLogger(), logging.getLogger(OURS), logging.getLogger(WARNINGS)
    handler, once, formatted, level = logging.StreamHandler(sys.stderr), Once(), warnings.formatwarning, ours.level
    handler.setFormatter(UtcFormatter(FORMAT))
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    captured.addFilter(once)
    logging.captureWarnings(True)
    warnings.formatwarning = warning_line
    try:
        yield
    finally:
        warnings.formatwarning = formatted
        logging.captureWarnings(False)
        captured.removeFilter(once)
        ours.setLevel(level)
        root.removeHandler(handler)


def take_over_libraries() -> None:
    """Make libraries with their own terminal handler (transformers, datasets) log through ours instead."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger):
            continue
        for handler in [found for found in logger.handlers if type(found) is logging.StreamHandler]:
            logger.removeHandler(handler)
            logger.propagate = True


class UtcFormatter(logging.Formatter):
    """Times as the journal writes them."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """When the message was logged."""
        return utc_text(record.created)


class Once(logging.Filter):
    """Passes each distinct warning once, wherever it is raised: Python's own filter forgets what it has shown
    whenever a library changes the filters temporarily.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the warning is new, regardless of its place."""
        warning = record.getMessage().rpartition(" (")[0]
        new = warning not in self._told
        self._told.add(warning)
        return new


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning in one line, with its place at the end and without the source line."""
    return f"{category.__name__}: {' '.join(str(message).split())} ({Path(filename).name}:{lineno})"

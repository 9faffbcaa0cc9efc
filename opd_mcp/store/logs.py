"""A run's log: opened for its worker, and read from its end in bounded pieces."""

import os
import re
from pathlib import Path
from typing import BinaryIO

from opd_mcp.schemas.answers import LogPage
from opd_mcp.schemas.errors import ArgumentError

BLOCK_BYTES = 64 << 10
SCANNED_BYTES = 4 << 20
LINE_CHARACTERS = 300
PAGE_CHARACTERS = 7_000
LOG_BYTES = 16 << 10
LOG_LINES = 15
_NOISE = re.compile(r"^\s*$|^\S+Z INFO |^\s*[\^~]+\s*$")


def open_log(path: Path) -> BinaryIO:
    """The worker's log, appended to, readable by its owner only."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")


def log_tail(log: Path) -> list[str]:
    """The last useful lines of a log; empty when there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - LOG_BYTES, 0))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = [line.rstrip()[:LINE_CHARACTERS] for line in text.replace("\r", "\n").splitlines()]
    return [line for line in lines if not _NOISE.search(line)][-LOG_LINES:]


class LogFollower:
    """The lines that are written to a log from now on; a line is given once it is whole."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.offset = log.stat().st_size if log.is_file() else 0

    def lines(self) -> list[str]:
        """The whole lines since the last look, at most four megabytes at a time."""
        if not self._log.is_file():
            return []
        with self._log.open("rb") as file:
            file.seek(self.offset)
            block = file.read(SCANNED_BYTES)
        whole = block[: block.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [line.rstrip() for line in whole.decode("utf-8", errors="replace").splitlines() if line.strip()]


def log_page(run_id: str, log: Path, *, tail: int, contains: str | None = None, cursor: str | None = None) -> LogPage:
    """The last lines before the cursor or of the log; with `contains`, only lines that have this text.

    One call reads at most four megabytes and answers with at most 7000 characters; `next_cursor` continues.
    Raises ArgumentError `invalid_argument` for a cursor that no page gave.
    """
    if not log.is_file():
        return LogPage(run_id=run_id, lines=[])
    end = log.stat().st_size if cursor is None else cursor_offset(cursor, log.stat().st_size)
    found: list[str] = []
    characters, scanned, position, rest = 0, 0, end, b""
    with log.open("rb") as file:
        while position > 0 and scanned < SCANNED_BYTES:
            size = min(BLOCK_BYTES, position)
            file.seek(position - size)
            block = file.read(size) + rest
            position, scanned = position - size, scanned + size
            # The text before the first line break may begin in the previous block.
            head, lines = (b"", block) if position == 0 else split_head(block)
            offset = position + len(block)
            for line in reversed(lines.splitlines(keepends=True)):
                offset -= len(line)
                text = line.decode("utf-8", errors="replace").rstrip()[:LINE_CHARACTERS]
                if not text or (contains is not None and contains not in text):
                    continue
                if len(found) == tail or (found and characters + len(text) > PAGE_CHARACTERS):
                    return page(run_id, found, offset + len(line))
                found.append(text)
                characters += len(text)
            rest = head
    return page(run_id, found, position + len(rest))


def split_head(block: bytes) -> tuple[bytes, bytes]:
    """The text up to the first line break, and the rest; a block without one is taken whole."""
    head, newline, lines = block.partition(b"\n")
    return (head + newline, lines) if newline and lines else (b"", block)


def page(run_id: str, newest_first: list[str], offset: int) -> LogPage:
    """The page, oldest line first; `offset` is where the older lines end."""
    return LogPage(run_id=run_id, lines=newest_first[::-1], next_cursor=str(offset) if offset > 0 else None)


def cursor_offset(cursor: str, size: int) -> int:
    """The place in the log that a cursor stands for."""
    if cursor.isascii() and cursor.isdigit() and int(cursor[:20]) <= size:
        return int(cursor)
    raise ArgumentError(
        "invalid_argument",
        "This is not a cursor that get_run_logs gave.",
        value=cursor,
        fix="Give next_cursor of the page before, or leave out cursor for the end of the log.",
    )

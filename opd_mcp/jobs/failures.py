"""Why a run failed, for people and agents: cause, way out, a suggested override and the end of the log."""

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mcp.jobs.liveness import loss_of
from opd_mcp.schemas.errors import OpdError, ResourceError
from opd_mcp.schemas.runs import Failure
from opd_mcp.store.runs import LOG_FILE

LOG_LINES = 15
LOG_BYTES = 16 << 10
LINE_CHARACTERS = 300
# Failures that the same run may get over; any other one comes back unless something is changed first.
RESUME_HELPS = frozenset(
    {
        *("worker_lost", "worker_terminated", "internal_error", "launch_failed"),
        *("not_enough_disk", "offline", "teacher_unreachable", "device_unavailable"),
        *("quota_exceeded", "unknown_setting", "invalid_setting"),
    }
)
DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "database or disk is full")
MEMORY_OVERRIDE: dict[str, Any] = {
    "distill.micro_batch_tokens": 4096,
    "sft.micro_batch_tokens": 4096,
    "score.micro_batch_tokens": 4096,
    "rollout.batch_size": 32,
}
_NOISE = re.compile(r"^\s*$|^\S+Z INFO |^\s*[\^~]+\s*$")


@dataclass(frozen=True)
class MemoryFigures:
    """A run's memory in bytes: the most it held, and what its plan expected."""

    peak: int
    expected: int | None

    def text(self) -> str:
        """Both, as the end of a sentence."""
        expected = f"; the plan expected {_gib(self.expected)}" if self.expected else ""
        return f"the peak was {_gib(self.peak)}{expected}"


@dataclass(frozen=True)
class DiskFigures:
    """Bytes: what the phase is expected to write in all, and what is free now."""

    needed: int
    free: int
    path: Path

    def text(self) -> str:
        """Both, as the end of a sentence."""
        return f"this phase needs about {_gib(self.needed)} in all, {_gib(self.free)} are free at {self.path}"


def failure_of(
    error: Exception, log: Path, memory: MemoryFigures | None = None, disk: DiskFigures | None = None
) -> Failure:
    """The failure record of an exception that ended a run; `memory` or `disk` are told when there was too little."""
    if is_disk_full(error):
        return Failure(
            code="not_enough_disk",
            cause=f"The disk is full{f': {disk.text()}' if disk else ''} ({_first_line(error)}).",
            fix="Free disk space (opd-mcp gc shows what nobody needs), then call resume_run to go on.",
            log_tail=log_tail(log),
        )
    if isinstance(error, OpdError):
        given = f" Got: {error.value!r}." if error.value is not None else ""
        return Failure(code=error.code, cause=f"{error.message}{given}", fix=error.fix, log_tail=log_tail(log))
    if is_out_of_memory(error):
        return Failure(
            code="not_enough_memory",
            cause=f"The device ran out of memory{f': {memory.text()}' if memory else ''} ({_first_line(error)}).",
            fix="Start again with the suggested overrides; finished phases are reused.",
            override=dict(MEMORY_OVERRIDE),
            log_tail=log_tail(log),
        )
    return Failure(
        code="internal_error",
        cause=f"{type(error).__name__}: {_first_line(error)}",
        fix="Read log_tail; resume_run goes on from the last checkpoint, if any. Report this if it comes back.",
        log_tail=log_tail(log),
    )


def lost_failure(directory: Path, attempt: int) -> Failure:
    """The failure of a run whose process ended without a final state, with its cause as far as it is known."""
    loss, memory = loss_of(directory, attempt), " once memory is free, or start again with the suggested overrides"
    return Failure(
        code="worker_lost",
        cause=loss.cause,
        fix="Call resume_run to go on from the last checkpoint; a phase without one yet begins anew"
        f"{memory if loss.out_of_memory else ''}.",
        override=dict(MEMORY_OVERRIDE) if loss.out_of_memory else None,
        log_tail=log_tail(directory / LOG_FILE),
    )


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine or the GPU had no memory left; torch's errors are known by name, without importing it."""
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or named


def disk_full(error: BaseException) -> ResourceError:
    """The error for whoever called while the disk was full: nothing was begun."""
    return ResourceError(
        "not_enough_disk",
        f"The disk is full: nothing was begun ({str(error)[:LINE_CHARACTERS]}).",
        fix="Free disk space (opd-mcp gc shows what nobody needs), then call again.",
    )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a write failed for want of room or of quota; libraries that hide the number keep it in their text."""
    if error is None:
        return False
    numbered = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    told = any(text in str(error) for text in DISK_FULL_TEXTS)
    return numbered or told or is_disk_full(error.__cause__)


def _gib(value: int) -> str:
    return f"{value / 2**30:.2f} GiB"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:LINE_CHARACTERS]

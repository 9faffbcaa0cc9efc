"""Why a run failed, for people and agents: cause, way out, a suggested override and the end of the log."""

from dataclasses import dataclass
from pathlib import Path

from opd_mcp.planning.costs.admission import MEMORY_OVERRIDE
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.runs import Failure
from opd_mcp.schemas.texts import byte_size
from opd_mcp.store.files import is_disk_full
from opd_mcp.store.logs import log_tail

LINE_CHARACTERS = 300


@dataclass(frozen=True)
class MemoryFigures:
    """A run's memory in bytes: its peak, and what its plan expected."""

    peak: int
    expected: int | None

    def text(self) -> str:
        """Both, as the end of a sentence."""
        expected = f"; the plan expected {byte_size(self.expected)}" if self.expected else ""
        return f"the peak was {byte_size(self.peak)}{expected}"


@dataclass(frozen=True)
class DiskFigures:
    """Bytes: what the phase is expected to write in all, and what is free now."""

    needed: int
    free: int
    path: Path

    def text(self) -> str:
        """Both, as the end of a sentence."""
        return f"this phase needs about {byte_size(self.needed)} in all, {byte_size(self.free)} are free at {self.path}"


def failure_of(
    error: Exception, log: Path, memory: MemoryFigures | None = None, disk: DiskFigures | None = None
) -> Failure:
    """The failure record of an exception that ended a run; `memory` or `disk` is given if there was too little."""
    if is_disk_full(error):
        return Failure(
            code="not_enough_disk",
            cause=f"The disk is full{f': {disk.text()}' if disk else ''} ({_first_line(error)}).",
            fix="Free disk space (opd-mcp gc shows what is unused), then resume the run.",
            call=resume_call(),
            log_tail=log_tail(log),
        )
    if isinstance(error, OpdError):
        given = f" Got: {error.value!r}." if error.value is not None else ""
        return Failure(
            code=error.code, cause=f"{error.message}{given}", fix=error.fix, call=error.call, log_tail=log_tail(log)
        )
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
        fix="Read log_tail. A resumed run continues from its last checkpoint, if any; report this if it happens again.",
        call=resume_call(),
        log_tail=log_tail(log),
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine or the GPU had no memory left; torch's errors are known by name, without importing it."""
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or named


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:LINE_CHARACTERS]

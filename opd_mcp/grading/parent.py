"""The parent's side of the grading child: starts it, asks it, ends it at a deadline and starts another."""

import json
import os
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass

from opd_mcp.grading.grade import Grade
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.recipes import GraderName

# Importing sympy on a loaded machine, not counted against any answer.
START_SECONDS = 120.0


@dataclass(frozen=True)
class Limits:
    """What one answer may take: processor seconds, wall seconds (a stopped or swapping child), bytes of memory."""

    cpu_seconds: float = 5.0
    wall_seconds: float = 60.0
    memory_bytes: int = 2 << 30


class GradingChild:
    """One child process that grades with one grader; started at the first answer, ended by `close`."""

    def __init__(self, name: GraderName, limits: Limits, pattern: str | None = None) -> None:
        self._arguments = [name, str(limits.cpu_seconds), str(limits.memory_bytes), *([pattern] if pattern else [])]
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def grade(self, response: str, gold: str) -> Grade:
        """The child's grade; a child that goes over its limits is ended, and its answer is wrong and `timed_out`.

        Raises ResourceError `grader_failed` where no child can be started.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([response, gold]).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, self._limits.wall_seconds)
        except BrokenPipeError:
            line = None
        if line is None:
            self.close()
            return Grade(False, None, timed_out=True)
        reply = json.loads(line)
        return Grade(reply["correct"], reply["extracted"])

    def close(self) -> None:
        """End the child, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                try:
                    pipe.close()
                except BrokenPipeError:  # what it had not read is lost with it
                    continue
        self._process, self._unread = None, b""

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "opd_mcp.grading.child", *self._arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if self._line(self._process, START_SECONDS) != b"ready":
            self.close()
            raise ResourceError(
                "grader_failed",
                "The grading process does not start.",
                value=" ".join(command[2:5]),
                fix=f"Run it by hand to see why: python -m opd_mcp.grading.child {self._arguments[0]} 5 2147483648",
            )
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The child's next line; None where it ended or the time is over."""
        assert process.stdout is not None
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, until - time.monotonic())):
                    return None
                read = os.read(process.stdout.fileno(), 1 << 16)
                if not read:
                    return None
                self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

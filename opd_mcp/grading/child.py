"""The grading child: one process that grades many answers, each under the kernel's own limits, and its parent's side.

    python -m opd_mcp.grading.child NAME CPU_SECONDS MEMORY_BYTES [PATTERN]

The kernel ends this process when one answer takes too much processor time, even inside a big power that Python cannot
interrupt; the parent then starts another. It says `ready` once it has imported what it needs.
"""

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from opd_mcp.grading.grade import Grade
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.recipes import GraderName

Scorer = Callable[[str, str], Grade]


def scorer(name: str, pattern: str | None) -> Scorer:
    """The function that grades, with its libraries imported."""
    if name == "math":
        import math_verify  # noqa: F401

        from opd_mcp.grading.package_graders import verified

        return verified
    if name == "reasoning_gym":
        import reasoning_gym  # noqa: F401

        from opd_mcp.grading.package_graders import scored

        return scored
    assert name == "regex", name
    from opd_mcp.grading.extraction import by_pattern, compiled_pattern

    compiled = compiled_pattern(pattern)
    return lambda response, gold: by_pattern(response, gold, compiled)


def graded(score: Scorer, response: str, gold: str) -> dict[str, object]:
    """The grade as JSON-ready values; a scorer that fails has not found the answer right."""
    try:
        grade = score(response, gold)
    except Exception as error:
        return {"correct": False, "extracted": None, "error": f"{type(error).__name__}: {error}"[:500]}
    return {"correct": grade.correct, "extracted": grade.extracted}


def main() -> None:
    """Grade lines of [response, gold] until there are no more."""
    name, cpu_seconds, memory_bytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    # The libraries' output is discarded; the first standard output carries answers only.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    score = scorer(name, sys.argv[4] if len(sys.argv) > 4 else None)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        response, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its signal's default is to end the process
        reply = graded(score, response, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=answers, flush=True)


# Importing sympy on a loaded machine, not counted against any answer.
START_SECONDS = 120.0


@dataclass(frozen=True)
class AnswerLimits:
    """What one answer may take: processor seconds, wall seconds (a stopped or swapping child), bytes of memory."""

    cpu_seconds: float = 5.0
    wall_seconds: float = 60.0
    memory_bytes: int = 2 << 30


class GradingChild:
    """One child process that grades with one grader; started at the first answer, ended by `close`."""

    def __init__(self, name: GraderName, limits: AnswerLimits, pattern: str | None = None) -> None:
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


if __name__ == "__main__":
    main()

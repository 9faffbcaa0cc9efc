"""The `code` grader: the last fenced block of Python, run with the unit tests of the answer field in a sandbox."""

import ast
import json
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.grading import sandbox
from opd_mcp.grading.extraction import after_thinking, last_code
from opd_mcp.grading.grade import Grade
from opd_mcp.schemas.errors import DataError, ResourceError

# How the sandbox reports that the kernel ended its program.
_KILLED = {-signal.SIGKILL & 0xFF, -signal.SIGXCPU & 0xFF}


@dataclass(frozen=True)
class CodeLimits:
    """What one program may take: processor and wall seconds, bytes of memory and of output."""

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Example:
    """A program's standard input and the output it must print."""

    input: str
    output: str


def require_sandbox() -> None:
    """Raise ResourceError `sandbox_unavailable` where this machine cannot cut off network and files."""
    limits = CodeLimits()
    try:
        tried = subprocess.run(
            _command(limits), capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL, env={}
        )
        why = tried.stderr.strip()[-200:] if tried.returncode != 0 else None
    except subprocess.TimeoutExpired:
        why = "the sandbox did not answer within 60 s"
    if why is not None:
        raise ResourceError(
            "sandbox_unavailable",
            f"Generated code cannot be run safely here: {why}.",
            fix="Run on Linux 5.12 or later where unprivileged user namespaces are allowed, or take another grader.",
        )


def unit_tests(gold: str) -> str | list[Example]:
    """The tests of an answer field: Python with `assert`s, or JSON [{"input": …, "output": …}, …].

    Raises DataError `unknown_format` for anything else.
    """
    try:
        values = json.loads(gold)
    except ValueError:
        values = None
    if isinstance(values, dict) and isinstance(values.get("inputs"), list) and isinstance(values.get("outputs"), list):
        values = [{"input": i, "output": o} for i, o in zip(values["inputs"], values["outputs"], strict=False)]
    if isinstance(values, list) and values:
        pairs = [(value.get("input"), value.get("output")) for value in values if isinstance(value, dict)]
        if len(pairs) == len(values) and all(isinstance(text, str) for pair in pairs for text in pair):
            return [Example(str(given), str(expected)) for given, expected in pairs]
    elif any(isinstance(node, ast.Assert | ast.Raise | ast.Call) for node in ast.walk(_parsed(gold))):
        return gold
    raise DataError(
        "unknown_format",
        "The answer holds no unit tests.",
        value=gold,
        fix='Give Python with asserts, or JSON: [{"input": "3 4\\n", "output": "7"}].',
    )


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def code_grade(response: str, gold: str, limits: CodeLimits) -> Grade:
    """Whether the response's program passes all of the tests."""
    code = last_code(after_thinking(response))
    if code is None:
        return Grade(False, None)
    tests = unit_tests(gold)
    if isinstance(tests, str):
        # A program that ends itself before the tests does not print the mark.
        mark = secrets.token_hex(16)
        outcome = _run(f"{code}\n\n{tests}\n\nprint({mark!r})\n", "", limits)
        return Grade(outcome is not None and outcome.rstrip().endswith(mark), code, timed_out=outcome is None)
    for example in tests:
        outcome = _run(code, example.input, limits)
        if outcome is None or _lines(outcome) != _lines(example.output):
            return Grade(False, code, timed_out=outcome is None)
    return Grade(True, code)


def _run(program: str, given: str, limits: CodeLimits) -> str | None:
    """What the program printed, "" if it failed; None where it went over its limits."""
    with tempfile.TemporaryDirectory() as folder:
        # Files opened here stay as they are inside, where everything else is read-only; a pipe could fill this process.
        file, taken, printed = (Path(folder) / name for name in ("program.py", "in", "out"))
        file.write_text(program, encoding="utf-8", errors="replace")
        taken.write_text(given, encoding="utf-8", errors="replace")
        with taken.open("rb") as source, printed.open("wb") as target:
            running = subprocess.Popen(
                _command(limits, file),
                stdin=source,
                stdout=target,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                status = running.wait(limits.wall_seconds)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
                return None
        if status in _KILLED:
            return None
        return printed.read_text(encoding="utf-8", errors="replace") if status == 0 else ""


def _command(limits: CodeLimits, *program: Path) -> list[str]:
    bounds = [limits.memory_bytes, limits.cpu_seconds, limits.output_bytes]
    return [sys.executable, "-I", sandbox.__file__, *map(str, bounds), *map(str, program)]


def _lines(printed: str) -> list[str]:
    return [line.rstrip() for line in printed.rstrip().split("\n")]

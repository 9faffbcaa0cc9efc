"""Answers: extracted by a regular expression or the whole response, compared exactly."""

import re

from opd_mcp.engine.time_limit import time_limit
from opd_mcp.schemas.errors import ArgumentError

# A sound pattern takes microseconds.
PATTERN_SECONDS = 5.0


def compiled_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """The pattern, checked: valid, with at most one group. Raises ArgumentError `invalid_argument`."""
    if pattern is None:
        return None
    fix = "Set 'benchmark.answer_pattern' to a valid regular expression with one group, e.g. '#(\\d+)'."
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ArgumentError(
            "invalid_argument", f"The answer pattern is invalid: {error}.", value=pattern, fix=fix
        ) from error
    if compiled.groups > 1:
        raise ArgumentError("invalid_argument", "The answer pattern has several groups.", value=pattern, fix=fix)
    return compiled


def extracted_answer(response: str, pattern: re.Pattern[str] | None) -> str | None:
    """The last match's group (or whole match), stripped; the whole response without a pattern; None without a match.

    Raises ArgumentError `slow_pattern` for a pattern that takes seconds on one response.
    """
    if pattern is None:
        return response.strip()
    last = None
    with time_limit(PATTERN_SECONDS, lambda: slow_pattern(pattern)):
        for match in pattern.finditer(response):
            last = match
    return (last.group(pattern.groups) or "").strip() if last else None


def slow_pattern(pattern: re.Pattern[str]) -> ArgumentError:
    """The error for a pattern that backtracks without end."""
    return ArgumentError(
        "slow_pattern",
        f"The answer pattern took more than {PATTERN_SECONDS} s on one response.",
        value=pattern.pattern,
        fix="Set 'benchmark.answer_pattern' to one without a repetition inside of a repetition.",
    )


def is_correct(response: str, answer: str, pattern: re.Pattern[str] | None) -> bool:
    """Whether the response's answer equals the expected one."""
    return extracted_answer(response, pattern) == answer.strip()

"""Answers: extracted by a regular expression or the whole response, compared exactly."""

import re
from collections.abc import Sequence

from opd_mcp.engine.limits import TooSlow, processor_seconds
from opd_mcp.schemas.errors import ArgumentError

# Far above what a linear pattern takes; a backtracking one takes years.
PATTERN_SECONDS = 5.0
PATTERN_SECONDS_A_RESPONSE = 0.01


def compiled_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """The pattern, checked: valid, with at most one group. Raises ArgumentError `invalid_argument`."""
    if pattern is None:
        return None
    fix = "Set 'benchmark.answer_pattern' to a valid regular expression with one group, e.g. '#(\\d+)'."
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ArgumentError(
            "invalid_argument", f"The answer pattern is invalid: {error}.", value=pattern, fix=fix
        ) from error
    if compiled.groups > 1:
        raise ArgumentError("invalid_argument", "The answer pattern has several groups.", value=pattern, fix=fix)
    return compiled


def extracted_answer(response: str, pattern: re.Pattern[str] | None) -> str | None:
    """The last match's group (or whole match), stripped; the whole response without a pattern; None without a match."""
    if pattern is None:
        return response.strip()
    matches = list(pattern.finditer(response))
    return matches[-1].group(pattern.groups).strip() if matches else None


def is_correct(response: str, answer: str, pattern: re.Pattern[str] | None) -> bool:
    """Whether the response's answer equals the expected one."""
    return extracted_answer(response, pattern) == answer.strip()


def correctness(responses: Sequence[str], answers: Sequence[str], pattern: re.Pattern[str] | None) -> list[bool]:
    """Whether each response's answer equals the expected one.

    Raises ArgumentError `too_slow` for a pattern that backtracks for ever: it would hold the worker beyond any cancel.
    """
    limit = PATTERN_SECONDS + PATTERN_SECONDS_A_RESPONSE * len(responses)
    try:
        with processor_seconds(limit):
            return [is_correct(response, answer, pattern) for response, answer in zip(responses, answers, strict=True)]
    except TooSlow:
        raise ArgumentError(
            "too_slow",
            f"The answer pattern took more than {limit:.1f} s on {len(responses)} responses.",
            value=pattern.pattern if pattern else None,
            fix="Set 'benchmark.answer_pattern' to one without nested repeats, e.g. '#(\\d+)' and not '(\\d+)+$'.",
        ) from None

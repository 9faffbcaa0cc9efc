"""Answers: extracted by a regular expression or the whole response, compared exactly."""

import re

from opd_mcp.schemas.errors import ArgumentError


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
    """The last match's group (or whole match), stripped; the whole response without a pattern; None without a match."""
    if pattern is None:
        return response.strip()
    matches = list(pattern.finditer(response))
    return matches[-1].group(pattern.groups).strip() if matches else None


def is_correct(response: str, answer: str, pattern: re.Pattern[str] | None) -> bool:
    """Whether the response's answer equals the expected one."""
    return extracted_answer(response, pattern) == answer.strip()

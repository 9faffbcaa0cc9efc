"""The `regex` grader: an answer found by the user's regular expression and compared exactly."""

import re

from opd_mcp.grading.grade import Grade
from opd_mcp.schemas.errors import ArgumentError


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
    # A group that took no part in its match is no answer.
    return found.strip() if matches and (found := matches[-1].group(pattern.groups)) is not None else None


def by_pattern(response: str, gold: str, pattern: re.Pattern[str] | None) -> Grade:
    """Whether the response's answer equals the expected one."""
    answer = extracted_answer(response, pattern)
    return Grade(answer == gold.strip(), answer)

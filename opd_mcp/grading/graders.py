"""Graders by name: one interface over plain functions, the grading child and the sandbox."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from types import TracebackType

from opd_mcp.grading import rules
from opd_mcp.grading.child import AnswerLimits, GradingChild
from opd_mcp.grading.extraction import compiled_pattern
from opd_mcp.grading.grade import Grade
from opd_mcp.grading.package_graders import settled
from opd_mcp.grading.unit_tests import CodeLimits, code_grade, require_sandbox
from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.schemas.recipes import GraderName

_PLAIN: dict[GraderName, Callable[[str, str], Grade]] = {
    "number": rules.number,
    "choice": rules.choice,
    "exact": rules.exact,
    "gsm8k": rules.gsm8k,
    "boxed": rules.boxed,
}
_PACKAGES = {"math": ("math_verify", "math-verify"), "reasoning_gym": ("reasoning_gym", "opd-mcp[tasks]")}
# Graders whose grades of equal answers are kept: greedy and sampled responses repeat themselves.
_REMEMBERED = 4096


class Grader(AbstractContextManager["Grader"]):
    """Grades responses against expected answers by one named rule; close it, or use it as a context manager."""

    def __init__(self, name: GraderName, *, pattern: str | None = None, limits: AnswerLimits | None = None) -> None:
        self.name = name
        self._child = GradingChild(name, limits or AnswerLimits(), pattern)
        self._pattern = pattern
        self._known: dict[tuple[str, str], Grade] = {}

    def grade(self, response: str, gold: str) -> Grade:
        """One grade. Raises ArgumentError `too_slow` for a pattern that backtracks without end."""
        if self.name in _PLAIN:
            grade = _PLAIN[self.name](response, gold)
            whole = response.strip()
            # A response that is nothing but the gold is right, except where it must be in a box.
            is_gold = bool(whole) and whole == gold.strip() and self.name != "boxed"
            return Grade(True, whole) if is_gold and not grade.correct else grade
        if self.name == "code":
            return code_grade(response, gold, CodeLimits())
        if self.name == "math" and (known := settled(response, gold)) is not None:
            return known
        key = (response, gold)
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = self._child.grade(response, gold)
        if self.name == "regex" and self._known[key].timed_out:
            raise ArgumentError(
                "too_slow",
                "The answer pattern took too long on one response.",
                value=self._pattern,
                fix="Set 'benchmark.answer_pattern' to one without nested repeats, e.g. '#(\\d+)' and not '(\\d+)+$'.",
            )
        return self._known[key]

    def grades(self, responses: Sequence[str], golds: Sequence[str]) -> Iterator[Grade]:
        """One grade for each response, as they come; one child grades them all."""
        for response, gold in zip(responses, golds, strict=True):
            yield self.grade(response, gold)

    def close(self) -> None:
        """End the grading child, if one was needed."""
        self._child.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def grader_for(
    name: GraderName, *, pattern: str | None = None, allow_code: bool = False, limits: AnswerLimits | None = None
) -> Grader:
    """The grader of that name, after checking that it can work here.

    Raises ArgumentError `invalid_argument` (a bad pattern; `code` without `allow_code`), ResourceError
    `missing_package` or `sandbox_unavailable`.
    """
    if name == "regex":
        compiled_pattern(pattern)
    if name == "code":
        if not allow_code:
            raise ArgumentError(
                "invalid_argument",
                "The grader 'code' runs programs that a model wrote on this machine, and nothing allowed it.",
                value="benchmark.grader='code'",
                fix="Set 'benchmark.allow_code' to true if that is what you want: they run without network, with every "
                "file read-only, under limits of time and memory.",
            )
        require_sandbox()
    if name in _PACKAGES and find_spec(_PACKAGES[name][0]) is None:
        raise ResourceError(
            "missing_package",
            f"The grader '{name}' needs {_PACKAGES[name][0]}, which is not installed here.",
            value=f"benchmark.grader='{name}'",
            fix=f"Run: pip install '{_PACKAGES[name][1]}'. Or name another grader in 'benchmark.grader'.",
        )
    return Grader(name, pattern=pattern, limits=limits)

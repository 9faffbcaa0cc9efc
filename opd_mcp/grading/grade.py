"""A grade, and what each grader takes for the answer."""

from dataclasses import dataclass

from opd_mcp.schemas.recipes import GraderName

WHAT_IT_DOES: dict[GraderName, str] = {
    "math": "the last \\boxed{}, the stated answer or the last expression; equal as mathematics (math-verify)",
    "number": "the last \\boxed{}, `####`, stated answer or number; equal as numbers",
    "choice": "one letter: boxed, stated, in brackets or on a line of its own",
    "exact": "the last \\boxed{}, the stated answer or the whole response; equal but for case, spacing, quotes and the "
    "last full stop",
    "gsm8k": "what follows the last `####`, else as `number`; equal as numbers",
    "boxed": "the last \\boxed{}; equal as LaTeX without its spelling, or as numbers",
    "regex": "`answer_pattern`'s first group at its last match; the same characters",
    "code": "the last fenced block of Python; passes the unit tests that the answer field holds",
    "reasoning_gym": "the last <answer>, \\boxed{} or stated answer; the task's own score is 1",
}


@dataclass(frozen=True)
class Grade:
    """One graded response; `extracted` is None where it holds no answer."""

    correct: bool
    extracted: str | None
    timed_out: bool = False
    """The grader went over its limits of time or memory and was stopped; the answer counts as wrong."""

"""A grade, and what each grader takes for the answer."""

from dataclasses import dataclass, field

from opd_mcp.schemas.recipes import GraderName
from opd_mcp.schemas.reports import GradedAnswers

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


EXAMPLES = 3
EXAMPLE_CHARACTERS = 200


@dataclass
class Tally:
    """Counts of one model's graded responses, and the ends of the first that held no answer."""

    responses: int = 0
    without_answer: int = 0
    empty: int = 0
    timed_out: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, response: str, grade: Grade) -> None:
        """Count one response. One whose grading was stopped may well hold an answer."""
        self.responses += 1
        self.timed_out += grade.timed_out
        self.empty += not response.strip()
        if grade.extracted is None and not grade.timed_out:
            self.without_answer += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append((response.strip() or response)[-EXAMPLE_CHARACTERS:])

    def counts(self) -> GradedAnswers:
        """The counts as the report has them."""
        return GradedAnswers(
            responses=self.responses,
            without_answer=self.without_answer,
            empty=self.empty,
            timed_out=self.timed_out,
            examples=list(self.examples),
        )

"""What is counted while answers are graded."""

from dataclasses import dataclass, field

from opd_mcp.grading.grade import Grade
from opd_mcp.schemas.reports import GradedAnswers

EXAMPLES = 3
EXAMPLE_CHARACTERS = 200


@dataclass
class Tally:
    """Counts of one model's graded responses, and the ends of the first that held no answer."""

    responses: int = 0
    without_answer: int = 0
    timed_out: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, response: str, grade: Grade) -> None:
        """Count one response. One whose grading was stopped may well hold an answer."""
        self.responses += 1
        self.timed_out += grade.timed_out
        if grade.extracted is None and not grade.timed_out:
            self.without_answer += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(response.strip()[-EXAMPLE_CHARACTERS:])

    def counts(self) -> GradedAnswers:
        """The counts as the report has them."""
        return GradedAnswers(
            responses=self.responses,
            without_answer=self.without_answer,
            timed_out=self.timed_out,
            examples=list(self.examples),
        )


def answers_text(name: str, answers: GradedAnswers) -> str:
    """One sentence about a model's answers, with the examples."""
    text = f"{name}: {answers.without_answer} of {answers.responses} responses had no extractable answer"
    if answers.timed_out:
        text += f", {answers.timed_out} could not be graded within the limits and count as wrong"
    if answers.examples:
        text += "; they end: " + ", ".join(f"`{_one_line(example)}`" for example in answers.examples)
    return text + "."


def _one_line(text: str) -> str:
    return "…" + " ".join(text.split()).replace("`", "'")[-EXAMPLE_CHARACTERS:] if text else "(empty)"

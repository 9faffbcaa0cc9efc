"""Which of the teacher's responses are graded, and what is said of them."""

from pathlib import Path

from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.engine.evaluation.teacher_responses import GRADED_RESPONSES, graded_responses
from opd_mcp.engine.models.loading import load_tokenizer
from opd_mcp.identity.data.rows import PromptRow, ResponseRow
from opd_mcp.schemas.recipes import BenchmarkRecipe


class Alerted(SilentReporter):
    def __init__(self) -> None:
        self.alerts: dict[str, str] = {}

    def alert(self, code: str, message: str) -> None:
        self.alerts[code] = message


def rows(count: int, says: str, *, truncated: bool = False, answer: str | None = "7") -> list[ResponseRow]:
    prompts = [PromptRow(str(n), prompt="3+4=?", answer=answer) for n in range(count)]
    return [ResponseRow(prompt, says, truncated=truncated) for prompt in prompts]


def test_without_answers_nothing_is_graded(example: Path) -> None:
    tokenizer = load_tokenizer(example / "teacher")
    assert graded_responses(rows(3, "It is 7.", answer=None), tokenizer, BenchmarkRecipe(), Context()) is None
    assert graded_responses([], tokenizer, BenchmarkRecipe(), Context()) is None


def test_of_many_a_sample_at_even_distances_is_graded(example: Path) -> None:
    many = [*rows(1000, "It is 8."), *rows(3000, "It is 7."), *rows(500, "It is 7.", answer=None)]
    reporter = Alerted()
    graded = graded_responses(many, load_tokenizer(example / "teacher"), BenchmarkRecipe(), Context(reporter=reporter))
    assert graded is not None
    assert graded.right.samples == GRADED_RESPONSES
    assert graded.right.value == 0.75
    assert reporter.alerts == {}, "three quarters are right"


def test_a_few_wrong_ones_prove_nothing_and_cut_ones_name_their_key(example: Path) -> None:
    tokenizer, reporter = load_tokenizer(example / "teacher"), Alerted()
    graded_responses(rows(3, "It is 8."), tokenizer, BenchmarkRecipe(), Context(reporter=reporter))
    assert reporter.alerts == {}, "the interval of 0 of 3 reaches to 0.56"
    cut = rows(20, "<think>so 3 and 4 make", truncated=True)
    graded_responses(cut, tokenizer, BenchmarkRecipe(), Context(reporter=reporter))
    message = reporter.alerts["teacher_often_wrong"]
    assert "Only 0 of 20 responses of the teacher are right by `number` (every answer is a number)" in message
    assert "20 of them were cut by the length limit: raise 'responses.sampling.max_new_tokens'." in message
    assert message.count("expected `7`, read ") == 3


def test_ids_without_text_are_decoded(example: Path) -> None:
    tokenizer = load_tokenizer(example / "teacher")
    ids = tuple(tokenizer.encode("3+4=7;#7", add_special_tokens=False))
    row = ResponseRow(PromptRow("0", prompt="3+4=?", answer="7"), response_ids=ids)
    graded = graded_responses([row], tokenizer, BenchmarkRecipe(), Context())
    assert graded is not None
    assert graded.right.value == 1

"""Which of the teacher's responses are graded, and what is said of them."""

import json
from pathlib import Path

import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.context import Context, ResponsesInputs, SilentReporter
from opd_mcp.engine.evaluation.teacher_responses import GRADED_RESPONSES, graded_responses
from opd_mcp.engine.models.loading import load_tokenizer
from opd_mcp.grading.golds import recipe_grader
from opd_mcp.grading.graders import grader_for
from opd_mcp.identity.data.reading import read_responses
from opd_mcp.identity.data.rows import PromptRow, ResponseRow
from opd_mcp.schemas.errors import DataError
from opd_mcp.schemas.recipes import BenchmarkRecipe
from opd_mcp.schemas.resolve import resolve_recipe


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


def test_only_right_responses_are_kept_each_once(example: Path, tmp_path: Path) -> None:
    reporter = Alerted()
    recipe = resolve_recipe("demo", {"responses.limit": 6, "responses.samples": 4, "responses.keep": "right"})
    context = Context(recipe.runtime, recipe.prompting, reporter)
    made = tmp_path / "right"
    inputs = ResponsesInputs(teacher=example / "teacher", prompts=example / "sft.jsonl", grading=recipe.benchmark)
    stages.generate_responses(recipe.responses, inputs, made, context)
    every = recipe.responses.model_copy(update={"keep": "all"})
    stages.generate_responses(every, inputs, tmp_path / "all", context)
    right, drawn = (read_responses(folder / "responses.parquet") for folder in (made, tmp_path / "all"))
    assert len(drawn) == 24
    name, _ = recipe_grader(recipe.benchmark, [row.prompt.answer for row in drawn])
    with grader_for(name, pattern=recipe.benchmark.answer_pattern) as grader:
        good = [row for row in drawn if grader.grade(row.response, row.prompt.answer).correct]
    once = {(row.prompt.id, row.response): row for row in reversed(good)}
    assert 0 < len(right) < 24
    assert len(right) == len(once)
    assert {(row.prompt.id, row.response_ids) for row in right} == {
        (row.prompt.id, row.response_ids) for row in once.values()
    }
    assert f"{len(right)} of 24 responses are kept" in reporter.alerts["responses_kept"]


@pytest.mark.parametrize(("answer", "code"), [(None, "no_answers"), ("999", "empty_data")])
def test_keeping_right_responses_needs_answers_and_a_right_one(
    example: Path, tmp_path: Path, answer: str | None, code: str
) -> None:
    recipe = resolve_recipe("demo", {"responses.keep": "right", "responses.sampling.max_new_tokens": 2})
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "1+1=?"} | ({"answer": answer} if answer else {})) + "\n")
    inputs = ResponsesInputs(teacher=example / "teacher", prompts=file, grading=recipe.benchmark)
    with pytest.raises(DataError, match=code):
        stages.generate_responses(
            recipe.responses, inputs, tmp_path / "made", Context(recipe.runtime, recipe.prompting)
        )

"""The teacher's own responses graded before a student learns from them.

A teacher that fails its own prompts is mostly a sign of a wrong grader, chat template or model, and costs a whole run.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from opd_mcp.engine.context import Context, require_going
from opd_mcp.engine.data.encoding import EncodedPrompt
from opd_mcp.engine.evaluation.intervals import wilson
from opd_mcp.grading.golds import no_answers_to_keep, recipe_grader
from opd_mcp.grading.grade import Grade, Tally
from opd_mcp.grading.graders import grader_for
from opd_mcp.identity.data.rows import PromptRow, ResponseRow
from opd_mcp.schemas.errors import DataError, OpdError, RunError
from opd_mcp.schemas.recipes import BenchmarkRecipe
from opd_mcp.schemas.reports import GradedResponses
from opd_mcp.schemas.texts import line_end, shortened

# So many, at even distances, tell a wrong grader from a weak teacher, and take seconds even with math-verify.
GRADED_RESPONSES = 256
EXAMPLES = 3
GOLD_CHARACTERS = 60
END_CHARACTERS = 160
# Between two looks at whether the run shall stop.
GRADED_AT_ONCE = 32


def graded_responses(
    rows: Sequence[ResponseRow], tokenizer: PreTrainedTokenizerBase, grading: BenchmarkRecipe, context: Context
) -> GradedResponses | None:
    """How many of up to 256 responses are right; None where no prompt has an answer, or the grader cannot work here.

    The alert `teacher_often_wrong` is raised where the whole 95 % interval is below `least_teacher_accuracy`.
    """
    answered = [row for row in rows if row.prompt.answer is not None]
    count = min(len(answered), GRADED_RESPONSES)
    chosen = [answered[number * len(answered) // count] for number in range(count)]
    if not chosen:
        return None
    try:
        graded = _graded(chosen, tokenizer, grading, context)
    except RunError:  # the user asked to stop
        raise
    except OpdError as error:  # training needs no grader; the benchmark will say the same
        context.reporter.alert("responses_not_graded", f"The teacher's responses are not graded: {error.message}")
        return None
    context.reporter.phase(graded.text())
    if graded.right.high < grading.least_teacher_accuracy:
        context.reporter.alert("teacher_often_wrong", _warning(graded))
    return graded


def require_gradable(prompts: Sequence[EncodedPrompt], grading: BenchmarkRecipe | None) -> None:
    """Raise DataError `no_answers` for prompts without answers, and what `grader_for` raises."""
    golds = [prompt.row.answer for prompt in prompts if prompt.row.answer is not None]
    if not golds or grading is None:
        raise no_answers_to_keep()
    name, _ = recipe_grader(grading, golds)
    grader_for(name, pattern=grading.answer_pattern, allow_code=grading.allow_code).close()


def right_responses(
    prompts: Sequence[PromptRow], texts: Sequence[str], grading: BenchmarkRecipe, context: Context
) -> NDArray[np.int64]:
    """The rows whose response is right, the first of equal ones to a prompt; prompts without an answer have none.

    Raises DataError `empty_data` where no response is right.
    """
    answered = [row for row, prompt in enumerate(prompts) if prompt.answer is not None]
    golds = [prompts[row].answer or "" for row in answered]
    name, _ = recipe_grader(grading, golds)
    kept: dict[tuple[str, str], int] = {}
    right = 0
    with grader_for(name, pattern=grading.answer_pattern, allow_code=grading.allow_code) as grader:
        for number, grade in enumerate(grader.grades([texts[row] for row in answered], golds)):
            if number % GRADED_AT_ONCE == 0:
                require_going(context)
                context.reporter.progress(number, len(answered), "responses graded")
            row = answered[number]
            right += grade.correct
            if grade.correct:
                kept.setdefault((prompts[row].id, texts[row]), row)
    if not kept:
        raise DataError(
            "empty_data",
            f"None of {len(texts)} responses is right by the grader '{name}', so responses.keep='right' keeps none.",
            value=len(texts),
            fix="Look at 'benchmark.grader' and the responses (responses.keep='all'), raise 'responses.samples' or "
            "'responses.sampling.max_new_tokens', or take easier prompts.",
        )
    copies = right - len(kept)
    context.reporter.alert(
        "responses_kept",
        f"{len(kept)} of {len(texts)} responses are kept: {right} are right by the grader '{name}'"
        + (f", {copies} of them copies." if copies else "."),
    )
    return np.array(sorted(kept.values()), dtype=np.int64)


def _graded(
    rows: Sequence[ResponseRow], tokenizer: PreTrainedTokenizerBase, grading: BenchmarkRecipe, context: Context
) -> GradedResponses:
    golds = [row.prompt.answer or "" for row in rows]
    texts = [_text(row, tokenizer) for row in rows]
    name, reason = recipe_grader(grading, golds)
    tally, right = Tally(), 0
    wrong: list[str] = []
    with grader_for(name, pattern=grading.answer_pattern, allow_code=grading.allow_code) as grader:
        for row, grade in enumerate(grader.grades(texts, golds)):
            if row % GRADED_AT_ONCE == 0:
                require_going(context)
                context.reporter.progress(row, len(rows), "responses of the teacher graded")
            tally.add(texts[row], grade)
            right += grade.correct
            if not grade.correct and len(wrong) < EXAMPLES:
                wrong.append(_example(golds[row], grade, texts[row]))
    estimate = wilson(right, len(rows))
    return GradedResponses(
        right=estimate.model_copy(update={"basis": "one response a prompt; Wilson interval"}),
        grader=name,
        grader_reason=reason,
        answers=tally.counts(),
        truncated=sum(row.truncated for row in rows),
        wrong=wrong,
    )


def _text(row: ResponseRow, tokenizer: PreTrainedTokenizerBase) -> str:
    if row.response is not None or row.response_ids is None:
        return row.response or ""
    return str(tokenizer.decode(list(row.response_ids), skip_special_tokens=True))


def _example(gold: str, grade: Grade, text: str) -> str:
    read = "nothing" if grade.extracted is None else f"`{shortened(grade.extracted, GOLD_CHARACTERS)}`"
    return (
        f"expected `{shortened(gold, GOLD_CHARACTERS)}`, read {read}, response ends `{line_end(text, END_CHARACTERS)}`"
    )


def _warning(graded: GradedResponses) -> str:
    parts = [
        f"Only {graded.text()}: grader, chat template or teacher is wrong, and the student is about to learn from it.",
        f"Wrong are: {'; '.join(graded.wrong)}.",
        "Look at 'benchmark.grader', 'benchmark.answer_pattern' and 'prompting.chat_template_kwargs'; the bound is "
        "'benchmark.least_teacher_accuracy'.",
    ]
    if graded.truncated * 2 > graded.right.samples:
        parts.append(
            f"{graded.truncated} of them were cut by the length limit: raise 'responses.sampling.max_new_tokens'."
        )
    return " ".join(parts)

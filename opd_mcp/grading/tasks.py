"""The `reasoning_gym` grader: a task's own scorer, from the entry that the answer field holds as JSON."""

import json
from typing import Any

from opd_mcp.grading.extraction import after_thinking, last_boxed, stated_answers
from opd_mcp.grading.grade import Grade
from opd_mcp.schemas.errors import DataError


def task_entry(gold: str) -> dict[str, Any]:
    """The task's entry in an answer field; raises DataError `missing_field` for anything else."""
    try:
        entry = json.loads(gold)
    except ValueError:
        entry = None
    metadata = entry.get("metadata") if isinstance(entry, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("source_dataset"), str) or "answer" not in entry:
        raise DataError(
            "missing_field",
            "The answer is no reasoning-gym entry.",
            value=gold,
            fix='Give the entry as JSON: {"answer": …, "metadata": {"source_dataset": "chain_sum", …}}.',
        )
    return entry


def scored(response: str, gold: str) -> Grade:
    """Whether the task's own scorer gives the full score, 1. Only for a child process."""
    import reasoning_gym

    text = after_thinking(response).strip()
    found = [last_boxed(text), *stated_answers(text), text]
    answer = next((answer for answer in found if answer), None)
    if answer is None:
        return Grade(False, None)
    entry = task_entry(gold)
    score = reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])
    return Grade(score(answer, entry) >= 1.0, answer)

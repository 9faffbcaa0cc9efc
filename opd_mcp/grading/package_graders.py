"""The `math` grader: equal as mathematics, by one spelling, by number, or by math-verify and sympy.

`settled` decides what needs no algebra and cannot hang. `verified` is for a child process only: sympy may compute for
ever or need any amount of memory.
"""

import json
import re
from typing import Any

from opd_mcp.grading.extraction import after_thinking, last_boxed, last_marked, stated_answers
from opd_mcp.grading.grade import Grade
from opd_mcp.grading.numeric import parsed_number, same_number
from opd_mcp.grading.rules import same_answer
from opd_mcp.grading.spelling import text_key, unwrapped
from opd_mcp.schemas.errors import DataError

# Where an answer without any mark is looked for: at the end.
TAIL_CHARACTERS = 2000
SHORT_CHARACTERS = 100
_COMMANDS = re.compile(r"\\(?:[a-zA-Z]+|.)")
_WORD = re.compile(r"[A-Za-z]{3,}")
_FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "exp",
    "sqrt",
    "arcsin",
    "arccos",
    "arctan",
    "inf",
    "mod",
}
_FUNCTIONS |= {"sinh", "cosh", "tanh", "infty", "det", "gcd", "lcm", "max", "min", "oo", "pi", "abs", "pmatrix"}
_FUNCTIONS |= {"bmatrix", "vmatrix", "matrix", "cases", "array", "aligned", "infinity", "ln"}


def is_words(answer: str) -> bool:
    """Whether an answer is words, such as a name, and no mathematics or quantity."""
    if parsed_number(answer) is not None:
        return False
    plain = _COMMANDS.sub(" ", unwrapped(last_boxed(answer) or answer))
    return any(word.lower() not in _FUNCTIONS for word in _WORD.findall(plain))


def settled(response: str, gold: str) -> Grade | None:
    """The grade where it needs no algebra; None where math-verify has to look."""
    text = after_thinking(response).strip()
    if not text:
        return Grade(False, None)
    gold = last_boxed(gold) or last_marked(gold) or gold
    marked = marked_answers(text)
    for answer in [*marked, text]:
        if same_answer(answer, gold) or text_key(answer) == text_key(gold):
            return Grade(True, answer)
    expected = parsed_number(gold)
    number = parsed_number(marked[0]) if marked else None
    if expected is not None and number is not None:
        return Grade(same_number(number, expected), marked[0])
    if is_words(gold):
        return Grade(False, marked[0] if marked else text)
    return None


def marked_answers(text: str) -> list[str]:
    """The answer that a response marks: its last box, else what it says after `####` or states."""
    if box := last_boxed(text):
        return [box]
    return [*filter(None, [last_marked(text)]), *stated_answers(text)]


def verified(response: str, gold: str) -> Grade:
    """Whether the two are equal as mathematics. Only for a child process: this can hang, or need any memory."""
    from math_verify import parse, verify

    text = after_thinking(response).strip()
    gold = last_boxed(gold) or last_marked(gold) or gold
    expected = parse(f"\\boxed{{{unwrapped(gold)}}}", parsing_timeout=None)
    box = last_boxed(text)
    candidates = [f"\\boxed{{{box}}}"] if box else [*marked_answers(text), text[-TAIL_CHARACTERS:]]
    if not box and len(text) < SHORT_CHARACTERS and "\n" not in text and not is_words(text):
        candidates.append(f"\\boxed{{{unwrapped(text)}}}")  # nothing but an expression
    for candidate in candidates:
        answer = parse(candidate, parsing_timeout=None)
        if answer:
            written = next((part for part in reversed(answer) if isinstance(part, str)), candidate)
            return Grade(verify(expected, answer, timeout_seconds=None), box or written)
    return Grade(False, box)


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

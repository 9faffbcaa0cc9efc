"""Graders that are plain functions of a response and the expected answer; none of them can hang."""

import re

from opd_mcp.grading.extraction import after_thinking, last_boxed, last_marked, stated_answers
from opd_mcp.grading.grade import Grade
from opd_mcp.grading.numeric import LONGEST, Number, numbers_in, parsed_number, same_number
from opd_mcp.grading.spelling import latex_key, text_key, unwrapped

_OPERATORS = re.compile(r"[\^*/+√]|\\(?:sqrt|pi|frac)|[A-Za-z]\s*-")
_LIST = re.compile(r"\band\b|\bor\b")
_WORD = re.compile(r"[A-Za-z]{3,}")
_CLAUSE = re.compile(r",\s+(?=[A-Za-z])|\s(?:because|since|as|which|when|if|for)\b|\s\(")
_LETTER = re.compile(r"(?:option|choice)?\s{0,3}[(\[]?([A-Za-z])(?:[)\].:]|$)(?!\w)", re.IGNORECASE)
_MARKED_LETTER = re.compile(
    r"(?<!\w)\(?([A-Z])\)|(?:\b[Oo]ption|\b[Cc]hoice)\s+\(?([A-Z])\b|^[^\w\n]*([A-Z])(?:[.):]|[^\w\n]*$)", re.MULTILINE
)


def exact(response: str, gold: str) -> Grade:
    """The text that is boxed, stated or the whole response, equal by `text_key`: SQuAD's exact match with articles."""
    text = after_thinking(response).strip()
    boxed = last_boxed(text)
    found = [boxed] if boxed else [*stated_answers(text), text]
    found = [answer for answer in found if answer]
    if not found:
        return Grade(False, None)
    right = next((answer for answer in found if text_key(answer) == text_key(gold)), None)
    return Grade(right is not None, found[0] if right is None else right)


def boxed(response: str, gold: str) -> Grade:
    r"""The last `\boxed{}`, equal in one spelling of LaTeX or as a number."""
    answer = last_boxed(after_thinking(response))
    return Grade(answer is not None and same_answer(answer, gold), answer)


def number(response: str, gold: str) -> Grade:
    """The number that is boxed, marked or stated, else the last one."""
    text = after_thinking(response)
    return _numeric(text, gold, [last_boxed(text), last_marked(text), *stated_answers(text)])


def gsm8k(response: str, gold: str) -> Grade:
    """The number after the last `####`; without one, as `number`. The gold may be GSM8K's whole solution."""
    text = after_thinking(response)
    gold = last_marked(gold) or gold
    return _numeric(text, gold, [last_marked(text), last_boxed(text), *stated_answers(text)])


def choice(response: str, gold: str) -> Grade:
    """The letter that is boxed or stated, else the last in brackets, after "option" or at a line's start."""
    text = after_thinking(response)
    expected = choice_letter(gold)
    for answer in (last_boxed(text), *stated_answers(text)):
        if answer and (letter := choice_letter(answer)):
            return Grade(letter == expected, letter)
    marked = ["".join(filter(None, letters)) for letters in _MARKED_LETTER.findall(text)]
    letter = marked[-1] if marked else choice_letter(text)
    return Grade(letter is not None and letter == expected, letter)


def choice_letter(answer: str) -> str | None:
    """`B` of `B`, `(b)`, `B) Paris` or `\\text{(B)}`; None where the answer is no choice."""
    match = _LETTER.match(unwrapped(answer))
    return match[1].upper() if match else None


def same_answer(first: str, second: str) -> bool:
    """Whether two answers are one, without algebra: the same LaTeX but for its spelling, or the same number."""
    if latex_key(first) == latex_key(second):
        return True
    a, b = parsed_number(first), parsed_number(second)
    return a is not None and b is not None and same_number(a, b)


def _numeric(text: str, gold: str, marked: list[str | None]) -> Grade:
    expected = parsed_number(gold)
    for answer in marked:
        if answer and (found := _number_of(answer)):
            return Grade(expected is not None and same_number(found[1], expected), found[0])
    if marked[0] or not (numbers := numbers_in(text)):  # a mark without a number: an expression, or words
        return Grade(False, marked[0])
    written, value = numbers[-1]
    return Grade(expected is not None and same_number(value, expected), written)


def _number_of(answer: str) -> tuple[str, Number] | None:
    """The one number that a marked answer gives, and how it is written; None for expressions and lists."""
    answer = answer[:LONGEST]
    for part in (answer, answer.rpartition("=")[2], answer.rpartition("≈")[2], _CLAUSE.split(answer, maxsplit=1)[0]):
        if number := parsed_number(part):
            return part.strip(), number
    numbers = numbers_in(answer)
    rest = answer
    for written, _ in numbers:
        rest = rest.replace(written, " ", 1)
    is_list = len(numbers) > 1 and not _WORD.search(_LIST.sub("", rest))
    return None if not numbers or is_list or _OPERATORS.search(rest) else numbers[0]

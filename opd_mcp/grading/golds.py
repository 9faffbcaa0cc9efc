"""What the expected answers say: which grader fits them, and which of them that grader cannot grade."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_mcp.grading.extraction import last_boxed
from opd_mcp.grading.graders import Grader
from opd_mcp.grading.numeric import parsed_number
from opd_mcp.grading.package_graders import is_words, task_entry
from opd_mcp.grading.rules import choice_letter
from opd_mcp.grading.unit_tests import unit_tests
from opd_mcp.schemas.errors import DataError
from opd_mcp.schemas.recipes import BenchmarkRecipe, GraderName

_LETTERS = "ABCDEFGHIJ"
# Choosing a grader looks at so many expected answers at most, so that a million prompts are planned at once.
LOOKED_AT = 5000


def _is_choice(gold: str) -> bool:
    return len(gold) <= 3 and gold.strip("().: ").upper() in tuple(_LETTERS) and choice_letter(gold) is not None


_FITTING: tuple[tuple[GraderName, Callable[[str], bool], str], ...] = (
    (
        "reasoning_gym",
        lambda gold: gold.startswith("{") and '"source_dataset"' in gold,
        "every answer is a reasoning-gym entry",
    ),
    ("gsm8k", lambda gold: "####" in gold, "every answer has the mark ####"),
    ("choice", _is_choice, "every answer is a single letter"),
    ("number", lambda gold: parsed_number(gold) is not None, "every answer is a number"),
    ("exact", is_words, "every answer is words"),
)


def no_answers_to_keep() -> DataError:
    """The error for keeping right responses to prompts that have no answers."""
    return DataError(
        "no_answers",
        "responses.keep='right' grades responses, and none of the prompts to answer has an `answer`.",
        fix="Give prompts with answers, naming their field by columns=… where it has another name, or leave out "
        "'responses.keep'.",
    )


@dataclass(frozen=True)
class OddGolds:
    """Expected answers that are of another kind than most: how many of how many, the kind's grader, and the first."""

    count: int
    of: int
    usual: GraderName
    first: int
    """The place of the first of them."""


@dataclass(frozen=True)
class GoldProblem:
    """An expected answer that its grader does not recognise: its place, and the response in which it failed."""

    row: int
    gold: str
    response: str


def chosen_grader(golds: Sequence[str]) -> tuple[GraderName, str]:
    """The grader that fits the expected answers, of many a sample at even distances, and why in a few words."""
    golds = [gold.strip() for gold in golds[:: 1 + len(golds) // LOOKED_AT]]
    if not golds:
        return "exact", "no prompt has an answer"
    for name, fits, why in _FITTING:
        if all(fits(gold) for gold in golds):
            return name, why
    words = sum(is_words(gold) for gold in golds)
    return "math", f"{len(golds) - words} of {len(golds)} answers are mathematical expressions"


def odd_golds(golds: Sequence[str]) -> OddGolds | None:
    """The expected answers that keep a simpler grader from being chosen; None where fewer than 90 % are of one kind."""
    for name, fits, _ in _FITTING:
        odd = [place for place, gold in enumerate(golds) if not fits(gold.strip())]
        if len(odd) <= len(golds) // 10:
            return OddGolds(len(odd), len(golds), name, odd[0]) if odd else None
    return None


def recipe_grader(recipe: BenchmarkRecipe, golds: Sequence[str]) -> tuple[GraderName, str]:
    """The recipe's grader, and why: named, given by its pattern, or chosen from the expected answers."""
    if recipe.grader != "auto":
        return recipe.grader, "named by the recipe"
    if recipe.answer_pattern is not None:
        return "regex", "the recipe has an answer_pattern"
    return chosen_grader(golds)


def gold_problems(grader: Grader, golds: Sequence[str]) -> list[GoldProblem]:
    r"""Every expected answer that is not right when a response says just it, in a sentence or in `\boxed{}`.

    For `code` and `reasoning_gym`: every answer field that holds no tests or entry. For `regex`, whose author alone
    knows how a response says an answer: every one of which the pattern finds only a part in the usual ways to say it.
    """
    problems: dict[str, str | None] = {}
    for gold in dict.fromkeys(golds):
        if grader.name == "regex":
            problems[gold] = _cut_short(grader, gold)
            continue
        problems[gold] = next((said for said in _said(grader, gold) if not grader.grade(said, gold).correct), None)
        if grader.name in ("code", "reasoning_gym") and not _is_readable(grader.name, gold):
            problems[gold] = ""
    return [
        GoldProblem(row, gold, response) for row, gold in enumerate(golds) if (response := problems[gold]) is not None
    ]


def _said(grader: Grader, gold: str) -> list[str]:
    """Responses that say the expected answer, in the ways that the grader reads."""
    if grader.name in ("regex", "code", "reasoning_gym"):
        return []
    answer = gold
    if grader.name in ("gsm8k", "math"):
        answer = gold.rpartition("####")[2]
    if grader.name == "math":
        answer = last_boxed(gold) or answer
    answer = answer.strip()
    sentence = f"The answer is {answer}{'' if answer.endswith('.') else '.'}"
    boxed = f"So the answer is $\\boxed{{{answer.strip('$')}}}$."
    return [boxed] if grader.name == "boxed" else [sentence, boxed]


def _cut_short(grader: Grader, gold: str) -> str | None:
    """A response in which the pattern finds something else than the answer, where it finds the answer in none."""
    usual = ("{}", "#{}", "#### {}", "The answer is {}.", "Answer: {}", "\\boxed{{{}}}", "<answer>{}</answer>")
    said = [form.format(gold.strip()) for form in usual]
    grades = [grader.grade(response, gold) for response in said]
    if any(grade.correct for grade in grades):
        return None
    return next((response for response, grade in zip(said, grades, strict=True) if grade.extracted is not None), None)


def _is_readable(name: GraderName, gold: str) -> bool:
    try:
        if name == "code":
            unit_tests(gold)
        else:
            task_entry(gold)
    except DataError:
        return False
    return True

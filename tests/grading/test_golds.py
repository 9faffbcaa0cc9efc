"""The expected answers choose their grader, and are checked against it."""

import pytest
from pydantic import ValidationError

from opd_mcp.grading.golds import OddGolds, chosen_grader, gold_problems, odd_golds, recipe_grader
from opd_mcp.grading.grade import WHAT_IT_DOES, Grade, Tally
from opd_mcp.schemas.recipes import BenchmarkRecipe, GraderName


@pytest.mark.parametrize(
    ("golds", "name"),
    [
        (["1", "2.5", "-3", "1,000", r"\frac{1}{2}", "50%"], "number"),
        (["A", "B", "(C)"], "choice"),
        (["so 2\n#### 2", "#### 7"], "gsm8k"),
        (["x^2", "7", r"\text{Yes}"], "math"),
        (["(1, 2)"], "math"),
        (["Paris", "New York", "true"], "exact"),
        (['{"answer": "4", "metadata": {"source_dataset": "chain_sum"}}'], "reasoning_gym"),
        ([], "exact"),
    ],
)
def test_a_grader_that_fits_is_chosen_and_the_reason_given(golds, name):
    chosen, why = chosen_grader(golds)
    assert chosen == name
    assert why


def test_a_few_answers_of_another_kind_are_named():
    assert odd_golds(["1"] * 10 + ["n/a"]) == OddGolds(1, 11, "number", 10)
    assert odd_golds(["2 #### 2"] * 20 + ["7", "8"]) == OddGolds(2, 22, "gsm8k", 20)
    assert odd_golds(["1"] * 10) is None
    assert odd_golds(["x^2", "7", "y+1", "8"]) is None


def test_a_recipe_says_its_grader_or_leaves_it_to_the_answers():
    assert recipe_grader(BenchmarkRecipe(), ["1", "2"])[0] == "number"
    assert recipe_grader(BenchmarkRecipe(answer_pattern="#(.)"), ["1"])[0] == "regex"
    assert recipe_grader(BenchmarkRecipe(grader="math"), ["1"]) == ("math", "named by the recipe")


@pytest.mark.parametrize(
    "settings",
    [{"grader": "regex"}, {"grader": "math", "answer_pattern": "x"}, {"grader": "code"}, {"grader": "maths"}],
)
def test_a_recipe_that_cannot_grade_is_refused(settings):
    with pytest.raises(ValidationError):
        BenchmarkRecipe(**settings)


def test_a_recipe_from_before_graders_had_names_still_loads():
    old = BenchmarkRecipe.from_json('{"answer_pattern": "#(\\\\d)", "samples_per_prompt": 4}')
    assert old.grader == "auto"


@pytest.mark.parametrize(
    ("name", "golds", "failing"),
    [
        ("number", ["1", "x", "2", "x"], [1, 3]),
        ("choice", ["A", "Paris", "B"], [1]),
        ("exact", ["Paris", "Mr. Smith", "  ", "a. b"], [2]),
        ("gsm8k", ["2 + 2 = 4\n#### 4", "#### four"], [1]),
        ("boxed", [r"\frac12", "x^2"], []),
        ("math", [r"\frac12", r"x^2 + 1", r"(1, \infty)", r"\text{Yes}", "$7$", r"so \boxed{3}"], []),
        ("regex", ["4"], []),
        ("regex", ["4", "12", "x y"], [1, 2]),
    ],
)
def test_golds_that_their_grader_does_not_recognise_are_listed(name, golds, failing, grader):
    problems = gold_problems(grader(name, pattern="#(.)" if name == "regex" else None), golds)
    assert [problem.row for problem in problems] == failing
    assert all(problem.gold == golds[problem.row] for problem in problems)


def test_every_grader_is_described():
    assert set(WHAT_IT_DOES) == set(GraderName.__args__)


def test_a_tally_keeps_three_examples():
    tally = Tally()
    for n in range(5):
        tally.add(f"nothing {n}", Grade(False, None))
    tally.add("#4", Grade(True, "4"))
    tally.add("9^9^9", Grade(False, None, timed_out=True))
    counts = tally.counts()
    assert (counts.responses, counts.without_answer, counts.timed_out) == (7, 5, 1)
    assert counts.examples == ["nothing 0", "nothing 1", "nothing 2"]
    assert "5 of 7 responses had no extractable answer" in counts.text("student")

"""Graders by name: the same rule everywhere, one child for many answers, limits that hold."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.grading import rules
from opd_mcp.grading.child import AnswerLimits
from opd_mcp.grading.graders import grader_for
from opd_mcp.grading.package_graders import settled
from opd_mcp.schemas.errors import ArgumentError, DataError

PAIRS = Path(__file__).resolve().parents[2] / "tools" / "bench" / "grader_pairs.jsonl"
QUICK = AnswerLimits(cpu_seconds=1.0)


@pytest.mark.parametrize("name", ["number", "choice", "exact", "gsm8k", "boxed"])
def test_the_pairs_of_a_plain_grader_are_all_graded_rightly(name, grader):
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["grader"] == name]
    assert len(rows) >= 15
    for row in rows:
        response = row["response"]
        if isinstance(response, list):
            response = "".join(text * times for text, times in response)
        assert grader(name).grade(response, row["gold"]).correct == row["equal"], row


@given(gold=st.text(min_size=1, max_size=40).filter(str.strip))
@pytest.mark.parametrize("name", ["number", "choice", "exact", "gsm8k"])
def test_a_response_that_is_the_gold_is_right(name, gold):
    with grader_for(name) as grader:
        assert grader.grade(gold, gold).correct


@given(gold=st.integers(-(10**6), 10**6), other=st.integers(-(10**6), 10**6))
def test_a_number_is_right_only_when_it_is_the_number(gold, other):
    for form in ("The answer is {}.", r"\boxed{{{}}}", "#### {}", "We count: {}"):
        for rule in (rules.number, rules.gsm8k):
            assert rule(form.format(other), str(gold)).correct == (gold == other)


@given(st.sampled_from("ABCDEFGHIJ"), st.sampled_from("ABCDEFGHIJ"))
def test_a_choice_is_right_only_when_it_is_the_letter(gold, other):
    for form in ("The answer is ({}).", r"\boxed{{\text{{({})}}}}", "{}) 12", "**{}**", "Answer: {}"):
        assert rules.choice(form.format(other), gold).correct == (gold == other)


@given(st.text(max_size=80), st.text(max_size=20))
def test_any_response_is_graded_without_an_error(response, gold):
    for rule in (rules.exact, rules.boxed, rules.number, rules.gsm8k, rules.choice, settled):
        grade = rule(response, gold)
        assert grade is None or grade.extracted is not None or not grade.correct, "what holds no answer is not right"


def test_mathematics_is_compared_as_such(grader):
    math = grader("math")
    assert math.grade(r"So $\boxed{(x+1)^2}$.", "x^2+2x+1").correct
    assert math.grade("Thus it is $1+x$.", "x+1").correct
    assert not math.grade(r"\boxed{(2,1)}", "(1,2)").correct
    assert math.grade("I cannot say.", "x+1").extracted is None


def test_one_child_grades_many_answers(grader):
    math = grader("math")
    golds = [f"x+{n}" for n in range(20)]
    grades = list(math.grades([rf"\boxed{{{n}+x}}" for n in range(20)], golds))
    child = math._child._process
    assert all(grade.correct for grade in grades)
    assert child is not None
    assert child.poll() is None


@pytest.mark.parametrize("response", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}"])
def test_what_takes_too_long_is_wrong_and_the_next_answer_is_graded(response, grader):
    math = grader("math", limits=QUICK)
    grade = math.grade(response, "x+1")
    assert not grade.correct
    assert grade.timed_out
    assert math.grade(r"\boxed{1+x}", "x+1").correct


def test_a_child_that_dies_is_started_again(grader):
    math = grader("math")
    assert math.grade(r"\boxed{1+x}", "x+1").correct
    math._child._process.kill()
    math._child._process.wait()
    assert math.grade(r"\boxed{2+x}", "x+2").timed_out
    assert math.grade(r"\boxed{3+x}", "x+3").correct


def test_a_pattern_finds_the_answer_at_its_last_match(grader):
    regex = grader("regex", pattern=r"#(\d)")
    assert regex.grade("3+8=1;#1 no, #4", "4").correct
    assert not regex.grade("#4.0", "4.0").correct
    assert regex.grade("nothing", "4").extracted is None


def test_a_pattern_that_backtracks_for_ever_is_stopped(grader):
    regex = grader("regex", pattern=r"(?:\d+)+$", limits=QUICK)
    with pytest.raises(ArgumentError, match="too_slow"):
        regex.grade("1" * 60 + "x", "1")


@pytest.mark.parametrize("pattern", ["(", "(a)(b)"])
def test_a_bad_pattern_is_one_clear_error(pattern):
    with pytest.raises(ArgumentError, match="answer_pattern"):
        grader_for("regex", pattern=pattern)


@pytest.mark.needs("reasoning_gym")
def test_a_task_scores_by_its_entry(grader):
    import reasoning_gym

    task = grader("reasoning_gym")
    for entry in reasoning_gym.create_dataset("chain_sum", size=3, seed=1):
        gold = json.dumps(entry)
        assert task.grade(f"<answer>{entry['answer']}</answer>", gold).correct
        assert task.grade(rf"\boxed{{{entry['answer']}}}", gold).correct
        assert not task.grade(f"<answer>{entry['answer']}1</answer>", gold).correct


def test_an_answer_that_is_no_entry_is_an_error():
    from opd_mcp.grading.package_graders import task_entry

    with pytest.raises(DataError, match="missing_field"):
        task_entry("42")

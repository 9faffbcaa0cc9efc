"""Answers: exact match and regular expressions."""

import pytest

from opd_mcp.engine.evaluation.model_score import compiled_pattern, correctness, extracted_answer, is_correct
from opd_mcp.schemas.errors import ArgumentError


def test_without_a_pattern_the_whole_response_is_the_answer() -> None:
    assert is_correct(" 42\n", "42", None)
    assert not is_correct("42.", "42", None)


def test_the_last_match_counts() -> None:
    pattern = compiled_pattern(r"#(\d)")
    assert extracted_answer("3+8=1;#1 no, #4", pattern) == "4"
    assert extracted_answer("nothing", pattern) is None


def test_a_pattern_without_a_group_gives_its_whole_match() -> None:
    assert extracted_answer("is it 12 or 13", compiled_pattern(r"\d+")) == "13"


@pytest.mark.parametrize("pattern", ["(", "(a)(b)"])
def test_a_bad_pattern_is_one_clear_error(pattern: str) -> None:
    with pytest.raises(ArgumentError, match="answer_pattern"):
        compiled_pattern(pattern)


def test_a_pattern_that_backtracks_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr("opd_mcp.engine.evaluation.model_score.PATTERN_SECONDS", 0.2)
    with pytest.raises(ArgumentError, match="too_slow"):
        correctness(["1" * 60 + "x"], ["1"], compiled_pattern(r"(?:\d+)+$"))
    assert correctness(["so #1"], ["1"], compiled_pattern(r"#(\d)")) == [True]

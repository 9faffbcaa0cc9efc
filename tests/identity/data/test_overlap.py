"""Different sums are different prompts."""

import pytest

from opd_mcp.identity.data.overlap import normalised


@pytest.mark.parametrize(("one", "other"), [("1-2=?", "1*2=?"), ("1-2=?", "12=?"), ("4/2", "4%2")])
def test_arithmetic_signs_tell_prompts_apart(one, other):
    assert normalised(one) != normalised(other)


def test_case_space_and_other_punctuation_do_not():
    assert normalised("What is 1 - 2?") == normalised("what is 1-2")

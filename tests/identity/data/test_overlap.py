"""Different sums are different prompts."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.identity.data.scan import normalised


@pytest.mark.parametrize(("one", "other"), [("1-2=?", "1*2=?"), ("1-2=?", "12=?"), ("4/2", "4%2")])
def test_arithmetic_signs_tell_prompts_apart(one, other):
    assert normalised(one) != normalised(other)


def test_case_space_and_other_punctuation_do_not():
    assert normalised("What is 1 - 2?") == normalised("what is 1-2")


@given(text=st.text(max_size=20))
def test_every_character_is_kept_or_dropped_by_its_kind(text):
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = [
        sign
        for sign in folded
        if not sign.isspace() and (sign in "-*/%" or unicodedata.category(sign)[0] not in ("P", "Z", "C"))
    ]
    assert normalised(text) == "".join(kept)

"""Ids are readable and safe as file names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.store.workspace import is_id, new_id


def test_an_id_is_its_label_and_six_digits():
    assert new_id("Lightning Qwen/Qwen3-0.6B").startswith("lightning-qwen-qwen3-0.6b-")
    assert new_id("a") != new_id("a")


@given(st.text())
def test_every_label_gives_an_id(label):
    assert is_id(new_id(label))


@pytest.mark.parametrize("text", ["", ".", "..", "../a", "a/b", "/a", "A", "a\n", "a\0", ".hidden", "ä", "a" * 81])
def test_what_could_leave_the_directory_is_no_id(text):
    assert not is_id(text)

"""Where a response says its answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.grading.extraction import after_thinking, last_boxed, last_code, last_marked, stated_answers

PLAIN = st.text(st.characters(exclude_characters="\\{}", exclude_categories=["Cs"]), max_size=30)
NESTED = st.recursive(
    PLAIN, lambda inner: st.tuples(inner, inner).map(lambda two: f"{two[0]}{{{two[1]}}}"), max_leaves=8
)


@given(before=PLAIN, content=NESTED, after=PLAIN)
def test_a_box_gives_what_is_in_it(before, content, after):
    assert last_boxed(rf"{before}\boxed{{{content}}}{after}") == content.strip()


@given(first=NESTED, second=NESTED)
def test_the_last_box_wins(first, second):
    assert last_boxed(rf"\boxed{{{first}}} or \boxed{{{second}}}") == second.strip()


@given(st.text(alphabet="\\boxed{} 5fc", max_size=60))
def test_anything_with_boxes_is_read_without_an_error(text):
    found = last_boxed(text)
    assert found is None or found in text


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{5", None),
        (r"\boxed{5} then \boxed{6", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed 5", "5"),
        ("no box", None),
    ],
)
def test_boxes(text, content):
    assert last_boxed(text) == content


@given(thought=PLAIN, answer=PLAIN)
def test_thinking_is_not_the_answer(thought, answer):
    assert after_thinking(f"<think>{thought}</think>{answer}") == answer
    assert after_thinking(f"<think>{thought}") == ""
    assert after_thinking(answer) == answer


@given(answer=st.from_regex(r"[a-z0-9]{1,10}", fullmatch=True))
@pytest.mark.parametrize(
    "form", ["The answer is {}.", "**Answer:** {}", "Final answer: {}\nDone.", "<answer>{}</answer>"]
)
def test_a_stated_answer_is_found(form, answer):
    assert stated_answers("First: 1. The answer is not this. " + form.format(answer))[-1] == answer


def test_the_mark_of_gsm8k_gives_the_rest_of_its_line():
    assert last_marked("1 + 1 = 2\n#### 2\nGood.") == "2"
    assert last_marked("#### ") is None
    assert last_marked("2") is None


def test_the_last_block_of_python_is_the_code():
    assert last_code("```python\na\n```\nbetter:\n```\nb\n```\n```json\n{}\n```\n") == "b\n"
    assert last_code("a = 1") is None

"""Numbers as people write them."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.grading.numeric import numbers_in, parsed_number, same_number

NUMBERS = st.integers(-(10**9), 10**9)


def value(text: str) -> Fraction | None:
    number = parsed_number(text)
    return number and number.value


@given(NUMBERS)
@pytest.mark.parametrize(
    "form", ["{}", "{:,}", "{}.0", "{}.", "${}$", r"\text{{{}}}", '"{}"', "({})", "x = {}", "{} apples"]
)
def test_an_integer_in_every_spelling_is_itself(form, number):
    assert value(form.format(number)) == number


@given(NUMBERS, st.integers(1, 10**6))
def test_a_fraction_in_every_spelling_is_itself(above, below):
    expected = Fraction(above, below)
    sign = "-" if above < 0 else ""
    assert value(f"{above}/{below}") == expected
    assert value(rf"{sign}\frac{{{abs(above)}}}{{{below}}}") == expected
    assert value(rf"{sign}\dfrac {{{abs(above)}}} {{{below}}}") == expected


@given(st.decimals(-(10**6), 10**6, places=4))
def test_a_decimal_is_exact(number):
    assert value(str(number)) == Fraction(number)


@given(NUMBERS, NUMBERS)
def test_numbers_are_the_same_only_when_they_are(first, second):
    one, other = parsed_number(str(first)), parsed_number(f"{second}.0")
    assert one is not None
    assert other is not None
    assert same_number(one, other) == (first == second)


@given(st.text(max_size=60))
def test_any_text_is_read_without_an_error(text):
    number = parsed_number(text)
    assert number is None or isinstance(number.value, Fraction)
    assert all(isinstance(found.value, Fraction) for _, found in numbers_in(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\frac12", "1/2"),
        (r"3\frac{1}{2}", "7/2"),
        ("2 1/2", "5/2"),
        ("−3", "-3"),
        (r"-\frac{1}{4}", "-1/4"),
        ("-$5", "-5"),
        (r"1{,}000", "1000"),
        (r"1\,000", "1000"),
        (r"1.5 \times 10^{-3}", "0.0015"),
        ("1e3", "1000"),
        ("5 million", "5000000"),
        (r"90^\circ", "90"),
        (r"10\text{ cm}^2", "10"),
    ],
)
def test_spellings(text, expected):
    assert value(text) == Fraction(expected)


@pytest.mark.parametrize("text", ["", "2x", "x", r"2\pi", "3, 4", "3 or 4", "1/0", "1e99999", "9" * 1000, "--3", "2^3"])
def test_what_is_no_number(text):
    assert value(text) is None


@pytest.mark.parametrize(
    ("first", "second"), [("50%", "50"), ("50%", "0.5"), ("1/3", "0.3333333"), ("2/3", "0.666667")]
)
def test_percent_and_rounding(first, second):
    one, other = parsed_number(first), parsed_number(second)
    assert one is not None
    assert other is not None
    assert same_number(one, other)
    assert same_number(other, one)


def test_three_decimals_are_too_few_for_a_third():
    third, rounded = parsed_number("1/3"), parsed_number("0.333")
    assert third is not None
    assert rounded is not None
    assert not same_number(third, rounded)


def test_numbers_in_a_text_stand_for_themselves():
    assert [written for written, _ in numbers_in(r"With 2x and x^2 and \sqrt{3} we have 4, -5 and $6.")] == [
        "4",
        "-5",
        "$6",
    ]

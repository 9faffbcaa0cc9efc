"""What a template writes follows from the turns and one moment alone: no clock, time zone, chance or memory."""

import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from jinja2.exceptions import TemplateError

from opd_mcp.identity.chat.rendering import render
from opd_mcp.identity.tokenizers import clock_examples, reads_clock

MOMENT = datetime(2026, 12, 31, 23, 30, 5, tzinfo=UTC)
TURNS = [{"role": "user", "content": "Hello"}]
PROGRAM = """
import sys
from datetime import UTC, datetime
from opd_mcp.identity.chat.rendering import render
moment = datetime(2026, 12, 31, 23, 30, 5, tzinfo=UTC)
print(render(sys.argv[1], [{"role": "user", "content": "Hello"}], {}, to_answer=True, moment=moment))
"""


@pytest.mark.parametrize(
    ("form", "shown"), [("%d %b %Y", "31 Dec 2026"), ("%A, %B %d", "Thursday, December 31"), ("%H:%M:%S", "23:30:05")]
)
def test_the_clock_shows_the_given_moment_wherever_and_whenever_it_is_read(form, shown) -> None:
    template = "{{ strftime_now('" + form + "') }}"
    assert render(template, TURNS, {}, to_answer=True, moment=MOMENT) == shown
    for zone, language in (("Asia/Tokyo", "de_DE.UTF-8"), ("America/Los_Angeles", "C")):
        environment = {**os.environ, "TZ": zone, "LC_ALL": language, "PYTHONHASHSEED": "7"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, template], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == shown


def test_a_recipe_s_option_does_not_replace_the_clock() -> None:
    text = render("{{ strftime_now('%Y') }}", TURNS, {"strftime_now": "1999"}, to_answer=True, moment=MOMENT)
    assert text == "2026"


def test_a_macro_reads_the_same_clock() -> None:
    template = "{% macro head() %}{{ strftime_now('%Y') }}{% endmacro %}{{ head() }}"
    assert render(template, TURNS, {}, to_answer=True, moment=MOMENT) == "2026"


@pytest.mark.parametrize(
    "template", ["{{ ['a', 'b'] | random }}", "{{ lipsum(n=1) }}", "{{ [1, 2, 3] | map('random') | list }}"]
)
def test_a_template_that_draws_at_random_is_refused(template) -> None:
    with pytest.raises((TemplateError, TypeError)):
        render(template, TURNS, {}, to_answer=True, moment=MOMENT)


def test_a_template_that_writes_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(TemplateError, match="half a surrogate pair"):
        render("{{ '\\ud83d' }}", [{"role": "user", "content": "x"}], {}, to_answer=True)


@pytest.mark.parametrize("template", ["{{ raise_exception }}", "{{ cycler('a') }}", "{{ messages[0].items }}"])
def test_a_template_that_writes_an_address_is_refused(template) -> None:
    with pytest.raises(TemplateError, match="address of memory"):
        render(template, TURNS, {}, to_answer=True, moment=MOMENT)


def test_an_address_that_a_prompt_asks_about_is_text() -> None:
    turns = [{"role": "user", "content": "What is <object at 0x7f0fd50eca40>?"}]
    assert "0x7f0fd50eca40" in render("{{ messages[0].content }}", turns, {}, to_answer=True, moment=MOMENT)


def test_what_the_clock_shows_can_be_told_before() -> None:
    template = "{% set d = strftime_now('%d %b %Y') %}{{ d }} {{ strftime_now( \"%H\" ) }}"
    assert reads_clock(template)
    assert not reads_clock("{{ messages }}")
    assert not reads_clock(None)
    assert clock_examples(template, MOMENT) == ["31 Dec 2026", "23"]

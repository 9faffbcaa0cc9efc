"""Chat templates come with models, so the model's author wrote them."""

from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.encoding import encode_prompts
from opd_mcp.engine.models.loading import load_tokenizer
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.identity.tokenizers import chat_template
from opd_mcp.schemas.errors import ArgumentError, DataError, IntegrityError
from opd_mcp.schemas.recipes import PromptingRecipe, RuntimeRecipe

STUDENT = Path(__file__).resolve().parents[3] / "examples" / "arithmetic" / "student"


def encoded(template):
    tokenizer = load_tokenizer(STUDENT)
    tokenizer.chat_template = template
    context = Context(RuntimeRecipe(device="cpu"), PromptingRecipe(), None)
    return encode_prompts([PromptRow("0", "1+1=?")], tokenizer, context)


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr("opd_mcp.engine.data.encoding.TEMPLATE_SECONDS", 0.3)
    with pytest.raises(ArgumentError, match="too_slow"):
        encoded("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x")


def test_a_template_cannot_leave_its_sandbox():
    with pytest.raises(DataError, match="template_failed") as caught:
        encoded("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert isinstance(caught.value.__cause__, SecurityError)


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content.more }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_named_with_its_prompt(template):
    with pytest.raises(DataError, match=r"template_failed.*chat template fails on prompt 0.*Fix: ") as caught:
        encoded(template)
    assert "\n" not in str(caught.value)


def test_a_template_of_megabytes_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("x" * (2 << 20))
    with pytest.raises(IntegrityError, match="chat template"):
        chat_template(tmp_path)


def test_a_template_that_writes_without_end_is_refused_before_it_is_tokenized():
    with pytest.raises(DataError, match="more than 8388608 characters"):
        encoded("{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}")


def test_a_template_gives_the_ids_that_the_tokenizer_gives_itself():
    tokenizer = load_tokenizer(STUDENT)
    turns = [{"role": "user", "content": "1+1=?"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert encoded(tokenizer.chat_template)[0].ids == list(expected)

"""Our rendering of chat templates is transformers' own, in what real templates use."""

import pytest
from jinja2.exceptions import SecurityError, TemplateError
from transformers import PreTrainedTokenizerFast

from opd_mcp.identity.chat.rendering import names_read, render
from opd_mcp.identity.tokenizers import TOKENIZER_FILE
from opd_mcp.schemas.errors import DataError
from tests.conftest import EXAMPLES

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1=? <b>&é"},
    {"role": "assistant", "content": "2", "reasoning_content": "easy", "tool_calls": None},
    {"role": "user", "content": "And\ntwice?"},
]
TEMPLATES = {
    "plain": "{% for message in messages %}\n  {{ message.role }}: {{ message['content'] | trim }}\n{% endfor %}\n",
    "given": "{{ tools }} {{ documents }} {{ add_generation_prompt }} {{ eos_token }} {{ mode if mode is defined }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.tool_calls }}{% endfor %}",
    "macros": "{% macro say(x) %}<{{ x }}>{% endmacro %}{% for m in messages %}{{ say(m.role) }}{% endfor %}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{% for k, v in dict(b=2).items() %}{{ k }}{{ v }}{% endfor %}",
    "enable_thinking": "{% if enable_thinking is defined and enable_thinking is false %}no{% else %}yes{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False, "mode": "x"}])
@pytest.mark.parametrize("to_answer", [False, True])
def test_a_template_writes_what_it_writes_in_transformers(template, options, to_answer):
    file = EXAMPLES / "arithmetic" / "student" / TOKENIZER_FILE
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<eos>", chat_template=template)
    theirs = tokenizer.apply_chat_template(TURNS, add_generation_prompt=to_answer, tokenize=False, **options)
    ours = render(template, TURNS, {**tokenizer.special_tokens_map, **options}, to_answer=to_answer)
    assert ours == theirs


def test_tools_reach_the_template():
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert render("{{ tools[0].function.name }}", TURNS, {}, to_answer=True, tools=tools) == "add"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_a=1) }}",
        "{{ dict.__subclasses__() }}",
    ],
)
def test_a_template_stays_in_its_sandbox(template):
    with pytest.raises((SecurityError, TemplateError)):
        render(template, TURNS, {}, to_answer=True)


def test_no_setting_replaces_what_is_rendered():
    assert render("{{ messages[0].content }}", TURNS, {"messages": [], "tools": 1}, to_answer=True) == "Be brief."


def test_a_template_that_writes_without_end_is_stopped_while_it_writes():
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="too_large"):
        render(endless, TURNS, {}, to_answer=True)


def test_the_names_that_a_template_reads_are_known():
    template = "{% set x = 1 %}{% if enable_thinking is defined %}{{ x + y }}{% endif %}{{ raise_exception('') }}"
    assert names_read(template) == {"enable_thinking", "y"}

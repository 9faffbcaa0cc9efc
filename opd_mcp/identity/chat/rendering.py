"""Chat templates rendered as transformers renders them: the same sandbox, the same names, plain data only.

A model brings its own template, written by the model's author: it may refuse roles, fail, or never end. Time is
limited by the caller: a signal in a worker, the kernel in the child that makes a plan's preview.

The same turns give the same text: the clock shows the moment that the caller gives, in UTC, and a template that draws
at random or writes an address of memory is refused.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from opd_mcp.identity.data.rows import is_valid_text
from opd_mcp.schemas.errors import DataError

MAX_RENDERED_CHARACTERS = 8 << 20
# What a template raises on turns that it has no place for; its expressions fail as Python's do.
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, LookupError)
# What it raises of itself besides, on any turns.
FAILURES = (*REFUSALS, ArithmeticError, RecursionError)
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# What a rendering gives every template; no setting of the recipe replaces them.
GIVEN_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})

# What a clock shows where no prompt is written, as in finding the end of a turn.
NO_MOMENT = datetime(1970, 1, 1, tzinfo=UTC)
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}>")

Turn = Mapping[str, Any]


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's text for masks; its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - as the base declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The body as a scope of its own, as transformers renders it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateNamespace(Namespace):
    """`namespace(…)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        own, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _require_public(name)
        Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _drawn_at_random(*_: Any, **__: Any) -> None:
    raise TemplateError("the template draws at random, so no two renderings are the same")


def _new_dict(*items: Any, **named: Any) -> dict[Any, Any]:
    return dict(*items, **named)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _clock(NO_MOMENT)
    environment.globals["lipsum"] = environment.filters["random"] = _drawn_at_random
    environment.globals["namespace"] = _TemplateNamespace
    environment.globals["dict"] = _new_dict  # not the class, whose attributes lead elsewhere
    return environment


@lru_cache(maxsize=16)
def compiled(template: str) -> Template:
    """The template, ready to render; raises jinja2's TemplateSyntaxError."""
    return _environment().from_string(template)


def names_read(template: str) -> set[str]:
    """The variables that a template reads from outside; raises jinja2's TemplateSyntaxError."""
    environment = _environment()
    return meta.find_undeclared_variables(environment.parse(template)) - set(environment.globals)


def _clock(moment: datetime) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        return moment.strftime(form)

    return strftime_now


def render(
    template: str,
    turns: Sequence[Turn],
    variables: Mapping[str, Any],
    *,
    to_answer: bool,
    moment: datetime = NO_MOMENT,
    tools: Sequence[Turn] | None = None,
) -> str:
    """The turns as the template writes them, `to_answer` with the beginning of the assistant's next turn.

    `moment` is what the template's clock shows, an aware time; `variables` are the special tokens by name and the
    recipe's `chat_template_kwargs`. Raises DataError `too_large` for a template that writes without end, one of
    `REFUSALS` for turns that it refuses and for a text that another process would not write.
    """
    given = {
        "messages": [_shown(turn) for turn in turns],
        "tools": None if tools is None else [dict(tool) for tool in tools],
        "documents": None,
        "add_generation_prompt": to_answer,
        "strftime_now": _clock(moment),
    }
    parts, size = [], 0
    for part in compiled(template).generate({**variables, **given}):
        parts.append(part)
        size += len(part)
        if size > MAX_RENDERED_CHARACTERS:  # the tokenizer's native code would run beyond any limit of time
            raise DataError(
                "too_large",
                f"The chat template makes more than {MAX_RENDERED_CHARACTERS} characters of a prompt.",
                fix="Look at the model's chat_template.jinja, or give another model.",
            )
    text = "".join(parts)
    if not is_valid_text([text]):
        raise TemplateError("the template writes half a surrogate pair")
    if " at 0x" in text and len(ADDRESS.findall(text)) > len(ADDRESS.findall(repr((turns, tools, variables)))):
        raise TemplateError("the template writes an address of memory, so no two processes render the same")
    return text


def system_dropped() -> DataError:
    """The error for a teacher's system prompt that its template does not show."""
    return DataError(
        "system_dropped",
        "The chat template does not show system prompts, so the teacher would not see prompting.teacher_system.",
        fix="Give the text in `teacher_messages` of the prompts, in the user's turn, or a model whose template has "
        "system prompts.",
    )


def _shown(turn: Turn) -> dict[str, Any]:
    """A turn without absent fields, its reasoning under the names that templates read."""
    shown = {name: value for name, value in turn.items() if value is not None}
    reasoning = next((shown[name] for name in REASONING_FIELDS if name in shown), None)
    if reasoning is not None:
        shown = {"thinking": reasoning, **shown, "reasoning_content": reasoning}
    return shown

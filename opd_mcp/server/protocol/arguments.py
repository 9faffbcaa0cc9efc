"""From a call's raw arguments to the typed request, with one clear error for a wrong one."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import ArgumentError, nearest
from opd_mcp.schemas.redaction import holds_secret
from opd_mcp.schemas.requests import Bounds, excess, levels
from opd_mcp.schemas.texts import shortened
from opd_mcp.server.protocol.json_schema import input_schema

RequestT = TypeVar("RequestT", bound=Schema)
_LITERAL_ERRORS = frozenset({"literal_error", "enum"})

BOUNDS = Bounds(depth=16, values=100_000, text=5_000_000, characters=5_000_000)
VALUE_CHARACTERS = 200


def request_from_arguments(tool: str, model: type[RequestT], arguments: Mapping[str, Any]) -> RequestT:
    """The validated request; an explicit null counts as absent.

    Raises ArgumentError: `unknown_argument` with the nearest valid name, or `invalid_argument` naming the field,
    the value and what is expected.
    """
    valid = list(model.model_fields)
    for name in arguments:
        if name not in model.model_fields:
            raise ArgumentError(
                "unknown_argument",
                f"{tool} has no argument {name[:100]!r}.",
                value=name,
                nearest=nearest(name, valid),
                fix=f"Use only: {', '.join(valid)}." if valid else "Call it without arguments.",
            )
    given = {name: _parsed(value) for name, value in arguments.items() if value is not None}
    for name, value in given.items():
        if found := excess(value, BOUNDS):
            raise ArgumentError(
                "invalid_argument",
                f"Argument {name!r} holds {found}.",
                fix="Give less; put long lists of prompts into a file.",
            )
        if any(isinstance(part, float) and not math.isfinite(part) for level in levels(value) for part in level):
            raise _invalid(model, name, "holds a number that is not finite", value)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "missing" and len(first["loc"]) == 1:
            raise ArgumentError(
                "invalid_argument",
                f"{tool} needs the argument {name!r}.",
                fix=f"Give {name}: {_expected(model, name)}.",
            ) from None
        if not name:
            raise ArgumentError("invalid_argument", f"{first['msg']}.", fix="See the tool's parameters.") from None
        raise _invalid(model, name, _reason(error, name), given.get(name)) from None


def require_no_secret(request: Schema, secrets: Iterable[str]) -> None:
    """Raise ArgumentError `secret_in_arguments` for a request that would bring a secret into plans and run records."""
    for name, value in request.to_dict().items():
        if holds_secret(value, secrets):
            raise ArgumentError(
                "secret_in_arguments",
                f"Argument {name!r} holds what looks like a secret, and arguments are kept in plans and run records.",
                fix="Leave it out: keys belong into the server's environment (HF_TOKEN, OPD_TEACHER_KEY), and prompts "
                "that really are about such texts into a file.",
            )


def _invalid(model: type[Schema], name: str, reason: str, value: Any) -> ArgumentError:
    choices = input_schema(model)["properties"][name].get("enum", ())
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return ArgumentError(
        "invalid_argument",
        f"Argument {name!r} {reason}.",
        value=shortened(text, VALUE_CHARACTERS),
        nearest=nearest(str(value), choices),
        fix=f"Give {name}: {_expected(model, name)}.",
    )


def _reason(error: ValidationError, name: str) -> str:
    """What pydantic says about the field; several union branches say one thing: the type is wrong."""
    found = [item for item in error.errors(include_url=False, include_context=False) if item["loc"][0] == name]
    branches = {item["loc"][1:] for item in found}
    if len(branches) > 1 or found[0]["type"] in _LITERAL_ERRORS:
        return "has a value that is not accepted"
    where = "".join(f"[{part}]" for part in found[0]["loc"][1:] if isinstance(part, int))
    text = found[0]["msg"].removeprefix("Value error, ")
    return f"{where} is not valid: {text[:1].lower()}{text[1:]}".strip()


def _expected(model: type[Schema], name: str) -> str:
    """What the input schema accepts for a field, in words."""
    part = input_schema(model)["properties"][name]
    return _described(part)


def _described(part: Mapping[str, Any]) -> str:
    if "enum" in part:
        return "one of " + ", ".join(map(str, part["enum"]))
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "object": "an object"}
    kind = words.get(str(part.get("type", "")))
    if kind and ("minimum" in part or "maximum" in part):
        kind += f" from {part.get('minimum', '-∞')} to {part.get('maximum', '∞')}"
    if part.get("type") == "array":
        items = "texts" if part.get("items", {}).get("type") == "string" else "items"
        kind = f"a list of up to {part['maxItems']} {items}" if "maxItems" in part else f"a list of {items}"
        return f"{kind}: {part['description']}" if "description" in part else kind
    return ", ".join(text for text in (kind, part.get("description")) if text) or "a string"


def _parsed(value: Any) -> Any:
    """Some clients send lists and objects as JSON text; no reference, id or number begins like one."""
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, list | dict) else value

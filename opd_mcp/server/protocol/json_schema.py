"""Short JSON schemas for `tools/list`: what a model must know to call a tool and to read its answer, nothing else."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from opd_mcp.schemas.base import Schema

_NULL = {"type": "null"}
_OBJECT = {"type": "object"}
_INPUT_NOISE = frozenset({"title", "minLength", "maxLength", "maxProperties"})
_OUTPUT_NOISE = _INPUT_NOISE | {"default"}
_SAID_ONCE = ("description", "default", "enum", "maxItems", "minimum", "maximum")
_ARRAY_KEYWORDS = frozenset({"items", "minItems", "maxItems"})
_BRIEF_NOISE = _OUTPUT_NOISE | {"enum", "description"}


def input_schema(model: type[Schema], described_by: type[Schema] | None = None) -> dict[str, Any]:
    """The flat input schema of a tool; unknown arguments are forbidden.

    Optional arguments are listed without the description, default, choices and bounds that they share with those of
    the request `described_by`: many tools have them, and one of them says what they are.
    """
    schema = model.model_json_schema()
    properties = {name: _without_noise(part, _INPUT_NOISE) for name, part in schema.get("properties", {}).items()}
    required = schema.get("required", [])
    known = {} if described_by is None else input_schema(described_by)["properties"]
    for name in properties.keys() & known.keys() - set(required):
        said = {key: value for key, value in known[name].items() if key in _SAID_ONCE}
        properties[name] = {key: value for key, value in properties[name].items() if not _is_said(value, said.get(key))}
        if (items := properties[name].get("items")) is not None and items == known[name].get("items"):
            properties[name]["items"] = {key: value for key, value in items.items() if key not in _SAID_ONCE}
    short: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**short, "required": required} if required else short


def _is_said(value: Any, said: Any) -> bool:
    """Whether a keyword's value is the described one, or choices are among the described ones."""
    return bool(value == said) or (isinstance(value, list) and isinstance(said, list) and set(value) <= set(said))


@cache
def _outline(opaque: frozenset[str]) -> type[GenerateJsonSchema]:
    """The generator that neither enters the models named in `opaque` nor writes defaults, for a quick start."""

    class Outline(GenerateJsonSchema):
        def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
            return dict(_OBJECT) if schema["cls"].__name__ in opaque else super().model_schema(schema)

        def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
            return self.generate_inner(schema["schema"])

    return Outline


def output_schema(model: type[Schema], opaque: frozenset[str] = frozenset(), *, brief: bool = False) -> dict[str, Any]:
    """The output schema of a tool as its results are really sent: without nulls, absent when unknown.

    Nested models are written in place; those named in `opaque` are published as a plain object. Numbers are never
    required, since a NaN is left out of a result. `brief` names the fields alone, for answers whose meaning
    another tool's schema explains.
    """
    schema = model.model_json_schema(schema_generator=_outline(opaque))
    definitions = schema.pop("$defs", {})
    required = [name for name in schema.get("required", ()) if schema["properties"][name].get("type") != "number"]
    short: dict[str, Any] = _without_noise(
        _in_place(schema, definitions, opaque), _BRIEF_NOISE if brief else _OUTPUT_NOISE
    )
    for noise in ("description", "additionalProperties"):
        short.pop(noise, None)
    if brief:
        short["properties"] = {name: {} for name in short["properties"]}
    return {**short, "required": required} if required else short


def _in_place(node: Any, definitions: Mapping[str, Any], opaque: frozenset[str]) -> Any:
    """The node with every reference replaced by what it refers to, in short: its properties' types.

    What a model holds of its own kind is a plain object.
    """
    if isinstance(node, list):
        return [_in_place(item, definitions, opaque) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" not in node:
        return {key: _in_place(value, definitions, opaque) for key, value in node.items()}
    name = node["$ref"].removeprefix("#/$defs/")
    properties = {} if name in opaque else definitions[name].get("properties", {})
    target = (
        {"type": "object", "properties": _in_place(properties, definitions, opaque | {name})} if properties else _OBJECT
    )
    return {**target, **{key: value for key, value in node.items() if key != "$ref"}}


def _without_noise(node: Any, noise: frozenset[str], *, names: bool = False) -> Any:
    """The node without noise keys and null alternatives; below `properties` keys are names, not keywords."""
    if isinstance(node, list):
        return [_without_noise(item, noise) for item in node]
    if not isinstance(node, dict):
        return node
    if names:
        return {name: _without_noise(value, noise) for name, value in node.items()}
    node = _without_null_alternative(node)
    if "description" in node:
        # One description is enough: those of alternatives and of a list's items only repeat the type.
        if "anyOf" in node:
            node["anyOf"] = [_undescribed(item) for item in node["anyOf"]]
        if "items" in node:
            node["items"] = _undescribed(node["items"])
    if "anyOf" in node:
        node = _types_together(node)
    return {
        key: _without_noise(value, noise, names=key == "properties")
        for key, value in node.items()
        if key not in noise and not _says_nothing(key, value)
    }


def _without_null_alternative(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node with `X | None` read as X: an absent value is left out, never sent as null."""
    alternatives = node.get("anyOf")
    if not alternatives or _NULL not in alternatives:
        return dict(node)
    rest = [item for item in alternatives if item != _NULL]
    outer = {key: value for key, value in node.items() if key != "anyOf"}
    if len(rest) > 1:
        return {**outer, "anyOf": rest}
    return _without_null_alternative({**rest[0], **outer})


def _undescribed(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: part for key, part in node.items() if key != "description"}


def _types_together(node: dict[str, Any]) -> dict[str, Any]:
    """The node with `anyOf` of different types as one list of types, where no keyword bears on two of them.

    `maxItems` and `items` say nothing of a text, so that text or list is one part with both types.
    """
    alternatives = [_without_noise(item, _INPUT_NOISE) for item in node["anyOf"]]
    types = [item.get("type") for item in alternatives]
    keywords = [key for item in alternatives for key in item if key != "type"]
    plain = all(isinstance(name, str) for name in types) and len(set(types)) == len(types)
    if not plain or not set(keywords) <= _ARRAY_KEYWORDS or len(set(keywords)) != len(keywords):
        return node
    together = {key: value for item in alternatives for key, value in item.items()}
    return {**together, "type": types, **{key: value for key, value in node.items() if key != "anyOf"}}


def _says_nothing(key: str, value: Any) -> bool:
    """Whether a keyword repeats what its absence means: no, none, zero or empty as a default; any other property."""
    return (key == "default" and not value) or (key == "additionalProperties" and value is True)


def structured(record: Schema) -> dict[str, Any]:
    """The record as JSON-ready values; what is unknown (null, NaN, infinite) is left out."""
    values = known(record.model_dump(mode="json", exclude_none=True))
    assert isinstance(values, dict)
    return values


def known(value: Any) -> Any:
    """The value without unknown entries; in a list an unknown entry stays as null, to keep positions."""
    if isinstance(value, dict):
        return {key: known(part) for key, part in value.items() if not _is_unknown(part)}
    if isinstance(value, list | tuple):
        return [None if _is_unknown(part) else known(part) for part in value]
    return value


def _is_unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))

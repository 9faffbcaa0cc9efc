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
_BRIEF_NOISE = _OUTPUT_NOISE | {"enum", "description"}


def input_schema(model: type[Schema]) -> dict[str, Any]:
    """The flat input schema of a tool; unknown arguments are forbidden."""
    schema = model.model_json_schema()
    properties = {name: _without_noise(part, _INPUT_NOISE) for name, part in schema.get("properties", {}).items()}
    short: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if required := schema.get("required"):
        short["required"] = required
    return short


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
    required, since a NaN is left out of a result. `brief` leaves out descriptions and the values of enumerations, for
    answers whose meaning another tool's schema explains.
    """
    schema = model.model_json_schema(schema_generator=_outline(opaque))
    definitions = schema.pop("$defs", {})
    required = [name for name in schema.get("required", ()) if schema["properties"][name].get("type") != "number"]
    short: dict[str, Any] = _without_noise(
        _in_place(schema, definitions, opaque), _BRIEF_NOISE if brief else _OUTPUT_NOISE
    )
    for noise in ("description", "additionalProperties"):
        short.pop(noise, None)
    return {**short, "required": required} if required else short


def _in_place(node: Any, definitions: Mapping[str, Any], opaque: frozenset[str]) -> Any:
    """The node with every reference replaced by what it refers to, in short: its properties' types."""
    if isinstance(node, list):
        return [_in_place(item, definitions, opaque) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" not in node:
        return {key: _in_place(value, definitions, opaque) for key, value in node.items()}
    name = node["$ref"].removeprefix("#/$defs/")
    properties = {} if name in opaque else definitions[name].get("properties", {})
    target = {"type": "object", "properties": _in_place(properties, definitions, opaque)} if properties else _OBJECT
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
    if "anyOf" in node and "description" in node:
        # One description is enough: the alternatives' own only repeat the type.
        node["anyOf"] = [{key: part for key, part in item.items() if key != "description"} for item in node["anyOf"]]
    return {
        key: _without_noise(value, noise, names=key == "properties")
        for key, value in node.items()
        if key not in noise and not (key == "default" and value is None) and not _says_nothing(key, value)
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


def _says_nothing(key: str, value: Any) -> bool:
    return key == "additionalProperties" and value is True


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

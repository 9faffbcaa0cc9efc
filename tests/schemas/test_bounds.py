"""No request holds a text, a list or a dictionary without a bound, nested values of overrides included."""

import inspect

import pytest
from pydantic import ValidationError

from opd_mcp.schemas import requests
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.requests import StartSft

MODELS = [
    model
    for _, model in inspect.getmembers(requests, inspect.isclass)
    if issubclass(model, Schema) and model is not Schema
]


def unbounded(node, place=""):
    """The places in a JSON schema that may be of any size."""
    if isinstance(node, list):
        return [found for index, part in enumerate(node) for found in unbounded(part, f"{place}/{index}")]
    if not isinstance(node, dict):
        return []
    types = node.get("type") or []
    bounds = {"string": "maxLength", "array": "maxItems", "object": "maxProperties"}
    needed = {bounds[kind] for kind in ([types] if isinstance(types, str) else types) if kind in bounds}
    named = "enum" in node or "const" in node or node.get("additionalProperties") is False
    found = [place] if not named and not needed <= node.keys() else []
    return found + [hit for name, part in node.items() for hit in unbounded(part, f"{place}/{name}")]


def test_there_are_requests_to_look_at():
    assert len(MODELS) >= 15
    assert unbounded({"properties": {"a": {"type": "string"}}}) == ["/properties/a"]
    assert unbounded({"a": {"type": ["string", "object"], "maxLength": 1}}) == ["/a"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_text_list_and_dictionary_of_a_request_is_bounded(model):
    schema = model.model_json_schema()
    assert schema["additionalProperties"] is False
    assert unbounded(schema) == []


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", ["x" * 2001, list(range(1001)), nested(20), {"a": {"b" * 2001: 1}}, [["x" * 2001]], 10**30]
)
def test_nested_values_of_overrides_are_bounded(value):
    with pytest.raises(ValidationError, match="overrides"):
        StartSft(student="/s", responses="/r", overrides={"sft.steps": value})


def test_names_of_overrides_are_bounded():
    with pytest.raises(ValidationError, match="overrides"):
        StartSft(student="/s", responses="/r", overrides={"x" * 3000: 1})
    with pytest.raises(ValidationError, match="overrides"):
        StartSft(student="/s", responses="/r", overrides={str(index): 1 for index in range(101)})


def test_usual_overrides_pass():
    overrides = {"sft.steps": 3, "prompting.chat_template_kwargs": {"enable_thinking": False, "tools": [{"name": "a"}]}}
    assert StartSft(student="/s", responses="/r", overrides=overrides).overrides == overrides

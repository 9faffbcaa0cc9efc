"""The published schemas are short, flat where they go in, and true of what comes out."""

from contextlib import nullcontext

import jsonschema
import pytest
from pydantic import ValidationError

from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.requests import BuildTeacherCache, PlanDistillation, StartDistillation
from opd_mcp.schemas.runs import RunSnapshot, RunStatus
from opd_mcp.server.protocol.json_schema import input_schema, output_schema, structured


def test_an_optional_argument_is_its_type_without_null():
    properties = input_schema(StartDistillation)["properties"]
    assert properties["student"] == {"type": "string", "description": "absolute path, artifact, run or Hub id"}
    assert properties["benchmark"]["default"] is True
    assert properties["prompts"] == {
        "type": ["string", "array"],
        "items": {"type": "string"},
        "maxItems": 200,
        "description": "reference, or up to 200 inline",
    }


@pytest.mark.parametrize(
    ("value", "valid"), [("a", True), (["a"], True), (["a"] * 201, False), ([1], False), (1, False)]
)
def test_a_list_of_types_accepts_what_pydantic_accepts(value, valid):
    schema = input_schema(PlanDistillation)
    arguments = {"student": "/s", "teacher": "/t", "prompts": value}
    assert jsonschema.Draft202012Validator(schema).is_valid(arguments) is valid
    with nullcontext() if valid else pytest.raises(ValidationError):
        PlanDistillation.model_validate(arguments)


def test_what_the_plan_says_of_an_optional_argument_is_said_once():
    alone = input_schema(BuildTeacherCache)["properties"]
    listed = input_schema(BuildTeacherCache, PlanDistillation)["properties"]
    assert alone.keys() == listed.keys()
    assert alone["overrides"]["description"]
    assert listed["overrides"] == {"type": "object"}
    assert listed["preset"] == {"type": "string", "default": "quick"}, "the plan's default is another"
    assert listed["student"] == alone["student"]
    assert listed["topk"] == alone["topk"]


def test_a_brief_answer_names_every_field_and_those_that_are_always_there():
    full, brief = output_schema(RunSnapshot), output_schema(RunSnapshot, brief=True)
    assert brief["properties"].keys() == full["properties"].keys()
    assert brief["required"] == full["required"]
    assert brief["properties"]["run_id"] == {}


def test_a_field_named_like_a_keyword_is_kept():
    assert "method" in input_schema(PlanDistillation)["properties"]
    assert "code" in str(output_schema(RunStatus)["properties"]["error"])


def test_nested_models_are_in_place_and_opaque_ones_plain():
    schema = output_schema(Plan, frozenset({"Recipe"}))
    assert "$ref" not in str(schema)
    assert schema["properties"]["recipe"] == {"type": "object"}
    assert schema["properties"]["phases"]["items"]["properties"]["satisfied_by"] == {"type": "string"}


@pytest.mark.parametrize("opaque", [frozenset(), frozenset({"Recipe", "RunInputs", "ModelIdentity", "TeacherClaim"})])
def test_an_answer_holds_its_schema(service, opaque):
    jsonschema.validate(structured(service.plan(None)), output_schema(Plan, opaque))
    jsonschema.validate(structured(service.run), output_schema(RunStatus, opaque))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({}, output_schema(RunStatus, opaque))


def test_a_number_is_never_required():
    estimates = output_schema(Plan)["properties"]["estimates"]["items"]["properties"]
    assert estimates["seconds"] == {"type": "number"}
    assert "required" not in output_schema(Plan)["properties"]["estimates"]["items"]

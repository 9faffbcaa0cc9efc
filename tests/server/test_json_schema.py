"""The published schemas are short, flat where they go in, and true of what comes out."""

import jsonschema
import pytest

from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.requests import PlanDistillation, StartDistillation
from opd_mcp.schemas.runs import RunStatus
from opd_mcp.server.protocol.json_schema import input_schema, output_schema, structured


def test_an_optional_argument_is_its_type_without_null():
    properties = input_schema(StartDistillation)["properties"]
    assert properties["student"] == {"type": "string", "description": "absolute path, artifact, run or Hub id"}
    assert properties["benchmark"]["default"] is True
    assert properties["prompts"]["anyOf"][1] == {"type": "array", "items": {"type": "string"}, "maxItems": 200}


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

"""Raw arguments become a typed request, or one ArgumentError."""

import pytest

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.requests import BenchmarkStudent, PlanDistillation, StartDistillation
from opd_mcp.server.protocol.arguments import request_from_arguments
from opd_mcp.server.tools.table import TOOLS


def test_a_reference_that_is_not_json_stays_a_reference():
    request = request_from_arguments("t", PlanDistillation, {"student": "[x", "teacher": "{y", "prompts": "/p.jsonl"})
    assert (request.student, request.teacher) == ("[x", "{y")


def test_null_means_absent():
    request = request_from_arguments("t", StartDistillation, {"plan_id": "p", "preset": None, "overrides": None})
    assert request == StartDistillation(plan_id="p")


def test_an_item_of_a_list_is_named():
    with pytest.raises(ArgumentError, match=r"\[1\] is not valid") as caught:
        request_from_arguments("t", BenchmarkStudent, {"model": "/m", "prompts": "/p", "baselines": ["/b", 3]})
    assert caught.value.code == "invalid_argument"


def test_an_argument_that_looks_like_an_internal_name_is_unknown_too():
    for name in ("arguments", "context", "model_config", "self"):
        with pytest.raises(ArgumentError) as caught:
            request_from_arguments("t", StartDistillation, {name: 1})
        assert caught.value.code == "unknown_argument"


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [nested(900), {str(i): "x" * 100_000 for i in range(60)}, {"k": [0] * 200_000}])
def test_what_is_too_deep_or_too_large_is_refused(value):
    arguments = {"model": "/m", "prompts": "/p", "overrides": {"prompting.chat_template_kwargs": value}}
    with pytest.raises(ArgumentError, match=r"nested deeper|characters") as caught:
        request_from_arguments("t", BenchmarkStudent, arguments)
    assert len(str(caught.value)) < 500


def test_what_is_expected_is_said_once():
    for spec in TOOLS:
        for name in spec.request.model_fields:
            with pytest.raises(ArgumentError) as caught:
                request_from_arguments(spec.name, spec.request, {name: float("nan")})
            assert caught.value.fix.startswith(f"Give {name}: ")
            assert caught.value.fix.count("up to") <= 1, caught.value.fix

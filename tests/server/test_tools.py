"""Every tool through a real client: what is called, what is answered, and that nothing comes as null."""

import json
from typing import Any

import pytest

pytestmark = pytest.mark.anyio

MODELS = {"student": "/data/student", "teacher": "/data/teacher", "prompts": "/data/prompts.jsonl"}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "inspect_setup": ("setup", {}),
    "plan_distillation": ("plan", MODELS),
    "assess_overhead": ("assess_overhead", MODELS),
    "generate_teacher_responses": ("generate_teacher_responses", {"teacher": "/data/t", "prompts": ["1+1=?"]}),
    "start_sft": ("start_sft", {"student": "/data/s", "responses": "responses-1"}),
    "build_teacher_cache": ("build_teacher_cache", MODELS | {"topk": 8}),
    "start_distillation": ("start_distillation", {"plan_id": "plan-1"}),
    "sweep": ("sweep", {"cache_id": "cache-1", "grid": {"distill.steps": [1, 2]}}),
    "benchmark_student": ("benchmark_student", {"model": "run-1", "prompts": "/data/eval.jsonl"}),
    "sample_model": ("sample_model", {"model": "run-1", "prompts": ["1+1=?"]}),
    "export_student": ("export_student", {"model": "run-1", "destination": "/out/student"}),
    "inspect_cache": ("inspect_cache", {"cache": "cache-1"}),
    "get_run_status": ("status", {}),
    "list_runs": ("list_runs", {"state": "running", "limit": 5}),
    "cancel_run": ("cancel", {"run_id": "lightning-arithmetic-7f3a"}),
    "resume_run": ("resume", {"run_id": "lightning-arithmetic-7f3a"}),
    "get_run_metrics": ("run_metrics", {"run_ids": ["latest"], "keys": ["loss"], "max_points": 10}),
    "compare_runs": ("compare_runs", {"tag": "sweep-1"}),
    "get_run_logs": ("run_logs", {"contains": "sft"}),
    "list_artifacts": ("list_artifacts", {"kind": "model"}),
    "open_dashboard": ("dashboard", {}),
    "dashboard_feed": ("dashboard_page", {"run_ids": ["lightning-arithmetic-7f3a"]}),
}
READ_ONLY = {"inspect_setup", "plan_distillation", "inspect_cache", "get_run_status", "list_runs"} | {
    "get_run_metrics",
    "compare_runs",
    "get_run_logs",
    "list_artifacts",
    "open_dashboard",
    "dashboard_feed",
}


def nulls(value: Any) -> bool:
    """Whether a field is null; a null in a list of values holds a place."""
    if isinstance(value, dict):
        return any(part is None or nulls(part) for part in value.values())
    return isinstance(value, list) and any(nulls(part) for part in value)


async def test_the_server_has_exactly_the_tools_of_the_contract(connect):
    async with connect() as client:
        tools = (await client.list_tools()).tools
    assert [tool.name for tool in tools] == list(CALLS)
    for tool in tools:
        assert tool.annotations.read_only_hint is (tool.name in READ_ONLY)
        if tool.name in READ_ONLY:  # the protocol gives the two a meaning only for tools that change something
            assert tool.annotations.destructive_hint is tool.annotations.idempotent_hint is None
        else:
            assert tool.annotations.destructive_hint is (tool.name == "cancel_run")
            assert tool.annotations.idempotent_hint is not None
        assert tool.annotations.open_world_hint is not None
        assert tool.input_schema["additionalProperties"] is False
        assert tool.output_schema["type"] == "object"
        assert len(tool.description) < 500


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_reaches_the_service_and_answers_without_nulls(connect, service, name):
    method, arguments = CALLS[name]
    async with connect() as client:
        await client.list_tools()  # the client then checks every answer against its output schema
        result = await client.call_tool(name, arguments)
    assert not result.is_error, result.content
    assert service.calls[0][0] == method
    assert not nulls(result.structured_content)
    assert len(result.content) == 1
    assert len(result.content[0].text) < 2500
    assert "MainThread" not in service.threads  # a slow disk must not stop the event loop


async def test_arguments_arrive_as_the_request_model(connect, service):
    async with connect() as client:
        await client.call_tool("plan_distillation", MODELS | {"overrides": {"distill.steps": 3}, "sft_prompts": None})
    request = service.calls[0][1]
    assert request.student == "/data/student"
    assert request.overrides == {"distill.steps": 3}
    assert request.sft_prompts is None
    assert request.method == "lightning"


async def test_lists_and_objects_sent_as_json_text_are_understood(connect, service):
    arguments = MODELS | {"prompts": json.dumps(["1+1=?", "2+2=?"]), "overrides": '{"distill.steps": 3}'}
    async with connect() as client:
        await client.call_tool("plan_distillation", arguments)
    assert service.calls[0][1].prompts == ["1+1=?", "2+2=?"]
    assert service.calls[0][1].overrides == {"distill.steps": 3}


async def test_a_nan_is_absent_and_breaks_nothing(connect):
    async with connect() as client:
        await client.list_tools()
        plan = await client.call_tool("plan_distillation", MODELS)
        status = await client.call_tool("get_run_status", {})
    assert "seconds" not in plan.structured_content["estimates"][0]["phases"][0]
    assert status.structured_content["metrics"]["loss"] == {}
    assert "nan" not in status.content[0].text.lower()


async def test_the_listing_is_small(connect):
    async with connect() as client:
        listing = await client.list_tools()
        instructions = client.instructions
    assert len(listing.model_dump_json(by_alias=True, exclude_none=True)) <= 24_000
    assert len(instructions) <= 1600  # 400 tokens at four characters each


async def test_input_schemas_are_flat(connect):
    async with connect() as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    plan = tools["plan_distillation"].input_schema
    assert plan["required"] == ["student", "teacher", "prompts"]
    assert plan["properties"]["method"] == {
        "type": "string",
        "enum": ["lightning", "live", "sft"],
        "default": "lightning",
    }
    assert "$defs" not in plan
    assert tools["get_run_status"].input_schema["properties"]["wait_seconds"]["maximum"] == 25

"""The tasks extension over the real server: who gets a task, what it says, and which errors there are."""

import anyio
import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    Request,
    Result,
)

from opd_mcp.client import CreatedTask, TaskCancelled, TasksClient
from opd_mcp.schemas.runs import Failure
from opd_mcp.server.app import build_server

pytestmark = pytest.mark.anyio

START = ("start_distillation", {"plan_id": "plan-1"})


@pytest.fixture
async def tasks(service):
    async with TasksClient(build_server(service)) as client:
        yield client


async def error_code(awaitable) -> int:
    with pytest.raises(MCPError) as caught:
        await awaitable
    return caught.value.code


async def test_a_client_that_declares_tasks_gets_one(tasks, service):
    created = await tasks.start(*START)
    assert isinstance(created, CreatedTask)
    assert (created.task_id, created.status) == (service.run.run_id, "working")
    assert created.created_at == service.run.created_at
    assert created.ttl_ms is None
    assert 1000 <= created.poll_interval_ms <= 10_000
    assert "120/400 steps" in created.status_message


async def test_a_resumed_run_is_the_task_that_it_was(tasks, service):
    created = await tasks.start("resume_run", {"run_id": service.run.run_id})
    assert (created.task_id, created.status) == (service.run.run_id, "working")


async def test_the_envelope_is_flat_and_says_that_the_task_is_kept(tasks):
    created = (await tasks.start(*START)).model_dump(by_alias=True)
    assert "task" not in created
    assert "ttlMs" in created
    assert not {"result", "error", "inputRequests", "requestState"} & {k for k, v in created.items() if v is not None}


async def test_tools_that_start_nothing_answer_as_always(tasks):
    answer = await tasks.start("list_runs", {})
    assert answer.structured_content["total"] == 1


async def test_a_refused_start_is_a_plain_error(tasks):
    answer = await tasks.start("start_distillation", {"plan": "x"})
    assert answer.is_error
    assert "[unknown_argument]" in answer.content[0].text


async def test_all_other_clients_get_the_run_id(connect, service):
    async with connect() as client:
        answer = await client.call_tool(*START)
    assert answer.structured_content["run_id"] == service.run.run_id


async def test_a_legacy_client_follows_the_run_with_the_same_call(service):
    async with TasksClient(build_server(service), mode="legacy") as client, anyio.create_task_group() as group:

        async def finish():
            await anyio.sleep(0.3)
            service.run = service.run.model_copy(update={"state": "succeeded", "result": {"paths": {"model": "/m"}}})
            service.token = "succeeded"

        group.start_soon(finish)
        with anyio.fail_after(10):
            result = await client.run(*START)
    assert result.structured_content["result"] == {"paths": {"model": "/m"}}


async def test_progress_is_told_and_the_result_is_the_snapshot_of_the_start(tasks, service):
    said = []

    def note(message):
        said.append(message)
        service.run = service.run.model_copy(update={"state": "succeeded", "result": {"artifacts": {"model": "m-1"}}})

    with anyio.fail_after(10):
        result = await tasks.run(*START, on_progress=note)
    assert "120/400 steps" in said[0]
    assert not result.is_error
    assert result.structured_content["result"] == {"artifacts": {"model": "m-1"}}
    schema = next(tool for tool in (await tasks.client.list_tools()).tools if tool.name == START[0]).output_schema
    assert set(result.structured_content) <= set(schema["properties"])


@pytest.mark.parametrize("state", ["failed", "lost"])
async def test_a_crashed_run_is_completed_with_an_error(tasks, service, state):
    failure = Failure(code="internal_error", cause="ZeroDivisionError", fix="Read the log.")
    service.run = service.run.model_copy(update={"state": state, "error": failure})
    task = await tasks.get(service.run.run_id)
    assert task.status == "completed"
    assert task.result["isError"] is True
    assert "[internal_error]" in task.result["content"][0]["text"]
    assert (await tasks.wait(service.run.run_id)).is_error


async def test_a_cancelled_run_is_a_cancelled_task(tasks, service):
    service.run = service.run.model_copy(update={"state": "cancelled"})
    assert (await tasks.get(service.run.run_id)).status == "cancelled"
    with pytest.raises(TaskCancelled):
        await tasks.wait(service.run.run_id)


async def test_cancelling_reaches_the_run_and_may_come_too_late(tasks, service):
    await tasks.cancel(service.run.run_id)
    assert ("cancel", service.run.run_id) in service.calls
    await tasks.update(service.run.run_id, {"nobody": {"action": "accept"}})


@pytest.mark.parametrize("task_id", ["no-such-run", "latest", "../runs", ""])
async def test_an_unknown_id_is_an_invalid_parameter(tasks, task_id):
    assert await error_code(tasks.get(task_id)) == INVALID_PARAMS
    assert await error_code(tasks.cancel(task_id)) == INVALID_PARAMS
    assert await error_code(tasks.update(task_id, {})) == INVALID_PARAMS


class _Other(Request[dict, str]):
    method: str
    params: dict


@pytest.mark.parametrize("method", ["tasks/list", "tasks/result"])
async def test_methods_of_the_first_generation_are_gone(tasks, service, method):
    request = _Other(method=method, params={"taskId": service.run.run_id})
    assert await error_code(tasks.client.session.send_request(request, Result)) == METHOD_NOT_FOUND


@pytest.mark.parametrize(("mode", "code"), [("auto", MISSING_REQUIRED_CLIENT_CAPABILITY), ("legacy", METHOD_NOT_FOUND)])
async def test_an_undeclared_client_is_told_what_is_missing(service, mode, code):
    async with Client(build_server(service), mode=mode) as client:
        for method in ("tasks/get", "tasks/cancel", "tasks/update"):
            params = {"taskId": service.run.run_id, "inputResponses": {}}
            assert await error_code(client.session.send_request(_Other(method=method, params=params), Result)) == code

"""The bounded wait: it returns on a change, an expired one says so, and a repeated poll is short."""

import anyio
import pytest

from opd_mcp.schemas.next_action import NextAction
from opd_mcp.schemas.runs import Alert, RunStatus

pytestmark = pytest.mark.anyio


async def text_and_status(client, **arguments):
    result = await client.call_tool("get_run_status", arguments)
    assert not result.is_error, result.content
    return result.content[0].text, RunStatus.model_validate(result.structured_content)


async def test_a_wait_ends_as_soon_as_the_phase_changes(connect, service):
    async with connect() as client, anyio.create_task_group() as tasks:

        async def move_on():
            await anyio.sleep(0.3)
            service.run = service.run.model_copy(update={"phase": "benchmark"})
            service.token = "running/benchmark/0"

        tasks.start_soon(move_on)
        with anyio.fail_after(10):
            text, status = await text_and_status(client, wait_seconds=25)
    assert status.phase == "benchmark"
    assert not status.unchanged
    assert "do not restart" not in status.next_action.why
    assert "benchmark" in text


async def test_leaving_the_queue_is_not_worth_a_call_but_the_first_phase_is(connect, service):
    service.run = service.run.model_copy(update={"state": "queued", "phase": None})
    service.token = "queued/-/0"
    async with connect() as client:
        await text_and_status(client)
        service.run = service.run.model_copy(update={"state": "running"})
        service.token = "running/-/0"
        _, status = await text_and_status(client, wait_seconds=0.5)
        assert "do not restart" in status.next_action.why
        service.run = service.run.model_copy(update={"phase": "sft"})
        service.token = "running/sft/0"
        with anyio.fail_after(10):
            _, status = await text_and_status(client, wait_seconds=25)
    assert status.phase == "sft"


async def test_phases_in_quick_succession_are_told_in_one_answer(connect, service):
    async with connect() as client, anyio.create_task_group() as tasks:

        async def hurry():
            for phase in ("score", "distill", "benchmark"):
                service.run = service.run.model_copy(update={"phase": phase})
                service.token = f"running/{phase}/0"
                await anyio.sleep(0.1)

        await text_and_status(client)
        tasks.start_soon(hurry)
        with anyio.fail_after(10):
            _, status = await text_and_status(client, wait_seconds=25)
    assert status.phase == "benchmark"


async def test_a_change_since_the_last_answer_ends_a_wait_at_once(connect, service):
    async with connect() as client:
        await text_and_status(client)
        service.run = service.run.model_copy(update={"phase": "benchmark"})
        service.token = "running/benchmark/0"
        with anyio.fail_after(10):
            _, status = await text_and_status(client, wait_seconds=25)
    assert status.phase == "benchmark"


async def test_a_wait_ends_with_an_alert(connect, service):
    async with connect() as client:
        await text_and_status(client)
        alert = Alert(time="2026-08-01T10:00:00Z", code="kl_rising", message="The reverse KL rises.")
        service.run = service.run.model_copy(update={"alerts": [alert]})
        service.token = "running/distill/1"
        with anyio.fail_after(10):
            text, status = await text_and_status(client, wait_seconds=25)
    assert status.alerts == [alert]
    assert "ALERT kl_rising" in text


async def test_an_expired_wait_says_still_running(connect):
    async with connect() as client:
        text, status = await text_and_status(client, wait_seconds=0.3)
    assert status.state == "running"
    assert "Still running; do not restart" in status.next_action.why
    assert "do not restart" in text


async def test_a_wait_on_an_ended_run_returns_at_once(connect, service):
    service.run = service.run.model_copy(update={"state": "succeeded", "result": {"model": "/w/artifacts/model/m1"}})
    async with connect() as client:
        with anyio.fail_after(10):
            text, status = await text_and_status(client, wait_seconds=25)
    assert status.result == {"model": "/w/artifacts/model/m1"}
    assert "/w/artifacts/model/m1" in text


async def test_a_repeated_poll_without_change_is_at_most_240_bytes(connect, service):
    long_id = "lightning-" + "x" * 180
    service.run = service.run.model_copy(
        update={
            "run_id": long_id,
            "next_action": NextAction(why="a" * 300),
            "metrics": {"m" * 300: service.run.metrics["reverse_kl"]},
        }
    )
    async with connect() as client:
        first, _ = await text_and_status(client)
        second, status = await text_and_status(client)
        waited, _ = await text_and_status(client, wait_seconds=0.1)
    assert len(first) > 240
    assert status.unchanged
    for text in (second, waited):
        assert len(text.encode()) <= 240
        assert "120/400 steps" in text
        assert "do not restart" in text


async def test_a_repeated_poll_of_an_ended_run_is_short_and_its_record_complete(connect, service):
    service.run = service.run.model_copy(update={"state": "succeeded", "result": {"model": "/w/" + "m" * 500}})
    async with connect() as client:
        await text_and_status(client)
        text, status = await text_and_status(client)
    assert len(text.encode()) <= 240
    assert status.result == service.run.result


async def test_a_change_after_the_last_answer_is_told_in_full(connect, service):
    async with connect() as client:
        await text_and_status(client)
        service.run = service.run.model_copy(update={"phase": "benchmark"})
        _, status = await text_and_status(client)
    assert not status.unchanged


async def test_a_wait_reports_progress(connect):
    seen = []

    async def note(progress, total, message):
        seen.append((progress, total, message))

    async with connect() as client:
        await client.call_tool("get_run_status", {"wait_seconds": 0.3}, progress_callback=note)
    assert seen
    assert seen[0][1] == 0.3
    assert "120/400 steps" in seen[0][2]


async def test_many_waits_leave_the_server_quick(connect, service):
    async with connect() as client, anyio.create_task_group() as tasks:
        for _ in range(60):
            tasks.start_soon(text_and_status_quietly, client)
        await anyio.sleep(0.2)
        with anyio.fail_after(5):
            result = await client.call_tool("list_runs", {})
        tasks.cancel_scope.cancel()
    assert result.structured_content["total"] == 1


async def text_and_status_quietly(client):
    await client.call_tool("get_run_status", {"wait_seconds": 20})


async def test_a_cancelled_wait_never_touches_the_run(connect, service):
    async with connect() as client:
        with anyio.move_on_after(0.3) as scope:
            await client.call_tool("get_run_status", {"wait_seconds": 20})
        assert scope.cancelled_caught
        assert not (await client.call_tool("list_runs", {})).is_error
    assert {name for name, _ in service.calls} == {"status", "list_runs"}

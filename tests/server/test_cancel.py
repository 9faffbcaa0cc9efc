"""A cancel request shows in the status from the moment it is acknowledged until the worker heeds it."""

import pytest

pytestmark = pytest.mark.anyio


async def call(client, tool, **arguments):
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return result.content[0].text, result.structured_content


async def test_a_request_is_pending_until_it_is_heeded(client, run):
    run_id, journal = run
    _, before = await call(client, "get_run_status", run_id=run_id)
    assert "cancel_requested" not in before
    text, asked = await call(client, "cancel_run", run_id=run_id)
    assert "cancel requested" in text
    assert "cancellation is pending" in asked["next_action"]["why"]

    text, pending = await call(client, "get_run_status", run_id=run_id)
    assert (pending["state"], pending["unchanged"]) == ("running", False)
    assert pending["cancel_requested"].endswith("Z")
    assert f"cancel requested at {pending['cancel_requested']}, pending" in text
    assert "cancellation is pending" in pending["next_action"]["why"]

    journal.append("state", {"state": "cancelled"})
    text, ended = await call(client, "get_run_status", run_id=run_id)
    assert ended["state"] == "cancelled"
    assert "cancel_requested" not in ended
    assert "pending" not in text


async def test_asking_again_keeps_the_first_time(client, run):
    run_id, _ = run
    times = set()
    for _ in range(3):
        await call(client, "cancel_run", run_id=run_id)
        _, status = await call(client, "get_run_status", run_id=run_id)
        times.add(status["cancel_requested"])
    assert len(times) == 1


async def test_a_repeated_poll_and_an_expired_wait_say_it_too(client, run):
    run_id, _ = run
    await call(client, "cancel_run", run_id=run_id)
    await call(client, "get_run_status", run_id=run_id)
    text, status = await call(client, "get_run_status", run_id=run_id, wait_seconds=0.1)
    assert status["unchanged"]
    assert len(text.encode()) <= 240
    assert "cancel requested, pending" in text
    assert "cancellation is pending" in status["next_action"]["why"]

"""Tasks over real processes: another server serves them after a restart, and a killed worker is an ended task."""

import os
import signal
import sys

import anyio
import psutil
import pytest
from mcp.client.stdio import StdioServerParameters

from opd_mcp.client import CreatedTask, TasksClient

pytestmark = pytest.mark.anyio


def server(world) -> StdioServerParameters:
    arguments = ["-m", "opd_mcp.cli", "serve", "--allow-root", str(world.data)]
    return StdioServerParameters(command=sys.executable, args=arguments, env=world.environment())


def worker_of(run_id: str) -> int:
    """The process id of a run's worker, which is no child of this process."""
    return next(
        process.pid for process in psutil.process_iter(["cmdline"]) if run_id in (process.info["cmdline"] or ())
    )


async def test_a_task_is_served_by_the_next_server_and_a_killed_worker_ends_it(world):
    overrides = world.plan_arguments()["overrides"] | {"sft.steps": 100_000}
    async with TasksClient(server(world)) as client:
        created = await client.start("start_distillation", world.plan_arguments(overrides=overrides))
        assert isinstance(created, CreatedTask)
        assert (await client.get(created.task_id)).status == "working"
    async with TasksClient(server(world)) as client:
        assert (await client.get(created.task_id)).status == "working"
        os.kill(worker_of(created.task_id), signal.SIGKILL)
        with anyio.fail_after(30):
            result = await client.wait(created.task_id)
    assert result.is_error
    assert result.structured_content["state"] == "lost"
    assert "worker_lost" in result.content[0].text


async def test_a_task_runs_to_its_result(world):
    said = []
    async with TasksClient(server(world)) as client:
        with anyio.fail_after(120):
            arguments = {"teacher": world.plan_arguments()["teacher"], "prompts": ["1+1=?"], "preset": "demo"}
            result = await client.run("generate_teacher_responses", arguments, on_progress=said.append)
    assert not result.is_error
    assert result.structured_content["result"]["artifacts"]["responses"].startswith("responses-")
    assert said

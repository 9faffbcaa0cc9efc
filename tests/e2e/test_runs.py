"""An agent's workflow over real processes: plan, start, follow, result; and runs that outlive their server."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import psutil
import pytest

pytestmark = pytest.mark.anyio

FINAL = {"succeeded", "failed", "cancelled", "lost"}


def command_line(world, *arguments: str) -> str:
    """What a command prints about the same workspace."""
    command = [sys.executable, "-m", "opd_mcp.cli", *arguments]
    done = subprocess.run(command, env=world.environment(), capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


async def followed(client, answer, run_id):
    """The run's last status, and how many calls it took."""
    for calls in range(1, 60):
        status = await answer(client, "get_run_status", run_id=run_id, wait_seconds=25)
        if status["state"] in FINAL:
            return status, calls
    raise AssertionError(f"{run_id} did not end: {status}")


async def test_an_agent_gets_a_distilled_student_and_its_report_in_few_calls(world, connect, answer):
    async with connect() as client:
        plan = await answer(client, "plan_distillation", **world.plan_arguments())
        assert not plan.get("blocking")
        assert {"live", "lightning"} <= {estimate["method"] for estimate in plan["estimates"]}
        run = await answer(client, "start_distillation", plan_id=plan["plan_id"])
        again = await answer(client, "start_distillation", plan_id=plan["plan_id"])
        assert again["run_id"] == run["run_id"]
        assert again["reused"]
        status, calls = await followed(client, answer, run["run_id"])
    assert status["state"] == "succeeded", status
    assert calls <= 6
    text = str(status["result"])
    assert "model" in text
    assert "report" in text
    models = list((world.workspace / "artifacts" / "model").glob("*/model.safetensors"))
    assert models
    assert any(str(model.parent) in text for model in models)
    shown = json.loads(command_line(world, "status", "latest", "--json"))
    assert (shown["run_id"], shown["result"]) == (run["run_id"], status["result"])
    assert run["run_id"] in command_line(world, "list")


async def test_a_run_outlives_its_server_and_another_one_cancels_it(world, connect, answer):
    long_run = world.plan_arguments(overrides=world.plan_arguments()["overrides"] | {"sft.steps": 100_000})
    async with connect() as client:
        run = await answer(client, "start_distillation", **long_run)
        with anyio.fail_after(60):
            while (await answer(client, "get_run_status", wait_seconds=25)).get("phase") != "sft":
                pass
    async with connect() as client:
        seen = await answer(client, "get_run_status", run_id="latest")
        assert (seen["run_id"], seen["state"], seen["phase"]) == (run["run_id"], "running", "sft")
        listed = await answer(client, "list_runs", state="running")
        assert [row["run_id"] for row in listed["rows"]] == [run["run_id"]]
        await answer(client, "cancel_run", run_id=run["run_id"])
        status, _ = await followed(client, answer, run["run_id"])
        assert status["state"] == "cancelled"
        refused = await client.call_tool("cancel_run", {"run_id": run["run_id"]})
    assert refused.is_error
    assert "[run_not_active]" in refused.content[0].text
    assert Path(world.workspace / "runs" / run["run_id"] / "journal.jsonl").is_file()


async def test_a_run_survives_the_killing_of_its_servers_process_group(world, connect, answer):
    long_run = world.plan_arguments(overrides=world.plan_arguments()["overrides"] | {"sft.steps": 100_000})
    with pytest.RaisesGroup(pytest.RaisesExc(Exception), allow_unwrapped=True, flatten_subgroups=True):
        async with connect() as client:
            run = await answer(client, "start_distillation", **long_run)
            servers = [child for child in psutil.Process().children() if "serve" in child.cmdline()]
            groups = {os.getpgid(server.pid) for server in servers}
            assert groups
            assert os.getpgid(0) not in groups
            for group in groups:
                os.killpg(group, signal.SIGKILL)
            await client.call_tool("inspect_setup", {})
    async with connect() as client:
        status = await answer(client, "get_run_status", run_id=run["run_id"])
        assert status["state"] in {"queued", "running"}
        await answer(client, "cancel_run", run_id=run["run_id"])
        status, _ = await followed(client, answer, run["run_id"])
        assert status["state"] == "cancelled"

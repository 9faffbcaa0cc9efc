"""What goes beyond one plain distillation, each by one MCP call to an in-process server, with real workers."""

import json
import re
from pathlib import Path

import anyio
import pytest
from mcp import Client

from opd_mcp.devices.settings import JobSettings
from opd_mcp.server.app import build_server
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

pytestmark = pytest.mark.anyio


@pytest.fixture
def server(world):
    settings = JobSettings(lease_folder=world.root / "leases", cpu_slots=2)
    return build_server(JobService(Workspace(world.workspace), AllowedRoots([world.data]), settings))


async def ended(client, answer, run_id):
    with anyio.fail_after(180):
        run = await answer(client, "get_run_status", run_id=run_id)
        while run["state"] in ("queued", "running"):
            run = await answer(client, "get_run_status", run_id=run_id, wait_seconds=25)
    assert run["state"] == "succeeded", run
    return run


async def test_one_call_runs_rounds_next_to_a_baseline(world, server, answer):
    arguments = world.plan_arguments(baseline="live")
    arguments["overrides"] = arguments["overrides"] | {"distill.rounds": 2, "distill.steps": 4}
    async with Client(server) as client:
        started = await answer(client, "start_distillation", **arguments)
        asked = await ended(client, answer, started["run_id"])
        assert [(of["number"], of["first_step"], of["last_step"]) for of in asked["result"]["rounds"]] == [
            (1, 0, 2),
            (2, 2, 4),
        ]
        assert {"rollout", "rollout 2", "score 2", "distill 2"} <= set(asked["phases_done"])
        tag = next(tag for tag in asked["tags"] if tag.startswith("sweep-"))
        rows = (await answer(client, "list_runs", tag=tag))["rows"]
        for row in rows:
            await ended(client, answer, row["run_id"])
        compared = await answer(client, "compare_runs", tag=tag)
    arms = {arm["arm"]: arm for arm in compared["arms"]}
    assert set(arms) == {"asked", "live"}
    assert arms["asked"]["seconds"] > 0
    assert len(arms["live"]["gain"]) == 3


async def test_one_call_measures_a_pair_and_plans_estimate_by_it(world, server, answer):
    pair = {name: world.plan_arguments()[name] for name in ("student", "teacher", "prompts", "preset")}
    short = {"rollout.sampling.max_new_tokens": 16, "responses.sampling.max_new_tokens": 16, "assess.sft_steps": 5}
    async with Client(server) as client:
        started = await answer(client, "assess_overhead", **pair, overrides=short)
        run = await ended(client, answer, started["run_id"])
        plan = await answer(client, "plan_distillation", **pair, overrides=short)
    overhead = run["result"]["overhead"]
    assert [method["method"] for method in overhead["methods"]] == ["lightning", "live"]
    assert overhead["break_even_steps"] >= 1
    assert overhead["assessment"]["diagnosis"]
    assert run["next_action"]["tool"] == "plan_distillation"
    for estimate in plan["estimates"]:
        for phase in estimate["phases"]:
            if phase["phase"] in ("generate_responses", "sft", "rollout", "score", "distill"):
                assert "measured" in phase["basis"], phase


async def test_a_refused_teacher_is_repaired_as_the_refusal_says(world, server, answer):
    """The agent reads nothing but the refusal's text."""
    mismatched = world.plan_arguments(declared_teacher=f"{world.plan_arguments()['teacher']}_other_style")
    async with Client(server) as client:
        refused = await client.call_tool("start_distillation", mismatched)
        assert refused.is_error
        text = refused.content[0].text
        assert "[plan_blocked]" in text
        [allowed] = re.findall(r"(\w+)=True", text)
        key, value = re.search(r"override ([\w.]+)='(\w+)'", text).groups()
        again = mismatched | {allowed: True, "overrides": mismatched["overrides"] | {key: value}}
        plan = await answer(client, "plan_distillation", **again)
        assert plan["blocking"] == []
        started = await answer(client, "start_distillation", **again, confirm=plan["plan_id"])  # the user said yes
        run = await ended(client, answer, started["run_id"])
    model = Path(run["result"]["paths"]["model"])
    assert json.loads((model / "training.json").read_text())["repair"]["folds"] == 5
    report = json.loads((Path(run["result"]["paths"]["report"]) / "report.json").read_text())
    assert report["teacher_mismatch_allowed"]

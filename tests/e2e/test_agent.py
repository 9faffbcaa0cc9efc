"""An agent that knows the tool list and reads the answers: the workflow in few calls, and a way out of each trouble."""

import re
import shutil
from pathlib import Path

import anyio
import pytest

pytestmark = pytest.mark.anyio

ACTIVE = {"queued", "running"}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"


class Agent:
    """Calls tools of one client after the other; what it calls next is what the last answer said.

    `calls` names the tools in their order; waiting on is no further call, since how long a run takes is the machine's.
    """

    def __init__(self) -> None:
        self.calls = []

    async def call(self, client, tool, **arguments):
        if self.calls[-1:] != [tool]:
            self.calls.append(tool)
        result = await client.call_tool(tool, arguments)
        return result.structured_content, result.content[0].text, result.is_error

    async def follow(self, client, next_action):
        """Make the call that an answer's next_action is."""
        return await self.call(client, next_action["tool"], **next_action["arguments"])


async def until_ended(agent, client, status):
    while status["state"] in ACTIVE:
        status, text, failed = await agent.follow(client, status["next_action"])
        assert not failed, text
    return status


async def test_the_workflow_takes_four_calls(world, connect):
    agent = Agent()
    async with connect() as client:
        with anyio.fail_after(240):
            setup, _, _ = await agent.call(client, "inspect_setup")
            assert setup["next_action"]["tool"] == "plan_distillation"
            assert setup["next_action"]["arguments"]["preset"] == "demo"
            plan, _, failed = await agent.call(client, "plan_distillation", **world.plan_arguments())
            assert not failed
            started, _, _ = await agent.follow(client, plan["next_action"])
            status = await until_ended(agent, client, started)
    assert status["state"] == "succeeded", status
    assert status["result"]["scores"]["distilled"]["greedy_accuracy"]
    assert agent.calls == ["inspect_setup", "plan_distillation", "start_distillation", "get_run_status"]


async def test_a_wrong_path_names_the_right_one(world, connect):
    agent = Agent()
    async with connect() as client:
        wrong = world.plan_arguments(prompts=str(world.data / "promts.jsonl"))
        _, text, failed = await agent.call(client, "plan_distillation", **wrong)
        assert failed
        nearest = re.search(r"Nearest: ([^,.]+(?:\.jsonl)?)", text)[1].strip()
        right = nearest if nearest.startswith("/") else str(world.data / nearest)
        plan, text, failed = await agent.call(client, "plan_distillation", **world.plan_arguments(prompts=right))
        assert not failed, text
        assert plan["plan_id"]


async def test_a_tokenizer_mismatch_says_which_models_differ(world, connect):
    other = world.data / "other"
    shutil.copytree(EXAMPLES / "student", other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"7"', '"@"'))
    agent = Agent()
    async with connect() as client:
        _, text, failed = await agent.call(client, "plan_distillation", **world.plan_arguments(student=str(other)))
        assert failed
        assert "[tokenizer_mismatch]" in text
        _, text, failed = await agent.call(client, "plan_distillation", **world.plan_arguments())
        assert not failed, text


async def test_a_failed_run_says_what_to_change_and_an_expired_wait_and_a_restart_change_nothing(world, connect):
    agent, teacher = Agent(), str(EXAMPLES / "teacher")
    arguments = {"teacher": teacher, "prompts": ["1+1=?"], "preset": "demo"}
    async with connect() as client:
        with anyio.fail_after(120):
            bad = arguments | {"overrides": {"prompting.max_prompt_tokens": 1}}
            started, _, _ = await agent.call(client, "generate_teacher_responses", **bad)
            status = await until_ended(agent, client, started)
        assert status["state"] == "failed"
        assert "prompting.max_prompt_tokens" in status["error"]["fix"]
        again, _, _ = await agent.call(client, "generate_teacher_responses", **arguments)
        expired, text, _ = await agent.call(client, "get_run_status", run_id=again["run_id"], wait_seconds=0.2)
        assert expired["state"] not in ACTIVE or "do not restart" in text
    async with connect() as client:
        with anyio.fail_after(120):
            status = await until_ended(agent, client, again)
    assert status["state"] == "succeeded", status
    assert status["run_id"] == again["run_id"]

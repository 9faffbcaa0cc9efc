"""Resources, completions, prompts and updates over a real workspace with one finished and one queued run."""

import json

import anyio
import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError
from mcp_types import PromptReference, ResourceTemplateReference

from opd_mcp.server.app import build_server
from opd_mcp.server.resources import RunWatcher

pytestmark = pytest.mark.anyio


async def read(client, uri):
    [content] = (await client.read_resource(uri)).contents
    return content.text


async def test_a_run_is_readable_in_parts(client, run):
    run_id, _ = run
    assert json.loads(await read(client, f"opd://runs/{run_id}/recipe"))["preset"] == "demo"
    metrics = json.loads(await read(client, f"opd://runs/{run_id}/metrics"))
    assert metrics["runs"][0]["series"][0]["key"] == "sft.loss"
    assert "step 1" in await read(client, f"opd://runs/{run_id}/log")


async def test_the_recipe_keys_are_a_resource(client):
    assert "opd://recipe-keys" in {str(item.uri) for item in (await client.list_resources()).resources}
    assert "| distill.steps | 50 | 150 | 400 |" in await read(client, "opd://recipe-keys")


async def test_an_artifact_tells_its_lineage(client, jobs):
    artifact_id = jobs._references.prompts(["1+1=?"]).input.artifact_id
    found = json.loads(await read(client, f"opd://artifacts/{artifact_id}/lineage"))
    assert found["artifact"]["kind"] == "prompts"


@pytest.mark.parametrize(
    "uri",
    ["opd://runs/none/recipe", "opd://runs/sft-student-1/report", "opd://artifacts/none/lineage", "opd://runs/x/other"],
)
async def test_what_is_not_there_is_an_invalid_parameter(client, run, uri):
    with pytest.raises(MCPError) as caught:
        await client.read_resource(uri)
    assert caught.value.code == -32602


async def test_ids_are_completed(client, run):
    template = ResourceTemplateReference(type="ref/resource", uri="opd://runs/{run_id}/log")
    found = await client.complete(template, {"name": "run_id", "value": "sft-"})
    assert found.completion.values == ["sft-student-1"]
    prompt = PromptReference(type="ref/prompt", name="diagnose_run")
    assert (await client.complete(prompt, {"name": "run_id", "value": "x"})).completion.values == []


async def test_the_templates_and_prompts_are_listed(client):
    templates = (await client.list_resource_templates()).resource_templates
    assert {item.uri_template.rsplit("/", 1)[1] for item in templates} == {
        "recipe", "metrics", "log", "report", "lineage",
    }  # fmt: skip
    prompts = {prompt.name: prompt for prompt in (await client.list_prompts()).prompts}
    assert [argument.name for argument in prompts["distill_model"].arguments if argument.required] == [
        "student", "teacher", "prompts",
    ]  # fmt: skip


async def test_the_prompts_name_tools_that_exist(client):
    tools = {tool.name for tool in (await client.list_tools()).tools}
    arguments = {"student": "/s", "teacher": "/t", "prompts": "/p.jsonl", "eval_prompts": "/e.jsonl"}
    for name, given in (("distill_model", arguments), ("diagnose_run", {"run_id": "r-1"})):
        text = (await client.get_prompt(name, given)).messages[0].content.text
        words = {word.split("(")[0].strip("`'.,;") for word in text.split() if "_" in word}
        called = {
            word for word in words if word.startswith(("get_", "plan_", "start_", "inspect_", "list_", "sample_"))
        }
        assert called
        assert called <= tools
        assert "{" not in text


async def test_a_subscriber_hears_of_a_run_that_moves(jobs, run, monkeypatch):
    run_id, journal = run
    monkeypatch.setattr(RunWatcher.__init__, "__defaults__", (0.05,))
    uri = f"opd://runs/{run_id}/metrics"
    async with Client(build_server(jobs)) as client:
        with anyio.fail_after(20):
            async with client.listen(resource_subscriptions=[uri]) as updates, anyio.create_task_group() as tasks:

                async def move():
                    for step in range(2, 200):
                        journal.append("metric", {"step": step, "values": {"loss": 0.4}})
                        await anyio.sleep(0.1)

                tasks.start_soon(move)
                async for event in updates:
                    assert event.uri == uri
                    break
                tasks.cancel_scope.cancel()

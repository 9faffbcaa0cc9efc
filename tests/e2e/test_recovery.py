"""A scripted agent recovers from alerts about how a run went, by doing what the alert's text alone says."""

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

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
KEY = r"'([a-z_]+(?:\.[a-z_]+)+)'"
SMALL = {
    "responses.limit": 64,
    "responses.sampling.max_new_tokens": 64,
    "sft.steps": 60,
    "sft.batch_size": 32,
    "rollout.count": 64,
    "rollout.sampling.max_new_tokens": 40,
    "distill.steps": 12,
    "distill.batch_size": 8,
    "benchmark.samples_per_prompt": 0,
    "benchmark.kl_prompts": 16,
    "benchmark.sampling.max_new_tokens": 40,
}
MOST_TRIES = 3


def followed(text: str, overrides: dict) -> dict:
    """The overrides that obey an alert's text: a value set, the first named key raised or lowered, or keys left out."""
    if exact := re.search(rf"Set {KEY} to about ([\d.e-]+\d)", text):
        return overrides | {exact[1]: float(exact[2])}
    verb, key = re.search(rf"(Raise|Lower|Change) {KEY}", text).groups()
    if verb == "Change":
        named = re.findall(KEY, text)
        return {name: value for name, value in overrides.items() if name not in named}
    value = overrides[key]
    return overrides | {key: value * 4 if verb == "Raise" else value / 10}


class Agent:
    """Starts distillations of the example, reads their alerts, and starts them again as the text says."""

    def __init__(self, client, world) -> None:
        self.client, self.world = client, world

    async def alerts(self, overrides, **changes):
        """The texts of a run's alerts by code, once it has ended."""
        given = self.world.plan_arguments(**changes) | {"overrides": overrides}
        run = (await self.client.call_tool("start_distillation", given)).structured_content
        with anyio.fail_after(240):
            while run["state"] in ("queued", "running"):
                waited = await self.client.call_tool("get_run_status", {"run_id": run["run_id"], "wait_seconds": 25})
                run = waited.structured_content
        assert run["state"] == "succeeded", run
        return {alert["code"]: alert["message"] for alert in run.get("alerts", [])}

    async def recovered(self, code, overrides, **changes):
        """The alerts of the run that no longer has this one."""
        found = await self.alerts(overrides, **changes)
        assert code in found, found
        for _ in range(MOST_TRIES):
            overrides = followed(found[code], overrides)
            found = await self.alerts(overrides, **changes)
            if code not in found:
                return found
        raise AssertionError(found)


@pytest.fixture
def server(world):
    for name, source, count in (("prompts", "opd", 64), ("sft", "sft", 64), ("eval", "eval", 32)):
        lines = (EXAMPLES / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (world.data / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = JobSettings(lease_folder=world.root / "leases", cpu_slots=2)
    return build_server(JobService(Workspace(world.workspace), AllowedRoots([world.data]), settings))


@pytest.mark.parametrize(
    ("code", "wrong", "changes"),
    [
        ("learning_rate_far", {"distill.optimizer.learning_rate": 0.3}, {}),
        ("collapse", {"distill.optimizer.learning_rate": 0.3}, {}),
        ("sft_undertrained", {"sft.steps": 10}, {"method": "sft"}),
        ("no_learning", {"sft.steps": 240, "distill.steps": 1}, {}),
        ("benchmark_zero", {"benchmark.answer_pattern": r"answer: (\d)"}, {"method": "sft"}),
    ],
)
async def test_what_an_alert_says_is_what_helps(world, server, code, wrong, changes):
    async with Client(server) as client:
        left = await Agent(client, world).recovered(code, SMALL | wrong, **changes)
    assert code != "no_learning" or "collapse" not in left, "it has learnt something worth having"

"""What a run alerted stands in its status, and in its report as text and as data."""

import json
from pathlib import Path

import anyio
import pytest

pytestmark = pytest.mark.anyio


async def test_an_alert_of_the_training_stands_in_the_report(world, connect, answer):
    settings = {"distill.steps": 10, "distill.advantage_clip": 1e-4}
    arguments = world.plan_arguments()
    arguments["overrides"] = arguments["overrides"] | settings
    async with connect() as client:
        run = await answer(client, "start_distillation", **arguments)
        with anyio.fail_after(180):
            while run["state"] in ("queued", "running"):
                run = await answer(client, "get_run_status", run_id=run["run_id"], wait_seconds=25)
        assert run["state"] == "succeeded", run
        [text] = (await client.read_resource(f"opd://runs/{run['run_id']}/report")).contents
    [alert] = [alert for alert in run["alerts"] if alert["code"] == "advantages_clipped"]
    report = json.loads((Path(run["result"]["paths"]["report"]) / "report.json").read_bytes())
    assert alert in report["alerts"]
    assert f"- {alert['time']} `advantages_clipped`: {alert['message']}" in text.text

"""The TypeScript clients: the current SDK in both eras, SDK 1.x, and ext-tasks; over HTTP and stdio."""

import sys

import pytest

import opd_mcp

SERVE = [sys.executable, "-m", "opd_mcp.cli", "serve"]


def check(seen, era):
    assert seen["era"] == era
    assert {"start_distillation", "get_run_status"} <= set(seen["tools"])
    assert seen["version"] == opd_mcp.__version__
    assert seen["isError"]
    assert "[unknown_argument]" in seen["error"]
    assert seen["templates"] == 5
    assert seen["page"] == "text/html;profile=mcp-app"


@pytest.mark.parametrize(("mode", "era"), [("auto", "modern"), ("legacy", "legacy")])
@pytest.mark.parametrize("transport", ["http", "stdio"])
def test_the_current_sdk(node, url, home, mode, era, transport):
    target = [f"{url}/mcp"] if transport == "http" else SERVE
    check(node.answer("current_client.mjs", mode, *target, **home), era)


@pytest.mark.parametrize("transport", ["http", "stdio"])
def test_the_first_sdk(node, url, home, transport):
    target = [f"{url}/mcp"] if transport == "http" else SERVE
    check(node.answer("v1_client.mjs", *target, **home), "legacy")


def test_a_run_as_a_task_of_ext_tasks(node, url):
    from pathlib import Path

    teacher = Path(__file__).resolve().parents[2] / "examples" / "arithmetic" / "teacher"
    seen = node.answer("ext_tasks.mjs", f"{url}/mcp", str(teacher))
    assert seen["execution"] == "task"
    result = seen["outcome"]["result"]
    assert not result.get("isError")
    assert result["structuredContent"]["state"] == "succeeded"
    assert result["structuredContent"]["result"]["samples"][0]["prompt"] == "1+1=?"
    assert "cancel" in str(seen["cancelled"]).lower()

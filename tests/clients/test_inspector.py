"""The MCP Inspector's command line: both eras, over stdio and HTTP."""

import json
import sys

import pytest

SERVE = [sys.executable, "-m", "opd_mcp.cli", "serve"]


@pytest.fixture(params=["http", "stdio"])
def target(request, url, home):
    environment = [word for name, value in home.items() for word in ("-e", f"{name}={value}")]
    return [f"{url}/mcp"] if request.param == "http" else [*environment, *SERVE]


@pytest.mark.parametrize("era", ["modern", "legacy"])
def test_tools_resources_and_prompts(node, target, era):
    def inspect(*arguments):
        return node.run("mcp-inspector", "--cli", *target, "--protocol-era", era, "--format", "json", *arguments)

    def answer(*arguments):
        done = inspect(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tools = inspect("--method", "tools/list", "--strict")
    assert tools.returncode == 0, tools.stderr  # 6: a schema that some host cannot use
    assert "start_distillation" in tools.stdout
    assert "allowed_roots" in answer("--method", "tools/call", "--tool-name", "inspect_setup")
    assert "opd-mcp" in answer("--method", "resources/read", "--uri", "ui://opd-mcp/dashboard.html")
    assert "distill_model" in answer("--method", "prompts/list")
    failed = inspect("--method", "tools/call", "--tool-name", "get_run_status", "--tool-arg", "run_id=nothing")
    assert failed.returncode == 5  # isError
    assert "unknown_run" in failed.stdout + failed.stderr


def test_the_app_is_found(node, url):
    done = node.run(
        "mcp-inspector", "--cli", f"{url}/mcp", "--advertise-apps", "--app-info",
        "--method", "tools/call", "--tool-name", "open_dashboard",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ui://opd-mcp/dashboard.html" in json.dumps(done.stdout)

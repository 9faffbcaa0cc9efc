"""The real server process over stdio: it connects in both eras, and nothing but the protocol is on its stdout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters

SERVE = ["-m", "opd_mcp.cli", "serve"]
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}
NOISY_IMPORTS = """
import os, sys
class Noisy:
    def find_spec(self, name, path=None, target=None):
        if name == "mcp":
            print("noise from an import")
            os.write(1, b"noise from a C library\\n")
sys.meta_path.insert(0, Noisy())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"OPD_HOME": str(tmp_path / "workspace"), "XDG_RUNTIME_DIR": str(tmp_path)}


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_connects_and_lists_the_tools(environment, mode):
    server = StdioServerParameters(command=sys.executable, args=SERVE, env=environment)
    async with Client(server, mode=mode) as client:
        tools = (await client.list_tools()).tools
        unknown = await client.call_tool("get_run_status", {"run": "x"})
    assert "start_distillation" in {tool.name for tool in tools}
    assert "[unknown_argument]" in unknown.content[0].text


def test_prints_at_import_time_stay_off_the_wire(environment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NOISY_IMPORTS)
    process = subprocess.run(
        [sys.executable, *SERVE],
        input=json.dumps(INITIALIZE) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    lines = process.stdout.splitlines()
    assert json.loads(lines[0])["result"]["serverInfo"]["name"] == "opd-mcp"
    assert "noise from an import" in process.stderr
    assert "noise from a C library" in process.stderr


NOISY_TOOL = """
import os, sys
from opd_mcp.service import JobService
quiet = JobService.setup
def noisy(self):
    print("noise from a tool", flush=True)
    os.write(1, b"noise on fd 1\\n")
    os.system("echo noise from a child")
    return quiet(self)
JobService.setup = noisy
from opd_mcp.cli import main
sys.argv = ["opd-mcp", "serve"]
main()
"""


def test_whatever_a_tool_prints_stays_off_the_wire(environment):
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "inspect_setup", "arguments": {}}}
    ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    process = subprocess.Popen(
        [sys.executable, "-c", NOISY_TOOL],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    for message in (INITIALIZE, ready, call):
        process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()
    messages = [json.loads(process.stdout.readline()) for _ in range(2)]
    rest, noise = process.communicate(timeout=30)
    messages += [json.loads(line) for line in rest.splitlines()]
    assert {message["id"] for message in messages if "id" in message} == {1, 2}
    assert all(message["jsonrpc"] == "2.0" for message in messages)
    for said in ("noise from a tool", "noise on fd 1", "noise from a child"):
        assert said in noise


def test_the_guard_gives_stdout_back():
    code = (
        "import os\n"
        "from opd_mcp.server.serve import stdout_to_stderr\n"
        "with stdout_to_stderr():\n"
        "    print('inside'); os.system('echo child')\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "after\n"
    assert sorted(done.stderr.split()) == ["child", "inside"]

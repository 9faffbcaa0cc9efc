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
    assert len(tools) == 10
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


def test_the_guard_gives_stdout_back():
    code = (
        "import os\n"
        "from opd_mcp.server.stdout_guard import stdout_to_stderr\n"
        "with stdout_to_stderr():\n"
        "    print('inside'); os.system('echo child')\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "after\n"
    assert sorted(done.stderr.split()) == ["child", "inside"]

"""The HTTP transport: who is let in, what is refused and how, and two servers on one workspace."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp_types import HEADER_MISMATCH

pytestmark = pytest.mark.anyio

SERVE = [sys.executable, "-m", "opd_mcp.cli", "serve", "--transport", "http"]
TOKEN = "a-token-that-is-long-enough"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("http")
    (folder / "runtime").mkdir(mode=0o700)
    return {**os.environ, "OPD_HOME": str(folder / "workspace"), "XDG_RUNTIME_DIR": str(folder / "runtime")}


@pytest.fixture(scope="module")
def serving(environment) -> Iterator[Callable[..., str]]:
    """`serving(*options)`: a server process on a free port; answers its base URL."""
    started = []

    def start(*options: str, **variables: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [*SERVE, "--port", str(port), *options]
        started.append(subprocess.Popen(command, env={**environment, **variables}, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return f"http://127.0.0.1:{port}"
            except OSError:
                assert started[-1].poll() is None
                time.sleep(0.05)
        raise AssertionError("the server does not answer")

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def local(serving) -> str:
    return serving()


@pytest.fixture(scope="module")
def guarded(serving, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN + "\n")
    return serving("--token-file", str(file), "--allowed-host", "opd.example")


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_both_eras_are_served(local, mode):
    async with Client(f"{local}/mcp", mode=mode) as client:
        assert "start_distillation" in {tool.name for tool in (await client.list_tools()).tools}


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_the_token_lets_a_client_in(guarded, mode):
    async with (
        httpx2.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}) as http,
        Client(streamable_http_client(f"{guarded}/mcp", http_client=http), mode=mode) as client,
    ):
        assert not (await client.call_tool("inspect_setup", {})).is_error


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/mcp", {}, 401),
        ("/mcp", {"Authorization": "Bearer wrong-token-of-some-length"}, 401),
        ("/mcp", {"Authorization": f"Basic {TOKEN}"}, 401),
        ("/mcp", {"Cookie": f"opd_dashboard={TOKEN}"}, 401),
        ("/dashboard", {}, 401),
        ("/dashboard?token=wrong", {}, 401),
        ("/dashboard/feed", {}, 401),
        ("/dashboard/feed", {"Cookie": f"opd_dashboard={TOKEN}"}, 200),
        ("/dashboard", {"Authorization": f"Bearer {TOKEN}"}, 200),
        ("/health", {}, 200),
        ("/mcp", {"Authorization": f"Bearer {TOKEN}", "Host": "evil.example"}, 421),
        ("/dashboard", {"Authorization": f"Bearer {TOKEN}", "Host": "evil.example"}, 421),
        ("/mcp", {"Authorization": f"Bearer {TOKEN}", "Origin": "https://evil.example"}, 403),
        ("/dashboard/feed", {"Cookie": f"opd_dashboard={TOKEN}", "Origin": "https://evil.example"}, 403),
        ("/dashboard", {"Authorization": f"Bearer {TOKEN}", "Host": "opd.example"}, 200),
    ],
)
async def test_who_is_let_in(guarded, path, headers, status):
    async with httpx2.AsyncClient() as http:
        answer = await http.get(guarded + path, headers=headers)
    assert answer.status_code == status, answer.text
    assert TOKEN not in answer.text
    if status == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_browser_trades_its_token_for_a_cookie_of_the_dashboard(guarded):
    async with httpx2.AsyncClient() as http:
        answer = await http.get(f"{guarded}/dashboard?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")
    cookie = answer.headers["set-cookie"].lower()
    for part in ("httponly", "samesite=strict", "path=/dashboard"):
        assert part in cookie


async def test_a_body_that_is_too_large_is_refused(local):
    async with httpx2.AsyncClient() as http:
        answer = await http.post(f"{local}/mcp", content=b"x" * (5 << 20), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


async def test_a_routing_header_of_another_task_is_refused(local):
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {"extensions": {"io.modelcontextprotocol/tasks": {}}},
    }
    body = {"jsonrpc": "2.0", "id": 1, "method": "tasks/get", "params": {"taskId": "run-a", "_meta": meta}}
    headers = {
        "Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2026-07-28",
        "Mcp-Method": "tasks/get", "Mcp-Name": "run-b",
    }  # fmt: skip
    async with httpx2.AsyncClient() as http:
        other = await http.post(f"{local}/mcp", json=body, headers=headers)
        own = await http.post(f"{local}/mcp", json=body, headers=headers | {"Mcp-Name": "run-a"})
    assert (other.status_code, other.json()["error"]["code"]) == (400, HEADER_MISMATCH)
    assert own.json()["error"]["code"] == -32602


async def test_two_servers_share_a_workspace(local, serving):
    other = serving()
    arguments = {"model": str(EXAMPLES / "student"), "prompts": ["1+1=?"], "max_new_tokens": 4}
    async with Client(f"{local}/mcp") as one, Client(f"{other}/mcp") as two:
        started = (await one.call_tool("sample_model", arguments)).structured_content
        again = (await two.call_tool("sample_model", arguments)).structured_content
        assert again["run_id"] == started["run_id"]
        assert again["reused"]
        await two.call_tool("cancel_run", {"run_id": started["run_id"]})
        status = {"state": "running"}
        while status["state"] in ("queued", "running"):
            status = (await one.call_tool("get_run_status", {"wait_seconds": 5})).structured_content
    assert status["state"] == "cancelled"


async def test_the_page_is_sent_with_a_strict_policy(local):
    async with httpx2.AsyncClient() as http:
        page = await http.get(f"{local}/dashboard")
        unknown = await http.get(f"{local}/dashboard/feed?run_ids=nothing")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert (unknown.status_code, "[unknown_run]" in unknown.json()["error"]) == (404, True)


async def test_tasks_over_http(local):
    from opd_mcp.client import TasksClient

    async with TasksClient(f"{local}/mcp") as client:
        with pytest.raises(MCPError) as caught:
            await client.get("nothing")
    assert caught.value.code == -32602


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ([], {}),
        ([], {"OPD_TOKEN": TOKEN}),
        (["--allowed-host", "opd.example"], {}),
        (["--allowed-host", "opd.example"], {"OPD_TOKEN": "short"}),
    ],
)
def test_a_host_that_others_can_reach_needs_a_token_and_names(environment, options, variables):
    done = subprocess.run(
        [*SERVE, "--host", "0.0.0.0", *options],
        env={**environment, **variables}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "[invalid_argument]" in done.stderr
    assert "Traceback" not in done.stderr

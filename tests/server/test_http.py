"""The HTTP transport: the same tools for clients on this machine, and nobody else."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx2
import pytest
from mcp import Client

pytestmark = pytest.mark.anyio


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A server process on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "opd_mcp.cli", "serve", "--transport", "http", "--port", str(port)],
        env={**os.environ, "OPD_HOME": str(tmp_path / "workspace"), "XDG_RUNTIME_DIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.terminate()
        process.wait(timeout=20)


async def test_both_eras_are_served_and_a_foreign_host_name_is_refused(url):
    with anyio.fail_after(30):
        await until_served(url)
    for mode in ("auto", "legacy"):
        async with Client(url, mode=mode) as client:
            assert len((await client.list_tools()).tools) == 10
    async with httpx2.AsyncClient() as http:
        answer = await http.post(url, json={}, headers={"Host": "evil.example"})
    assert answer.status_code in (403, 421)


async def until_served(url):
    async with httpx2.AsyncClient() as http:
        while True:
            try:
                await http.get(url)
            except httpx2.ConnectError:
                await anyio.sleep(0.1)
            else:
                return


def test_a_host_that_others_can_reach_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "opd_mcp.cli", "serve", "--transport", "http", "--host", "0.0.0.0"],
        env={**os.environ, "OPD_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "[invalid_argument]" in done.stderr
    assert "SSH tunnel" in done.stderr
    assert "Traceback" not in done.stderr

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

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.server.http_access import MAX_SESSIONS, SESSION_SECONDS, DashboardSessions, HttpAccess

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

    def start(*options: str, log: Path = Path(os.devnull), **variables: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [*SERVE, "--port", str(port), *options]
        with log.open("wb") as stderr:
            started.append(subprocess.Popen(command, env={**environment, **variables}, stderr=stderr))
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
    return serving("--no-token")


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
        ("/mcp?token=" + TOKEN, {}, 401),
        ("/dashboard/feed", {"Cookie": f"opd_dashboard={TOKEN}"}, 401),
        ("/dashboard/../mcp?token=" + TOKEN, {}, 401),
        ("/dashboard", {}, 401),
        ("/dashboard?token=wrong", {}, 401),
        ("/dashboard/feed", {}, 401),
        ("/dashboard/document?run_id=latest&kind=report", {}, 401),
        ("/", {}, 307),
        ("/", {"Host": "evil.example"}, 421),
        ("/dashboard", {"Authorization": f"Bearer {TOKEN}"}, 200),
        ("/health", {}, 200),
        ("/mcp", {"Authorization": f"Bearer {TOKEN}", "Host": "evil.example"}, 421),
        ("/dashboard", {"Authorization": f"Bearer {TOKEN}", "Host": "evil.example"}, 421),
        ("/mcp", {"Authorization": f"Bearer {TOKEN}", "Origin": "https://evil.example"}, 403),
        ("/dashboard/feed", {"Authorization": f"Bearer {TOKEN}", "Origin": "https://evil.example"}, 403),
        ("/dashboard/feed", {"Authorization": f"Bearer {TOKEN}", "Origin": "null"}, 403),
        ("/dashboard", {"Authorization": f"Bearer {TOKEN}", "Host": "opd.example"}, 200),
    ],
)
async def test_who_is_let_in(guarded, path, headers, status):
    async with httpx2.AsyncClient() as http:
        answer = await http.get(guarded + path, headers=headers, follow_redirects=False)
    assert answer.status_code == status, answer.text
    assert TOKEN not in answer.text
    if status == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer")


async def signed_in(http: httpx2.AsyncClient, url: str, token: str) -> str:
    """The cookie header of a session that the token has begun."""
    answer = await http.get(f"{url}/dashboard", params={"token": token})
    assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")
    http.cookies.clear()
    return answer.headers["set-cookie"].partition(";")[0]


async def test_a_browser_trades_its_token_for_a_session_of_the_dashboard(guarded):
    async with httpx2.AsyncClient() as http:
        answer = await http.get(f"{guarded}/dashboard?token={TOKEN}")
        sent = answer.headers["set-cookie"]
        for part in ("httponly", "samesite=strict", "path=/dashboard", "max-age="):
            assert part in sent.lower()
        assert TOKEN not in sent
        http.cookies.clear()
        cookie = sent.partition(";")[0]
        assert cookie.startswith(f"opd_dashboard_{guarded.rpartition(':')[2]}=")
        value = cookie.partition("=")[2]
        for path, headers, status in (
            ("/dashboard/feed", {"Cookie": cookie}, 200),
            ("/dashboard", {"Cookie": f'a=b; c="; {cookie}; d'}, 200),
            ("/mcp", {"Cookie": cookie}, 401),
            ("/mcp", {"Authorization": f"Bearer {value}"}, 401),
            (f"/dashboard?token={value}", {}, 401),
            ("/dashboard/feed", {"Cookie": cookie[:-1]}, 401),
            ("/dashboard/feed", {"Cookie": cookie.replace(".", "x.")}, 401),
            # a page of another port of this machine: the browser sends it the same cookies
            ("/dashboard/feed", {"Cookie": cookie, "Origin": "http://127.0.0.1:1"}, 401),
            ("/dashboard/feed", {"Cookie": cookie, "Sec-Fetch-Site": "same-site"}, 401),
            ("/dashboard/feed", {"Cookie": cookie, "Origin": guarded}, 200),
        ):
            found = await http.get(guarded + path, headers=headers)
            assert (path, headers, found.status_code) == (path, headers, status)


async def test_a_token_is_made_at_the_first_start_and_its_change_ends_sessions(serving, tmp_path):
    home = {"OPD_HOME": str(tmp_path / "home")}
    url = serving(log=tmp_path / "first", **home)
    file = tmp_path / "home" / "http.token"
    token = file.read_text().strip()
    assert (file.stat().st_mode & 0o777, len(token) >= 40) == (0o600, True)
    said = (tmp_path / "first").read_text()
    assert f'--header "Authorization: Bearer {token}"' in said
    assert f"{url}/dashboard?token={token}" in said
    again = serving(log=tmp_path / "second", **home)
    assert token not in (tmp_path / "second").read_text()
    assert " opd-mcp token)" in (tmp_path / "second").read_text()

    def command(*options: str) -> str:
        done = subprocess.run(
            [*SERVE[:3], "token", *options], env={**os.environ, **home}, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    async with httpx2.AsyncClient() as http:

        async def statuses(cookie: str, token: str) -> tuple[int, int]:
            feed = await http.get(f"{url}/dashboard/feed", headers={"Cookie": cookie})
            page = await http.get(f"{again}/dashboard", headers={"Authorization": f"Bearer {token}"})
            return feed.status_code, page.status_code

        assert (await http.get(f"{url}/mcp")).status_code == 401
        first = await signed_in(http, url, token)
        assert await statuses(first, token) == (200, 200)
        assert command() == token
        assert command("--sign-out") == ""
        assert await statuses(first, token) == (401, 200)
        second = await signed_in(http, url, token)
        other = command("--new")
        assert other not in ("", token)
        assert await statuses(second, token) == (401, 401)
        assert await statuses(second, other) == (401, 200)
        assert await statuses(await signed_in(http, url, other), other) == (200, 200)


def raw_answer(url: str, request: bytes) -> bytes:
    """All that the server sends for what is written to a connection, which is then half closed."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


ODD_AUTHORITIES = [
    "localhost:anything", "localhost:80@evil.example", "[::1]x", "[::1", "[::1]:", "[::1]:0", "localhost:",
    "localhost:0", "localhost:65536", "localhost:8000:8000", "user@localhost", "localhost.", "localhost/",
    "127.0.0.1.evil.example", "evil-localhost", "localhost evil", "[fe80::1%lo]", "[127.0.0.1]", "127.0.0.1#",
    "localhost\\evil", "%6cocalhost",
    "localhost:+80", "localhost: 80", "0x7f.0.0.1", "localhost,evil.example", "*", ":8000", "[]",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_AUTHORITIES)
def test_a_host_or_origin_that_only_looks_like_this_machine_is_refused(guarded, name):
    end = f"Authorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n"
    host = raw_answer(guarded, f"GET /dashboard/feed HTTP/1.1\r\nHost: {name}\r\n{end}".encode())
    assert host.split(b" ", 2)[1] in (b"421", b"400"), host
    request = f"GET /dashboard/feed HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://{name}\r\n{end}"
    assert raw_answer(guarded, request.encode()).split(b" ", 2)[1] == b"403"


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:1", "127.0.0.1:65535", "[::1]", "[::1]:8000"])
def test_every_name_of_this_machine_is_admitted_on_any_port(name):
    assert HttpAccess().admits_host(name)
    assert HttpAccess().admits_origin(f"https://{name}")


def test_an_allowed_host_with_a_port_is_allowed_on_that_port_only():
    access = HttpAccess(allowed_hosts=("opd.example:8443", "[2001:db8::1]"))
    assert access.checked().admits_host("opd.example:8443")
    assert access.admits_host("[2001:db8::1]:5")
    assert not access.admits_host("opd.example")
    assert not access.admits_origin("https://opd.example:443")
    for name in ("http://opd.example", "opd.example/x", "", "*.example"):
        with pytest.raises(ArgumentError, match="allowed host"):
            HttpAccess(allowed_hosts=(name,)).checked()


def test_a_session_ends_in_time_and_the_oldest_of_too_many_ends():
    now = [100.0]
    sessions = DashboardSessions(HttpAccess(token=lambda: TOKEN), lambda: now[0])
    first = sessions.cookie()
    assert sessions.holds(first)
    assert not DashboardSessions(HttpAccess(token=lambda: TOKEN)).holds(first)
    now[0] += SESSION_SECONDS
    assert not sessions.holds(first)
    second, *others = (sessions.cookie() for _ in range(MAX_SESSIONS + 1))
    assert not sessions.holds(second)
    assert all(map(sessions.holds, others))


@pytest.mark.parametrize(
    "cookie",
    [
        b'opd_dashboard_PORT="\\', b"opd_dashboard_PORT=\xff\xfe.\x80", b"=; ;;=\x01", b"a" * 5000,
        b"opd_dashboard_PORT", b"opd_dashboard_PORT=" + b"a.b; opd_dashboard_PORT=" * 200,
        b"\xed\xa0\x80=1", b"opd_dashboard_PORT=.",
        b"$Version=1; opd dashboard[]=@", b"opd_dashboard_PORT=%00.%ff",
    ],
)  # fmt: skip
def test_a_bad_cookie_is_no_cookie(guarded, cookie):
    sent = cookie.replace(b"PORT", guarded.rpartition(":")[2].encode())
    for path in (b"/dashboard/feed", b"/dashboard", b"/mcp"):
        request = b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nCookie: " + sent + b"\r\n"
        assert raw_answer(guarded, request + b"\r\n").split(b" ", 2)[1] == b"401"
        if path != b"/mcp":
            allowed = raw_answer(guarded, request + f"Authorization: Bearer {TOKEN}\r\n\r\n".encode())
            assert allowed.split(b" ", 2)[1] == b"200"


async def test_without_a_session_no_answer_is_shortened(local):
    arguments = {"model": str(EXAMPLES / "student"), "prompts": ["2+2=?"], "max_new_tokens": 4}
    async with Client(f"{local}/mcp") as client:
        run_id = (await client.call_tool("sample_model", arguments)).structured_content["run_id"]
        await client.call_tool("cancel_run", {"run_id": run_id})
        state = "running"
        while state in ("queued", "running"):
            answer = await client.call_tool("get_run_status", {"run_id": run_id, "wait_seconds": 5})
            state = answer.structured_content["state"]
    for mode, expected in (("auto", [False, False]), ("legacy", [False, True]), ("auto", [False, False])):
        async with Client(f"{local}/mcp", mode=mode) as client:
            answers = [await client.call_tool("get_run_status", {"run_id": run_id}) for _ in range(2)]
        assert [bool(answer.structured_content.get("unchanged")) for answer in answers] == expected, mode


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
    other = serving("--no-token")
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
        front = await http.get(local, follow_redirects=False)
        unknown = await http.get(f"{local}/dashboard/feed?run_ids=nothing")
        wrong = await http.get(f"{local}/dashboard/feed?state=asleep")
        document = await http.get(f"{local}/dashboard/document?run_id=nothing&kind=report")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert (front.status_code, front.headers["location"]) == (307, "/dashboard")
    assert (unknown.status_code, "[unknown_run]" in unknown.json()["error"]) == (404, True)
    assert (wrong.status_code, "asleep" in wrong.json()["error"]) == (400, True)
    assert (document.status_code, "[unknown_run]" in document.text) == (404, True)
    assert document.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert document.headers["x-content-type-options"] == "nosniff"


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
        (["--allowed-host", "opd.example", "--no-token"], {}),
        (["--allowed-host", "http://opd.example"], {"OPD_TOKEN": TOKEN}),
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

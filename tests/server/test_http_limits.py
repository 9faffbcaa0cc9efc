"""What one HTTP client can take: half-open, slow, endless and hostile connections, on real sockets."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from opd_mcp.server.http import MAX_HEADER_BYTES, MAX_HEADERS, MAX_TARGET_BYTES, Gate
from opd_mcp.server.http_access import HttpAccess
from opd_mcp.server.http_limits import LOG_LINES, Limits, LogBudget, http_server

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
LARGE = 64 << 20


async def echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


given_up = threading.Event()


async def large(request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * (LARGE // 64)
        given_up.set()

    return StreamingResponse(parts())


Connect = Callable[[], socket.socket]
Serving = Callable[[Limits], Connect]


@pytest.fixture
def serving() -> Iterator[Serving]:
    """`serving(limits)`: a server in a thread; answers a function that opens a connection to it."""
    routes = [Route("/health", echo), Route("/echo", echo, methods=["POST"]), Route("/large", large)]
    with ExitStack() as ends:

        def start(limits: Limits) -> Connect:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            server = http_server(Gate(Starlette(routes=routes), HttpAccess(port=port)), "127.0.0.1", port, limits)
            thread = threading.Thread(target=server.run)
            thread.start()
            ends.callback(thread.join)
            ends.callback(setattr, server, "should_exit", True)
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            return lambda: ends.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))

        yield start


def received(connection: socket.socket) -> bytes:
    """All bytes until the server closes; a reset is an end too."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def status(answer: bytes) -> bytes:
    return answer.partition(b" ")[2][:3]


def is_served(connect: Connect) -> bool:
    connection = connect()
    connection.sendall(GET + b"Connection: close\r\n\r\n")
    return status(received(connection)) == b"200"


@pytest.mark.parametrize("begun", [b"", b"GET", GET, GET + b"X: " + b"x" * 1000, GET + b"\r\n" + GET])
def test_a_request_that_does_not_go_on_ends(serving, begun):
    connect = serving(Limits(header_seconds=0.3, idle_seconds=60))
    connection = connect()
    connection.sendall(begun)
    answer = received(connection)
    assert answer.endswith(b"\r\n\r\n")
    assert b"HTTP/1.1 408" in answer
    assert answer.count(b"HTTP/1.1 200") == begun.count(b"\r\n\r\n")
    assert is_served(connect)


def test_a_header_that_comes_byte_by_byte_ends_too(serving):
    connect = serving(Limits(header_seconds=0.3, idle_seconds=60))
    connection = connect()
    connection.settimeout(0.02)
    answer = b""
    while not answer:  # the bytes in between put the end off by nothing
        try:
            connection.send(b"G")
            answer = connection.recv(100)
        except TimeoutError:
            continue
        except ConnectionError:
            break
    assert status(answer) in (b"408", b"")
    assert is_served(connect)


@pytest.mark.parametrize("head", [b"Content-Length: 50", b"Transfer-Encoding: chunked", b"Content-Length: 99999999999"])
def test_a_body_that_does_not_come_ends(serving, head):
    connect = serving(Limits(body_seconds=0.3))
    connection = connect()
    connection.sendall(b"POST /echo HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n5")
    assert status(received(connection)) == b"408"
    assert is_served(connect)


def test_an_answer_that_nobody_takes_is_given_up(serving):
    connect = serving(Limits(write_seconds=0.3))
    connection = connect()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert given_up.wait(60)
    assert is_served(connect)


@pytest.mark.parametrize("begun", [b"", GET, b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1"])
def test_those_that_keep_the_server_waiting_make_room(serving, begun):
    connect = serving(Limits(connections=8))
    held = [connect() for _ in range(40)]
    for connection in held:
        try:
            connection.sendall(begun)
        except ConnectionError:
            continue
    assert is_served(connect)
    assert all(received(connection) == b"" for connection in held[:20])


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (GET + b"X: y\r\n" * (MAX_HEADERS + 1) + b"\r\n", b"431"),
        (GET + b"X: " + b"y" * (MAX_HEADER_BYTES + 1) + b"\r\n\r\n", b"431"),
        (GET + b"X: " + b"y" * (40 << 10), b"400"),
        (b"GET /" + b"y" * (MAX_TARGET_BYTES + 1) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"414"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (GET + b"Host: evil.example\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"421"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"200"),
        (GET + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n", b"200"),
    ],
)
def test_odd_requests_get_one_answer_and_no_traceback(serving, caplog, request_bytes, expected):
    connect = serving(Limits(body_seconds=0.3))
    connection = connect()
    try:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
    except ConnectionError:
        pass
    found = status(received(connection))
    assert found in (expected, b"") if len(request_bytes) > 4096 else found in (expected, b"408", b"400")
    assert is_served(connect)
    assert not [record for record in caplog.records if record.exc_info]


def test_pipelined_requests_are_answered_in_order_and_garbage_after_them_ends_the_connection(serving, caplog):
    connect = serving(Limits())
    connection = connect()
    post = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
    connection.sendall(b"".join(post % (size, b"x" * size) for size in (1, 22, 333)) + b"\x00garbage\r\n\r\n")
    answer = received(connection)
    assert [part.rpartition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 ")[1:4]] == [b"1", b"22", b"333"]
    assert b"HTTP/1.1 400" in answer
    assert is_served(connect)
    assert not [record for record in caplog.records if record.exc_info]


def test_the_log_of_what_peers_can_cause_is_bounded(caplog):
    budget = LogBudget()
    records = [logging.LogRecord("asyncio", logging.ERROR, "x", 1, "socket.accept()", (), None) for _ in range(9999)]
    assert sum(map(budget.filter, records)) == LOG_LINES
    assert budget.filter(logging.LogRecord("opd_mcp.server", logging.ERROR, "x", 1, "a tool failed", (), None))


@pytest.mark.parametrize("files", [128, 256, 1024])
def test_200_half_open_requests_neither_stop_the_server_nor_fill_its_log(tmp_path, files):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "runtime").mkdir(mode=0o700)
    environment = {**os.environ, "OPD_HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": str(tmp_path / "runtime")}
    command = [sys.executable, "-m", "opd_mcp.cli", "serve", "--transport", "http", "--port", str(port)]
    script = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}));"
    script += "os.execv(sys.argv[1], sys.argv[1:])"
    with (tmp_path / "stderr").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", script, *command], env=environment, stderr=log)
    try:
        connect: Connect = lambda: socket.create_connection(("127.0.0.1", port), timeout=60)  # noqa: E731
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                connect().close()
                break
            except ConnectionRefusedError:
                assert server.poll() is None
                time.sleep(0.05)
        with ExitStack() as held:
            for _ in range(200):
                connection = held.enter_context(connect())
                connection.sendall(b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
            assert all(is_served(connect) for _ in range(5))
        assert server.poll() is None
        assert (tmp_path / "stderr").stat().st_size < 64 << 10
        assert b"Traceback" not in (tmp_path / "stderr").read_bytes()
    finally:
        server.terminate()
        server.wait(timeout=30)

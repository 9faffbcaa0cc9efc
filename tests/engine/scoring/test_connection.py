"""One request, asked again where that can help: which answers that is, and how long the pauses are."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opd_mcp.engine.scoring.connection import Access, Flow, Patience, Refusal, Server
from opd_mcp.schemas.errors import ResourceError, RunError
from opd_mcp.schemas.next_action import resume_call

GOOD = (200, {}, b'{"fine": true}')
BUSY = (503, {}, b"busy")


class Pauses(threading.Event):
    """An event that notes how long it was asked to wait, and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        return self.is_set()


class Scripted(ThreadingHTTPServer):
    """Gives the answers of a script, (status, headers, content), one a request, and keeps the headers it was sent."""

    daemon_threads = True

    def __init__(self, script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.seen = list(script), []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append(dict(self.headers))
        status, headers, content = self.server.script.pop(0)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def client():
    """`client(script)`: a scripted server and a client of it."""
    servers = []

    def made(script, **given) -> tuple[Scripted, Server]:
        servers.append(Scripted(script))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        patience = Patience(timeout_s=10, attempts=5, first_pause_s=1, longest_pause_s=6)
        url = f"http://127.0.0.1:{servers[-1].server_port}/v1"
        return servers[-1], Server(url, Access("the-key", patience, **given), Pauses())

    yield made
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_key_goes_as_a_bearer_token_and_shows_in_no_repr(client):
    served, server = client([GOOD])
    assert server.ask("GET", "/v1/models") == {"fine": True}
    assert served.seen[0]["Authorization"] == "Bearer the-key"
    assert "the-key" not in repr(server) + repr(server.access)


def test_pauses_grow_up_to_a_limit(client):
    _, server = client([BUSY, BUSY, BUSY, BUSY, GOOD])
    server.ask("GET", "/")
    bounds = [(0.5, 1), (1, 2), (2, 4), (3, 6)]
    assert all(low <= pause <= high for pause, (low, high) in zip(server.stopped.seconds, bounds, strict=True))


def test_retry_after_is_heeded_within_the_limit(client):
    _, server = client([(429, {"Retry-After": "3"}, b""), (429, {"Retry-After": "9999"}, b""), GOOD])
    server.ask("GET", "/")
    assert server.stopped.seconds == [3, 6]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((500, {}, b""), "HTTP 500"),
        ((429, {}, b""), "HTTP 429"),
        ((200, {}, b"<html>"), "not JSON"),
        ((200, {}, json.dumps("x" * 200).encode()), "too long"),
    ],
)
def test_what_stays_wrong_is_one_error_with_the_last_reason(client, answer, why):
    served, server = client([answer] * 5)
    with pytest.raises(ResourceError, match=rf"teacher_unreachable.*5 attempts.*{why}"):
        server.ask("GET", "/", max_bytes=100)
    assert served.script == []


def test_the_first_and_the_last_failure_are_told_in_the_server_s_words(client):
    loading = (503, {}, json.dumps({"error": {"message": "the-key: model\nis loading"}}).encode())
    _, server = client([loading, *[BUSY] * 4])
    with pytest.raises(ResourceError, match=r"the first: HTTP 503: …: model is loading; the last: HTTP 503: busy\."):
        server.ask("GET", "/")


def test_a_server_that_was_proven_is_asked_until_it_may_have_started_again(client):
    served, server = client([BUSY] * 8 + [GOOD])
    server.known.set()
    assert server.another().ask("GET", "/") == {"fine": True}
    assert served.script == []


def test_a_busy_server_is_sent_half_as_much_and_then_slowly_more():
    flow, numbers = Flow(), []

    def going() -> None:
        raise AssertionError("there is room")

    with contextlib.ExitStack() as stack:
        numbers = [stack.enter_context(flow.turn(going)) for _ in range(8)]
    with flow.turn(going) as late:
        flow.was_busy(late)  # as the second of two: its own turn counts as over
    assert flow.limit == 1
    flow.was_busy(numbers[0])
    assert flow.limit == 1, "it was sent before the server said that it is busy"
    with flow.turn(going), pytest.raises(AssertionError), flow.turn(going):
        pass
    flow.was_answered()
    flow.was_answered()
    assert flow.limit == 2.5


def test_a_server_whose_queue_is_long_is_sent_what_it_works_on_and_a_few():
    flow = Flow()

    def going() -> None:
        raise AssertionError("there is room")

    with contextlib.ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(flow.turn(going))
        flow.was_queued(2)
        assert flow.limit == float("inf"), "two of sixteen keep it from being idle"
        flow.was_queued(12)
        assert flow.limit == 6
        flow.was_queued(12)
        assert flow.limit == 6, "said again while nothing was answered, it means the same"
        flow.was_queued(100)
        assert flow.limit == 1, "most of them are others'"
    flow.was_answered()
    assert flow.limit == 2


def test_an_engine_and_a_verification_have_their_own_words(client):
    _, server = client([BUSY] * 5, role="engine", resumes=False)
    with pytest.raises(ResourceError, match=r"engine_unreachable.*The engine's server.*then ask again") as caught:
        server.ask("GET", "/")
    assert caught.value.call is None


def test_a_server_that_is_away_has_one_way_out_to_resume(client):
    _, server = client([(500, {}, b"")] * 5)
    with pytest.raises(ResourceError, match="teacher_unreachable") as caught:
        server.ask("GET", "/")
    assert caught.value.call == resume_call()
    assert "start" not in caught.value.fix


def test_a_refusal_is_not_asked_again(client):
    served, server = client([(400, {}, b"no, the-key!"), GOOD])
    with pytest.raises(Refusal, match="HTTP 400: no, …!") as caught:
        server.ask("GET", "/")
    assert caught.value.status == 400
    assert len(served.seen) == 1


def test_a_redirect_is_not_followed(client):
    served, server = client([(302, {"Location": "/elsewhere"}, b""), GOOD])
    with pytest.raises(Refusal, match="HTTP 302"):
        server.ask("GET", "/")
    assert len(served.seen) == 1


def test_no_proxy_of_the_environment_is_used(client, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert client([GOOD])[1].ask("GET", "/") == {"fine": True}


def test_a_run_that_shall_stop_asks_no_more(client):
    served, server = client([GOOD], should_stop=lambda: True)
    with pytest.raises(RunError, match="run_cancelled"):
        server.ask("GET", "/")
    assert served.seen == []


STATUS, HEADERS = b"HTTP/1.1 200 OK\r\n", b"Content-Length: 100000\r\n\r\n"


class Trickling(threading.Thread):
    """A server that sends `begin` at once, and then one byte at a time without end."""

    def __init__(self, begin: bytes, byte: bytes) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.begin, self.byte, self.sent = begin, byte, threading.Event()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(self.begin)
            while True:
                connection.sendall(self.byte)
                self.sent.set()
                time.sleep(0.02)


TRICKLES = {
    "status": (b"HTTP/1.1 200 O", b"K"),
    "headers": (STATUS + b"X-Long: ", b"x"),
    "body": (STATUS + HEADERS, b" "),
}


@pytest.fixture(params=TRICKLES)
def trickling(request):
    server = Trickling(*TRICKLES[request.param])
    yield server
    server.listener.close()


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(trickling):
    access = Access(patience=Patience(timeout_s=60, total_s=0.3, attempts=2, first_pause_s=0.01))
    with pytest.raises(ResourceError, match=r"teacher_unreachable.*2 attempts.*no whole answer within 0.3 s"):
        Server(trickling.url, access).ask("GET", "/")


def test_a_cancel_ends_a_request_that_is_under_way(trickling):
    access = Access(patience=Patience(timeout_s=3600, total_s=3600), should_stop=trickling.sent.is_set)
    with pytest.raises(RunError, match="run_cancelled"):
        Server(trickling.url, access).ask("GET", "/")


def test_a_cancel_ends_the_wait_for_a_server_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url, asked = f"http://127.0.0.1:{listener.getsockname()[1]}", iter([False, False])
        access = Access(patience=Patience(timeout_s=3600), should_stop=lambda: next(asked, True))
        with pytest.raises(RunError, match="run_cancelled"):
            Server(url, access).ask("GET", "/")

"""Hostile HTTP connections to a real server: each whole request is answered, nobody gets in, and the server lives on.

    python tools/fuzz/connections.py --connections 5000 --seed 0 --json connections.json

Half-open and slow requests (up to 200 held at a time, with 256 open files for the server), garbage, damaged and
oversized headers, pipelined requests, chunked and mismatched bodies, foreign and odd names, origins and cookies, bad
JSON-RPC with the token, and clients that go away. Every 25 connections a tool is called. Exits with 1 and prints the
connections that broke a rule; what the server opens is recorded (`opens.py`).
"""

import argparse
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import EXAMPLE
from tools.fuzz import printed
from tools.fuzz.frames import INITIALIZE, drawn_line
from tools.fuzz.opens import OpensAudit

FILES = 256
HELD = 200
ANSWER_SECONDS = 60
LOG_BYTES = 1 << 20
PATHS = ("/mcp", "/dashboard", "/dashboard/feed", "/health", "/", "/mcp/", "/dashboard/%2e%2e/mcp", "//mcp", "*")
NAMES = (
    *(
        "localhost",
        "127.0.0.1:80",
        "[::1]",
        "evil.example",
        "localhost:anything",
        "localhost:80@evil.example",
        "[::1]x",
    ),
    *("", "localhost.", "LOCALHOST", "127.1", "[::ffff:127.0.0.1]", "localhost:99999", "\xff", "localhost evil"),
)
COOKIES = ('opd_dashboard_PORT="\\', "=;=;;", "opd_dashboard_PORT=a.b", "\xff\xfe=1", "a" * 4000, "$Version=1; [x]=@")
STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) ", re.MULTILINE)


@dataclass(frozen=True)
class Attempt:
    """What is written to a connection. `whole`: a whole request, which must be answered; else it is held open."""

    kind: str
    content: bytes
    whole: bool = True
    token: bool = False


def request_bytes(rng: random.Random, head: dict[str, str], body: bytes = b"", method: str | None = None) -> bytes:
    """A request for some path with the headers."""
    method = method or rng.choice(("GET", "GET", "POST", "DELETE", "OPTIONS", "HEAD"))
    lines = [f"{method} {rng.choice(PATHS)} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The bytes with a few of them changed, cut out or repeated."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[place : place + rng.randrange(1, 9)]
            case _:
                data[place:place] = data[place : place + 9] * rng.randrange(1, 90)
        data = data or bytearray(b"\r\n")
    return bytes(data)


def drawn(rng: random.Random, port: int, token: str, session: str) -> Attempt:
    """The next connection."""
    head = {"Host": f"127.0.0.1:{port}", "Connection": "close"}
    allowed = {**head, "Authorization": f"Bearer {token}"}
    call = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
    cut = request_bytes(rng, {**head, "Content-Length": "99"}, b"x")
    many = {f"X-{number}": "y" * rng.choice((1, 900)) for number in range(rng.choice((5, 70, 500)))}
    several = b"".join(request_bytes(rng, {"Host": head["Host"]}, method="GET") for _ in range(rng.randrange(1, 20)))
    length = rng.choice(({"Transfer-Encoding": "chunked"}, {"Content-Length": "-1"}, {"Content-Length": "1, 2"}))
    lengths = {**allowed, **length, **({"Content-Length": "5"} if rng.random() < 0.5 else {})}
    body = rng.choice((b"0\r\n\r\n", b"zz\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\n"))
    line = drawn_line(rng)
    call |= {"Mcp-Session-Id": session} if rng.random() < 0.8 else {}
    post = request_bytes(rng, {**allowed, **call, "Content-Length": str(len(line))}, line, "POST")
    rpc = Attempt("json-rpc", re.sub(rb"^POST \S+", b"POST /mcp", post), token=True)
    attempts = (
        Attempt("half-open", cut[: rng.randrange(len(cut))], whole=False),
        Attempt("slow body", request_bytes(rng, {**allowed, "Content-Length": "99"}, b"x", "POST"), whole=False),
        Attempt("garbage", rng.randbytes(rng.randrange(1, 5000)), whole=False),
        Attempt("damaged", damaged(rng, request_bytes(rng, head)), whole=False),
        Attempt("body", request_bytes(rng, lengths, body, "POST"), whole=False),
        Attempt("large headers", request_bytes(rng, {**head, **many})),
        Attempt("pipelined", several + request_bytes(rng, head)),
        Attempt("name", request_bytes(rng, {**head, "Host": rng.choice(NAMES)})),
        Attempt("origin", request_bytes(rng, {**head, "Origin": f"http://{rng.choice(NAMES)}"})),
        Attempt("cookie", request_bytes(rng, {**head, "Cookie": rng.choice(COOKIES).replace("PORT", str(port))})),
        rpc,
        rpc,
    )
    return rng.choice(attempts)


class Server:
    """A real server over HTTP, with a workspace of its own and few files to open."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.home = folder / "home"
        self.log = folder / "stderr"
        (folder / "runtime").mkdir(mode=0o700)
        self.audit = OpensAudit(folder / "opens")
        self.runtime = folder / "runtime"
        environment = {**os.environ, "OPD_HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.runtime)}
        limit = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}));"
        limit += "os.execv(sys.argv[1], sys.argv[1:])"
        serve = [sys.executable, "-m", "opd_mcp.cli", "serve", "--transport", "http", "--port", str(self.port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", limit, *serve], stderr=log, env={**environment, **self.audit.environment()}
            )
        while not self._listens():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        self.token = (self.home / "http.token").read_text().strip()
        found = re.search(rb"(?i)mcp-session-id: (\S+)", self.initialized())
        assert found is not None
        self.session = found[1].decode()

    def connect(self) -> socket.socket:
        """A new connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_SECONDS)

    def initialized(self) -> bytes:
        """What a well-meaning client is answered when it begins a session."""
        body = json.dumps(INITIALIZE).encode()
        head = {"Host": "localhost", "Connection": "close", "Authorization": f"Bearer {self.token}"}
        head |= {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
        head["Content-Length"] = str(len(body))
        lines = "\r\n".join(["POST /mcp HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())])
        with self.connect() as connection:
            connection.sendall(lines.encode() + b"\r\n\r\n" + body)
            return received(connection)

    def _listens(self) -> bool:
        try:
            self.connect().close()
        except OSError:
            return False
        return True


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes; raises TimeoutError when it does not."""
    parts = []
    with suppress(ConnectionError):  # it refused to read on, which is an answer
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def broken_rules(attempt: Attempt, answer: bytes) -> list[str]:
    """The rules that the answer to one attempt breaks."""
    statuses = [int(found) for found in STATUS.findall(answer)]
    rules = {
        "an answer": bool(statuses) or not attempt.whole or attempt.kind == "large headers",
        "no server error": not any(status >= 500 and status != 503 for status in statuses),
        "no internal error": b"internal_error" not in answer and b"Traceback" not in answer,
        "nobody without the token": attempt.token or (b"run_id" not in answer and b"serverInfo" not in answer),
    }
    return [rule for rule, holds in rules.items() if not holds]


def fuzz(connections: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts by kind and status, and the connections that broke a rule."""
    rng, server = random.Random(seed), Server(folder)
    statuses: Counter[str] = Counter()
    problems: list[dict[str, Any]] = []
    held: deque[tuple[Attempt, socket.socket]] = deque()

    def judge(attempt: Attempt, connection: socket.socket) -> None:
        try:
            answer = received(connection)
        except TimeoutError:
            problems.append({"kind": attempt.kind, "content": repr(attempt.content[:300]), "rules": ["an end in time"]})
            return
        finally:
            connection.close()
        statuses.update(f"{attempt.kind} {found.decode()}" for found in STATUS.findall(answer))
        if rules := broken_rules(attempt, answer):
            shown = {"content": repr(attempt.content[:300]), "answer": repr(answer[:300])}
            problems.append({"kind": attempt.kind, **shown, "rules": rules})

    for number in range(connections):
        attempt = drawn(rng, server.port, server.token, server.session)
        try:
            connection = server.connect()
            with suppress(ConnectionError):  # refused before its end
                connection.sendall(attempt.content)
        except OSError as error:
            problems.append({"kind": attempt.kind, "rules": [f"a connection: {error!r}"]})
            break
        if attempt.whole and rng.random() < 0.9:
            judge(attempt, connection)
        elif attempt.whole:
            connection.close()
        else:
            held.append((attempt, connection))
        if len(held) > HELD:
            held.popleft()[1].close()
        if number % 25 == 0 and b"serverInfo" not in server.initialized():
            problems.append({"kind": attempt.kind, "rules": ["a well-meaning client is served"]})
    for attempt, connection in held:
        judge(attempt, connection)
    if server.process.poll() is not None or b"serverInfo" not in server.initialized():
        problems.append({"rules": ["the server lives"]})
    server.process.terminate()
    server.process.wait(timeout=60)
    log = server.log.read_bytes()
    # The SDK logs a traceback for an unknown prompt, which is answered well.
    if len(log) > LOG_BYTES or any(fault in log for fault in (b"ERROR asyncio", b"Exception in ASGI", b"Tool ")):
        problems.append({"rules": [f"a short log: {len(log)} bytes"], "log": repr(log[-2000:])})
    outside = server.audit.outside([server.home, server.runtime, EXAMPLE])
    problems += [{"rules": ["opened"], "path": path} for path in outside]
    report = {"connections": connections, "seed": seed, "answers": dict(sorted(statuses.items()))}
    return {**report, "log_bytes": len(log), "outside": len(outside), "problems": problems}


def main() -> int:
    """The command line's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard > 0 else soft, hard))
    with tempfile.TemporaryDirectory() as folder:
        report = fuzz(options.connections, options.seed, Path(folder))
    return printed(report, options.json)


if __name__ == "__main__":
    sys.exit(main())

"""A proxy between a client and a real teacher server that spoils chosen answers."""

import json
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opd_mcp.engine.scoring.remote import probe_ids

STALL_SECONDS = 1.5


class FaultProxy(ThreadingHTTPServer):
    """Forwards to `upstream`; request number n on POST suffers `faults(n)`: a fault's name, or None.

    Requests for the probe are not counted and suffer nothing, unless `spoils_probes`.
    """

    daemon_threads = True

    def __init__(self, upstream: int, faults) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.faults = upstream, faults
        self.spoils_probes = False
        self.posts, self.lock = 0, threading.Lock()
        self.at_a_time = self.most_at_a_time = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, body: bytes) -> str | None:
        ids = json.loads(body)["prompt"]
        if ids == probe_ids(max(ids) + 1) and not self.spoils_probes:
            return None
        with self.lock:
            self.posts += 1
            return self.faults(self.posts)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._forward(self._body(), None)

    def do_POST(self) -> None:
        with self.server.lock:
            self.server.at_a_time += 1
            self.server.most_at_a_time = max(self.server.most_at_a_time, self.server.at_a_time)
        try:
            body = self._body()
            self._forward(body, self.server.fault(body))
        finally:
            with self.server.lock:
                self.server.at_a_time -= 1

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _forward(self, body: bytes, fault: str | None) -> None:
        if fault == "refused":
            self.close_connection = True
            self.connection.close()
            return
        if fault in ("500", "429"):
            self._answer(int(fault), b'{"error": "busy"}')
            return
        if fault == "echo":
            self._answer(403, f"who are you, {self.headers['Authorization']}?".encode())
            return
        if fault == "stalled":
            time.sleep(STALL_SECONDS)
        upstream = HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        upstream.request(self.command, self.path, body, headers)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        if fault == "truncated":
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.close()
            return
        if fault == "half_json":
            content = content[: len(content) // 2]
        if fault in ("short", "nan", "other_ids") and response.status == 200:
            answer = json.loads(content)
            positions = answer["choices"][0]["prompt_logprobs"]
            if fault == "short":
                positions.pop()
            elif fault == "nan":
                next(iter(positions[-1].values()))["logprob"] = float("nan")
            else:
                positions[-1] = {"3": {"logprob": -1.0}, "2": {"logprob": -2.0}}
            content = json.dumps(answer).encode()
        self._answer(response.status, content)

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

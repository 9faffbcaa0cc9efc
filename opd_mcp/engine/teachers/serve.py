"""`opd-mcp serve-teacher`: a model's log-probs over HTTP, in the subset of vLLM's API that scoring needs.

POST /v1/completions takes token ids and answers with `prompt_logprobs`; GET /v1/models says who is served, GET
/v1/opd/tokens what its ids mean, GET /health whether. Requests that come together are scored together; a full queue is
answered with 429. Text is not accepted and nothing is generated: tokens in, log-probs out.
"""

import hmac
import json
import socket
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from opd_mcp.engine.runtime import open_runtime
from opd_mcp.engine.teachers.scorer import Job, Limits, Scorer
from opd_mcp.engine.teachers.teacher import LocalTeacher, open_local
from opd_mcp.engine.teachers.wire import TOKENS_PATH, TOKENS_SPAN
from opd_mcp.identity.tokenizers import token_map
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.recipes import RuntimeRecipe

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY_BYTES = 8 << 20
IDLE_SECONDS = 60.0


class BadRequest(ValueError):
    """A request that is answered with 400; the text says why."""


class TeacherServer(ThreadingHTTPServer):
    """Serves one teacher; `key` is the bearer token that every request but /health must show."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], teacher: LocalTeacher, key: str | None, limits: Limits) -> None:
        self.teacher, self.key, self.limits = teacher, key, limits
        self.scorer = Scorer(teacher, limits)
        super().__init__(address, _Handler)

    def server_close(self) -> None:
        """Stop listening, then end the scorer."""
        super().server_close()
        self.scorer.close()

    def jobs(self, body: Any) -> list[Job]:
        """The sequences of a request's body; raises BadRequest."""
        if not isinstance(body, dict):
            raise BadRequest("the body is not a JSON object")
        prompt, topk, start = body.get("prompt"), body.get("prompt_logprobs", 0), body.get("opd_start", 1)
        prompts = [prompt] if isinstance(prompt, list) and prompt and type(prompt[0]) is int else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(ids, list) for ids in prompts):
            raise BadRequest("prompt is one or more lists of token ids; text is not accepted")
        if body.get("stream") or body.get("echo") or body.get("n", 1) != 1:
            raise BadRequest("stream, echo and n are not supported")
        if type(topk) is not int or not 0 <= topk <= min(self.limits.topk, self.teacher.model.facts.tokens):
            raise BadRequest(f"prompt_logprobs is between 0 and {self.limits.topk}")
        for ids in prompts:
            if not all(type(token) is int and 0 <= token < self.teacher.vocab_size for token in ids):
                raise BadRequest(f"token ids are between 0 and {self.teacher.vocab_size - 1}")
            if not 2 <= len(ids) <= self.limits.length:
                raise BadRequest(f"a sequence has between 2 and {self.limits.length} tokens")
            if type(start) is not int or not 1 <= start < len(ids):
                raise BadRequest("opd_start lies within the sequence")
        return [Job(ids, start, topk) for ids in prompts]

    def token_range(self, query: dict[str, list[str]]) -> tuple[int, dict[str, Any]]:
        """Status and answer to a question for the tokens of ids `start` to below `start + count`; null: no such id."""
        given = [query.get(name, ["0"])[0] for name in ("start", "count")]
        start, count = (int(text) if text.isdigit() and len(text) < 10 else -1 for text in given)
        if start < 0 or not 1 <= count <= TOKENS_SPAN:
            return 400, _error(f"start is an id, count between 1 and {TOKENS_SPAN}")
        tokens = [self.tokens.get(token) for token in range(start, start + count)]
        return 200, {"total": max(self.tokens, default=-1) + 1, "start": start, "tokens": tokens}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The teacher's id → token map, read when somebody asks for it."""
        return token_map(self.teacher.model.path)

    def models(self) -> dict[str, Any]:
        """The answer to /v1/models."""
        entry = {
            "id": self.teacher.identity.name,
            "object": "model",
            "owned_by": "opd-mcp",
            "max_model_len": self.limits.length + 1,
            "opd_vocab_size": self.teacher.vocab_size,
            "opd_identity": self.teacher.identity.to_dict(),
        }
        return {"object": "list", "data": [entry]}


def serve(model: Path, host: str, port: int, key: str | None, threads: int, limits: Limits) -> None:
    """Serve the model until interrupted; the address is printed once the server answers.

    Raises ArgumentError `invalid_argument` for an address that others reach, without a key, or that is not free.
    """
    if key is None and host not in LOOPBACK:
        raise ArgumentError(
            "invalid_argument",
            "A teacher that other machines reach needs a key.",
            value=host,
            fix="Set OPD_TEACHER_KEY to a long random text, here and where the student's machine asks.",
        )
    _require_free(host, port)
    runtime = open_runtime(RuntimeRecipe(threads=threads))
    with TeacherServer((host, port), open_local(model, runtime, limits.batch_tokens), key, limits) as server:
        print(f"serving {server.teacher.identity.label()} at http://{host}:{server.server_port}", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _require_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()  # before a model is loaded for minutes
    except OSError as error:
        raise ArgumentError(
            "invalid_argument",
            f"This address cannot be listened on: {error.strerror}.",
            value=f"{host}:{port}",
            fix="Give another --port or --host, or end what listens there.",
        ) from error


class _Handler(BaseHTTPRequestHandler):
    server: TeacherServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    wbufsize = -1  # one packet for head and body
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"status": "ok"})
        elif self._allowed():
            path = urlsplit(self.path)
            if path.path == "/v1/models":
                self._answer(200, self.server.models())
            elif path.path == TOKENS_PATH:
                self._answer(*self.server.token_range(parse_qs(path.query)))
            else:
                self._answer(*_no_such_path())

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._answer(413 if length.isdigit() else 411, _error(f"a body has at most {MAX_BODY_BYTES} bytes"))
            return
        content = self.rfile.read(int(length))
        if not self._allowed():
            return
        if self.path != "/v1/completions":
            self._answer(*_no_such_path())
            return
        try:
            body = json.loads(content)
            jobs = self.server.jobs(body)
        except (ValueError, RecursionError) as error:
            self._answer(400, _error(str(error)[:200]))
            return
        if not self.server.scorer.submit(jobs):
            self._answer(429, _error("the queue is full"), {"Retry-After": "1"})
            return
        try:
            results = [job.future.result() for job in jobs]
        except Exception as error:
            self._answer(500, _error(type(error).__name__))
            return
        self._answer(200, _completion(self.server.teacher.identity.name, jobs, results))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests hold tokens, and headers the key."""

    def _allowed(self) -> bool:
        key = self.server.key
        given = self.headers.get("Authorization", "").encode(errors="replace")
        if key is None or hmac.compare_digest(given, f"Bearer {key}".encode()):
            return True
        self._answer(401, _error("a bearer token is needed"))
        return False

    def _answer(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _completion(name: str, jobs: list[Job], results: list[list[dict[str, Any]]]) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": "",
            "finish_reason": "length",
            "prompt_logprobs": [None] * job.start + result,
        }
        for index, (job, result) in enumerate(zip(jobs, results, strict=True))
    ]
    tokens = sum(len(job.ids) for job in jobs)
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    return {"object": "text_completion", "model": name, "choices": choices, "usage": usage}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def _no_such_path() -> tuple[int, dict[str, Any]]:
    return 404, _error("no such path")

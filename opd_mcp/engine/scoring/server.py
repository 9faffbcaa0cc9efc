"""`opd-mcp serve-teacher`: a model over HTTP, in the subset of vLLM's API that scoring and generating need.

POST /v1/completions takes token ids and answers with `prompt_logprobs`, or with `return_token_ids` and `logprobs: 0`
with a response; GET /v1/models says who is served, GET /v1/opd/tokens what its ids mean, GET /health whether. Requests
that come together are scored together; each response is drawn alone, so that its seed decides it to the bit. A full
queue is answered with 429. Text is not accepted: tokens in, tokens and log-probs out.
"""

import asyncio
import contextvars
import hmac
import json
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from opd_mcp.engine.data.sequences import EOS, build_sequences
from opd_mcp.engine.generation.batch_state import Generated, GenerationSettings
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.models.kv_cache import decoding_problem
from opd_mcp.engine.runtime import open_runtime
from opd_mcp.engine.scoring.dialects import TOKENS_PATH, TOKENS_SPAN
from opd_mcp.engine.scoring.local import LocalTeacher, open_local, score_sequences
from opd_mcp.identity.tokenizers import token_map
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.recipes import RuntimeRecipe, Sampling

if TYPE_CHECKING:  # an engine that serves nothing needs neither
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY_BYTES = 8 << 20
IDLE_SECONDS = 60
GATHER_SECONDS = 0.004


@dataclass(frozen=True)
class RequestLimits:
    """What a server accepts."""

    queue: int = 256
    batch_tokens: int = 16384
    topk: int = 256
    length: int = 32768


@dataclass(frozen=True)
class Job:
    """One sequence to score from `start` on."""

    ids: list[int]
    start: int
    topk: int
    future: "Future[Any]" = field(default_factory=Future)


@dataclass(frozen=True)
class Draw(Job):
    """One prompt to answer, as the settings say."""

    settings: GenerationSettings | None = None


class Scorer:
    """The one thread that uses the model: it takes what is queued, as far as a batch goes, and scores it at once."""

    def __init__(self, teacher: LocalTeacher, limits: RequestLimits) -> None:
        self.teacher, self.limits = teacher, limits
        self.batches = 0
        self._jobs: queue.Queue[Job | None] = queue.Queue(limits.queue)
        # torch's compiler settings belong to a context, and a thread would begin with one of its own
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name="scorer", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> bool:
        """Whether there was room for all jobs; if not, those that were queued are cancelled."""
        for job in jobs:
            try:
                self._jobs.put_nowait(job)
            except queue.Full:
                for other in jobs:
                    other.future.cancel()
                return False
        return True

    def close(self) -> None:
        """End the thread after what is queued."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch, ended = self._gathered()
            if batch:
                self.batches += 1
                try:
                    self._score([job for job in batch if not isinstance(job, Draw)])
                    for job in batch:
                        if isinstance(job, Draw) and job.settings is not None:
                            job.future.set_result(generate(self.teacher.model.model, [job.ids], job.settings)[0])
                except Exception as error:
                    for job in batch:
                        if not job.future.done():
                            job.future.set_exception(error)
            if ended:
                return

    def _gathered(self) -> tuple[list[Job], bool]:
        first = self._jobs.get()
        batch, tokens, until = [], 0, time.monotonic() + GATHER_SECONDS
        job = first
        while job is not None:
            if job.future.set_running_or_notify_cancel():
                batch.append(job)
                tokens += len(job.ids)
            if tokens >= self.limits.batch_tokens:
                return batch, False
            try:
                job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return batch, False
        return batch, True

    def _score(self, batch: list[Job]) -> None:
        if not batch:
            return
        sequences = build_sequences([job.ids[: job.start] for job in batch], [job.ids[job.start :] for job in batch])
        scores = score_sequences(
            self.teacher.model,
            sequences,
            topk=max(job.topk for job in batch),
            micro_batch_tokens=self.limits.batch_tokens,
            runtime=self.teacher.runtime,
            valid_vocab=self.teacher.model.facts.tokens,
        )
        for row, job in enumerate(batch):
            here = slice(*sequences.response_offsets[row : row + 2])
            best: list[tuple[list[int], list[float]]] = [([], [])] * (len(job.ids) - job.start)
            if scores.topk_ids is not None and scores.topk_logprobs is not None and job.topk:
                ids, values = scores.topk_ids[here, : job.topk].tolist(), scores.topk_logprobs[here].tolist()
                best = list(zip(ids, values, strict=True))
            own = scores.logprobs[here].tolist()
            job.future.set_result([_entry(*pair) for pair in zip(job.ids[job.start :], own, best, strict=True)])


def _entry(token: int, logprob: float, best: tuple[list[int], list[float]]) -> dict[str, Any]:
    entries = {
        str(other): {"logprob": _finite(value), "rank": rank}
        for rank, (other, value) in enumerate(zip(*best, strict=True), 1)
    }
    # the token's own log-prob wins over its entry among the k best: the number that is trained on is never hidden
    return entries | {str(token): entries.get(str(token), {}) | {"logprob": _finite(logprob)}}


def _finite(logprob: float) -> float | None:
    # JSON has no NaN; the client leaves out the row that holds it, not the whole build
    return logprob if math.isfinite(logprob) else None


class BadRequest(ValueError):
    """A request that is answered with 400; the text says why."""


class TeacherService:
    """What the routes answer for one teacher; it ends with `close`."""

    def __init__(self, teacher: LocalTeacher, limits: RequestLimits) -> None:
        self.teacher, self.limits = teacher, limits
        self.scorer = Scorer(teacher, limits)

    def close(self) -> None:
        """End the scorer after what is queued."""
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
        if "prompt_logprobs" not in body and body.get("return_token_ids"):
            return [self._draw(body, ids) for ids in prompts]
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

    @cached_property
    def undecodable(self) -> str | None:
        """Why this model cannot answer prompts, if it cannot; found out at the first request."""
        return decoding_problem(self.teacher.model.model)

    def _draw(self, body: Mapping[str, Any], ids: list[int]) -> Draw:
        """The prompt to answer; raises BadRequest for settings that would silently be something else."""
        if self.undecodable is not None:
            raise BadRequest(f"this model does not generate: {self.undecodable}")
        off = {"top_k": (-1, 0), "min_p": (0,), "repetition_penalty": (1,), "presence_penalty": (0,)}
        off |= {"frequency_penalty": (0,), "min_tokens": (0,), "logprobs": (0,), "ignore_eos": (True,)}
        for name, values in off.items():
            if body.get(name, values[0]) not in values:
                raise BadRequest(f"{name} is {values[0]} or absent")
        seed, stops, limit = body.get("seed"), body.get("stop_token_ids"), body.get("max_tokens")
        if type(seed) is not int or not 0 <= seed < 1 << 63:
            raise BadRequest("seed is between 0 and 2^63 - 1")
        if not isinstance(stops, list) or not all(type(stop) is int for stop in stops):
            raise BadRequest("stop_token_ids is a list of token ids")
        if not all(type(token) is int and 0 <= token < self.teacher.vocab_size for token in ids):
            raise BadRequest(f"token ids are between 0 and {self.teacher.vocab_size - 1}")
        if type(limit) is not int or not 1 <= limit <= self.limits.length - len(ids) or not ids:
            raise BadRequest(f"prompt and max_tokens together have at most {self.limits.length} tokens")
        try:
            sampling = Sampling(temperature=body["temperature"], top_p=body["top_p"], max_new_tokens=limit)
        except (KeyError, ValidationError) as error:
            raise BadRequest("temperature is between 0 and 10, top_p above 0 and at most 1") from error
        tokens = self.teacher.model.facts.tokens
        return Draw(ids, 1, 0, settings=GenerationSettings(sampling, stops, 1, seed, "served", tokens))

    def token_range(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The tokens of ids `start` to below `start + count`, null where there is no such id; raises BadRequest."""
        given = [query.get(name, "0") for name in ("start", "count")]
        start, count = (int(text) if text.isdigit() and len(text) < 10 else -1 for text in given)
        if start < 0 or not 1 <= count <= TOKENS_SPAN:
            raise BadRequest(f"start is an id, count between 1 and {TOKENS_SPAN}")
        tokens = [self.tokens.get(token) for token in range(start, start + count)]
        return {"total": max(self.tokens, default=-1) + 1, "start": start, "tokens": tokens}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The teacher's id → token map, read when it is asked for."""
        return token_map(self.teacher.model.path)

    def models(self) -> dict[str, Any]:
        """The answer to /v1/models."""
        entry = {
            "id": self.teacher.identity.name,
            "object": "model",
            "owned_by": "opd-mcp",
            "max_model_len": self.limits.length + 1,
            "opd_vocab_size": self.teacher.vocab_size,
            "opd_version": version("opd-mcp"),
            "opd_dtype": str(self.teacher.runtime.dtype).removeprefix("torch."),
            "opd_identity": self.teacher.identity.to_dict(),
        }
        return {"object": "list", "data": [entry]}


def teacher_app(service: TeacherService, key: str | None) -> "Starlette":
    """The routes; `key` is the bearer token that every request but /health must show."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    def answer(status: int, body: Any, **headers: str) -> Response:
        return Response(json.dumps(body), status, headers, media_type="application/json")

    def refused(request: Request) -> Response | None:
        length = request.headers.get("Content-Length", "")
        if request.method == "POST" and (not length.isdigit() or int(length) > MAX_BODY_BYTES):
            status = 413 if length.isdigit() else 411
            return answer(status, _error(f"a body has at most {MAX_BODY_BYTES} bytes"), Connection="close")
        given = request.headers.get("Authorization", "").encode(errors="replace")
        if request.url.path == "/health" or key is None or hmac.compare_digest(given, f"Bearer {key}".encode()):
            return None
        return answer(401, _error("a bearer token is needed"))

    async def health(request: Request) -> Response:
        return answer(200, {"status": "ok"})

    async def models(request: Request) -> Response:
        return answer(200, service.models())

    async def tokens(request: Request) -> Response:
        return answer(200, await run_in_threadpool(service.token_range, request.query_params))

    async def completions(request: Request) -> Response:
        async with asyncio.timeout(IDLE_SECONDS):
            content = await request.body()
        try:
            jobs = await run_in_threadpool(lambda: service.jobs(json.loads(content)))
        except (ValueError, RecursionError) as error:
            return answer(400, _error(str(error)[:200]))
        if not service.scorer.submit(jobs):
            return answer(429, _error("the queue is full"), **{"Retry-After": "1"})
        try:
            results = [await asyncio.wrap_future(job.future) for job in jobs]
        except Exception as error:
            return answer(500, _error(type(error).__name__))
        name = service.teacher.identity.name
        return await run_in_threadpool(lambda: answer(200, _completion(name, jobs, results)))

    async def bad_request(request: Request, error: Exception) -> Response:
        return answer(400, _error(str(error)))

    async def too_slow(request: Request, error: Exception) -> Response:
        return answer(408, _error(f"a body comes within {IDLE_SECONDS} s"), Connection="close")

    async def no_such_path(request: Request, error: Exception) -> Response:
        return answer(404, _error("no such path"))

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route(TOKENS_PATH, tokens),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    handlers: Any = {404: no_such_path, 405: no_such_path, BadRequest: bad_request, TimeoutError: too_slow}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.add_middleware(_Guard, refused=refused)
    return app


class _Guard:
    """Answers what is refused before its body is read."""

    def __init__(self, app: Any, refused: "Callable[[Request], Response | None]") -> None:
        self.app, self.refused = app, refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request

        refusal = self.refused(Request(scope)) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)


def http_server(app: "Starlette") -> "Server":
    """A server that logs nothing: requests hold tokens, and headers the key."""
    from uvicorn import Config, Server

    return Server(Config(app, log_config=None, log_level="critical", access_log=False, timeout_keep_alive=IDLE_SECONDS))


def serve(model: Path, host: str, port: int, key: str | None, threads: int, limits: RequestLimits) -> None:
    """Serve the model until interrupted; the address is printed once the server answers.

    Raises ArgumentError `invalid_argument` for an address that others reach, without a key, or that is not free.
    """
    if key is None and host not in LOOPBACK:
        raise ArgumentError(
            "invalid_argument",
            "A teacher that other machines reach needs a key.",
            value=host,
            fix="Set OPD_TEACHER_KEY to a long random text, here and on the student's machine.",
        )
    listening(host, port).close()  # before a model is loaded for minutes
    teacher = open_local(model, open_runtime(RuntimeRecipe(threads=threads)), limits.batch_tokens)
    service = TeacherService(teacher, limits)
    with listening(host, port) as server:
        print(f"serving {teacher.identity.label()} at http://{host}:{server.getsockname()[1]}", flush=True)
        with suppress(KeyboardInterrupt):
            http_server(teacher_app(service, key)).run(sockets=[server])
    service.close()


def listening(host: str, port: int) -> socket.socket:
    """A socket at the address, 0 for any free port; raises ArgumentError `invalid_argument` where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ArgumentError(
            "invalid_argument",
            f"This address cannot be listened on: {error.strerror}.",
            value=f"{host}:{port}",
            fix="Give another --port or --host, or end what listens there.",
        ) from error


def _completion(name: str, jobs: list[Job], results: list[Any]) -> dict[str, Any]:
    choices = [
        {"index": index, "text": ""} | (_drawn(job, result) if isinstance(job, Draw) else _scored(job, result))
        for index, (job, result) in enumerate(zip(jobs, results, strict=True))
    ]
    tokens = sum(len(job.ids) for job in jobs)
    drawn = sum(len(result.response_ids) for result in results if isinstance(result, Generated))
    usage = {"prompt_tokens": tokens, "completion_tokens": drawn, "total_tokens": tokens + drawn}
    return {"object": "text_completion", "model": name, "choices": choices, "usage": usage}


def _scored(job: Job, result: list[dict[str, Any]]) -> dict[str, Any]:
    return {"finish_reason": "length", "prompt_logprobs": [None] * job.start + result}


def _drawn(job: Draw, result: Generated) -> dict[str, Any]:
    return {
        "finish_reason": "stop" if result.finish_reason == EOS else "length",
        "prompt_token_ids": job.ids,
        "token_ids": result.response_ids,
        "logprobs": {"token_logprobs": [_finite(value) for value in result.logprobs]},
    }


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}

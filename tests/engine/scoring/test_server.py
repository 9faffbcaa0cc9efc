"""`serve-teacher` as any client sees it: vLLM's answers, refusals that say why, batches, a bounded queue, a key."""

import json
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest

from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.scoring.connection import Access
from opd_mcp.engine.scoring.dialects import TOKENS_PATH, TOKENS_SPAN
from opd_mcp.engine.scoring.remote import open_remote, probe_ids
from opd_mcp.engine.scoring.server import MAX_BODY_BYTES, Job, RequestLimits
from opd_mcp.identity.tokenizers import token_map
from opd_mcp.schemas.identity import RemoteTeacher

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
KEY = "the-server-s-key"


@pytest.fixture(scope="module")
def server(serve_model) -> Iterator:
    server = serve_model("teacher", KEY, RequestLimits(length=64))
    yield server
    server.close()


@pytest.fixture
def rows() -> Sequences:
    rng = np.random.default_rng(3)
    lists = [[rng.integers(3, 20, size=size).tolist() for size in (4, 9, 5, 7, 6, 8, 4, 5)] for _ in range(2)]
    return build_sequences(*lists)


def ask(
    port: int, method: str, path: str, body: bytes | None = None, key: str | None = KEY, **headers: str
) -> tuple[int, dict]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, {**({"Authorization": f"Bearer {key}"} if key else {}), **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def post(port: int, body: object, **given: str) -> tuple[int, dict]:
    return ask(port, "POST", "/v1/completions", json.dumps(body).encode(), **given)


def test_concurrent_requests_get_the_scores_of_the_model_alone(server, rows):
    remote = RemoteTeacher(name="teacher", url=server.url)
    teacher = open_remote(remote, EXAMPLE / "student", access=Access(KEY), concurrency=16)
    scored = teacher.score(rows, 2)
    teacher.close()
    assert not scored.refused
    alone = server.service.teacher.score(rows, 2).scores
    assert np.abs(scored.scores.logprobs - alone.logprobs).max() <= 1e-4


def test_what_waits_while_the_model_is_busy_is_one_batch(server, monkeypatch):
    busy, go_on, batches = threading.Event(), threading.Event(), []
    real = type(server.service.scorer)._score

    def slow(self, batch):
        batches.append(len(batch))
        busy.set()
        assert go_on.wait(10)
        real(self, batch)

    monkeypatch.setattr(type(server.service.scorer), "_score", slow)
    first = Job([3, 4, 5], 1, 0)
    assert server.service.scorer.submit([first])
    assert busy.wait(10)
    waiting = [Job([3, 4, 5, 6], 1, 2) for _ in range(9)]
    assert all(server.service.scorer.submit([job]) for job in waiting)
    go_on.set()
    assert [len(job.future.result(10)) for job in (first, *waiting)] == [2, *[3] * 9]
    assert batches == [1, 9]


def test_a_full_queue_is_answered_with_429(serve_model):
    full = serve_model("teacher", KEY, RequestLimits(queue=1))
    try:
        assert not full.service.scorer.submit([Job([1, 2, 3], 1, 0) for _ in range(50)])
        status, body = post(full.port, {"prompt": [[1, 2, 3]] * 50})
        assert (status, body["error"]["message"]) == (429, "the queue is full")
        assert post(full.port, {"prompt": [1, 2, 3]})[0] == 200
    finally:
        full.close()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"prompt": "text"}, "token ids"),
        ({"prompt": [1, 2, 99999]}, "token ids are between"),
        ({"prompt": [1]}, "between 2 and 64"),
        ({"prompt": [1] * 65}, "between 2 and 64"),
        ({"prompt": [1, 2], "prompt_logprobs": 5000}, "prompt_logprobs"),
        ({"prompt": [1, 2], "stream": True}, "stream"),
        ({"prompt": [1, 2], "opd_start": 2}, "opd_start"),
        ([], "JSON object"),
    ],
)
def test_the_server_says_what_is_wrong_with_a_request(server, body, why):
    status, answer = post(server.port, body)
    assert status == 400
    assert why in answer["error"]["message"]


def test_a_body_that_is_too_long_is_refused_before_it_is_read(server):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", str(MAX_BODY_BYTES + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_a_body_without_a_length_is_refused(server):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    assert connection.getresponse().status == 411


def test_paths_and_methods_that_are_not_served_are_404(server):
    assert ask(server.port, "GET", "/v1/chat/completions")[0] == 404
    assert ask(server.port, "GET", "/v1/completions")[0] == 404
    assert ask(server.port, "GET", "/v1/chat/completions", key=None)[0] == 401


def test_a_failure_of_the_model_is_500_by_its_kind(server, monkeypatch):
    def broken(self, batch):
        raise ValueError("what the model says is not for the network")

    monkeypatch.setattr(type(server.service.scorer), "_score", broken)
    status, answer = post(server.port, {"prompt": [1, 2, 3]})
    assert (status, answer["error"]["message"]) == (500, "ValueError")


def test_health_needs_no_key_and_everything_else_does(server):
    assert ask(server.port, "GET", "/health", key=None) == (200, {"status": "ok"})
    for key in ("wrong", None):
        assert post(server.port, {"prompt": [1, 2]}, key=key)[0] == 401
        assert ask(server.port, "GET", "/v1/models", key=key)[0] == 401
        assert ask(server.port, "GET", f"{TOKENS_PATH}?start=0&count=2", key=key)[0] == 401
    assert ask(server.port, "GET", "/v1/models")[0] == 200


def test_a_plain_vllm_client_gets_vllm_s_answer(server):
    ids = probe_ids(server.service.teacher.model.facts.tokens)
    status, answer = post(server.port, {"model": "teacher", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 2})
    positions = answer["choices"][0]["prompt_logprobs"]
    assert status == 200
    assert positions[0] is None
    assert [str(token) in entries for token, entries in zip(ids[1:], positions[1:], strict=True)] == [True] * 15
    assert all(2 <= len(entries) <= 3 for entries in positions[1:])


def test_the_server_says_what_its_ids_mean_in_pieces(server):
    tokens = token_map(EXAMPLE / "teacher")
    status, answer = ask(server.port, "GET", f"{TOKENS_PATH}?start=3&count=4")
    assert (status, answer["total"]) == (200, max(tokens) + 1)
    assert answer["tokens"] == [tokens[token] for token in range(3, 7)]
    beyond = ask(server.port, "GET", f"{TOKENS_PATH}?start={max(tokens)}&count=2")[1]
    assert beyond["tokens"] == [tokens[max(tokens)], None]
    for query in ("", "?start=-1&count=2", "?start=0&count=0", f"?start=0&count={TOKENS_SPAN + 1}", "?start=x&count=1"):
        assert ask(server.port, "GET", TOKENS_PATH + query)[0] == 400


DRAW = {
    "prompt": [5, 6, 7],
    "return_token_ids": True,
    "max_tokens": 6,
    "temperature": 8.0,
    "top_p": 0.99,
    "seed": 2**63 - 1,
    "stop_token_ids": [1],
    "logprobs": 0,
}


def test_a_response_depends_on_its_seed_alone(server):
    alone = post(server.port, DRAW)[1]["choices"][0]
    assert alone["prompt_token_ids"] == [5, 6, 7]
    assert len(alone["token_ids"]) == len(alone["logprobs"]["token_logprobs"]) <= 6
    assert (alone["finish_reason"] == "stop") == (alone["token_ids"][-1] == 1)
    answers: list[dict] = []
    others = [
        threading.Thread(target=lambda s=seed: answers.append(post(server.port, DRAW | {"seed": s})[1]))
        for seed in (1, 2, 3, DRAW["seed"])
    ]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert alone in [answer["choices"][0] for answer in answers]
    assert len({tuple(answer["choices"][0]["token_ids"]) for answer in answers}) > 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"top_k": 5}, "top_k is -1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1"),
        ({"ignore_eos": False}, "ignore_eos is True"),
        ({"seed": None}, "seed is between"),
        ({"seed": 2**63}, "seed is between"),
        ({"stop_token_ids": None}, "stop_token_ids is a list"),
        ({"max_tokens": 62}, "together have at most 64"),
        ({"temperature": -1}, "temperature is between"),
        ({"top_p": None}, "temperature is between"),
        ({"prompt": [99999]}, "token ids are between"),
    ],
)
def test_a_setting_that_would_be_another_is_refused(server, change, why):
    status, answer = post(server.port, DRAW | change)
    assert (status, why in answer["error"]["message"]) == (400, True), answer

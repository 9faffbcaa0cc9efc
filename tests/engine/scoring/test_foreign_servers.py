"""Whole builds against stand-ins that speak as vLLM and SGLang do; what they answer has the shape of recorded answers.

The stand-ins listen on real sockets and score with the real teacher. What is theirs alone is the dialect, whose fields
`recorded_answers.json` documents; `GET /v1/models` as in vllm/entrypoints/openai/protocol.py and
sglang/srt/entrypoints/openai/protocol.py `ModelCard`.
"""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from opd_mcp.engine.cache.manifest import read_cache
from opd_mcp.engine.cache.verify import verified
from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.scoring.local import LocalTeacher, open_local
from opd_mcp.engine.scoring.remote import open_remote
from opd_mcp.schemas.errors import ConsistencyError
from opd_mcp.schemas.identity import RemoteTeacher

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
MOST_TOP = 6


class ForeignServer(ThreadingHTTPServer):
    """Answers as vLLM or SGLang would if they served the example's teacher."""

    daemon_threads = True

    def __init__(self, dialect: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.dialect, self.lock = dialect, threading.Lock()
        self.tells_texts, self.tokenizer = True, Tokenizer.from_file(str(EXAMPLE / "teacher" / "tokenizer.json"))
        self.teacher: LocalTeacher = open_local(
            EXAMPLE / "teacher", Runtime(torch.device("cpu"), torch.float32, 0), 4096
        )

    def scored(self, ids: list[int], topk: int) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """(id, log-prob, the k best) of every position but the first."""
        with self.lock:
            scores = self.teacher.score(build_sequences([ids[:1]], [ids[1:]]), topk).scores
        best = [[]] * (len(ids) - 1)
        if topk:
            best = [
                list(zip(*pair, strict=True))
                for pair in zip(scores.topk_ids.tolist(), scores.topk_logprobs.tolist(), strict=True)
            ]
        return list(zip(ids[1:], scores.logprobs.tolist(), best, strict=True))

    def texts(self, body: dict) -> dict:
        if self.dialect == "vllm":
            return {"prompt": self.tokenizer.decode(body["tokens"], skip_special_tokens=False)}
        skip = body["skip_special_tokens"]
        return {"text": [self.tokenizer.decode(ids, skip_special_tokens=skip) for ids in body["tokens"]]}

    def vllm(self, body: dict) -> dict:
        positions = []
        for own, logprob, best in self.scored(body["prompt"], body["prompt_logprobs"]):
            entries = {str(own): {"logprob": logprob, "rank": 99, "decoded_token": "?"}}
            for rank, (token, value) in enumerate(best, 1):
                entries[str(token)] = {"logprob": value, "rank": rank, "decoded_token": "?"}
            positions.append(entries)
        choice = {"index": 0, "text": "?", "finish_reason": "length", "prompt_logprobs": [None, *positions]}
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}

    def sglang(self, body: dict) -> dict:
        ids, start = body["input_ids"], body["logprob_start_len"]
        scored = self.scored(ids, body["top_logprobs_num"])[start:]
        meta = {
            "prompt_tokens": len(ids),
            "input_token_logprobs": [[None, ids[start], None], *([value, own, None] for own, value, _ in scored)],
            "input_top_logprobs": [None, *([[value, token, None] for token, value in best] for *_, best in scored)],
        }
        return {"text": "?", "meta_info": meta}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        card = {"id": "org/teacher", "object": "model", "created": 1, "owned_by": self.server.dialect, "root": "x"}
        self._answer(200, {"object": "list", "data": [card | {"max_model_len": 4096}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = "/generate" if self.server.dialect == "sglang" else "/v1/completions"
        if self.path == "/detokenize" and self.server.tells_texts:
            self._answer(200, self.server.texts(body))
        elif self.path != path:
            self._answer(404, {"error": "not found"})
        elif body.get("prompt_logprobs", 0) > MOST_TOP:
            self._answer(400, {"error": {"message": f"Requested prompt logprobs of more than {MOST_TOP}"}})
        else:
            self._answer(200, getattr(self.server, self.server.dialect)(body))

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def _answer(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(params=["vllm", "sglang"])
def foreign(request):
    torch.set_num_threads(1)
    server = ForeignServer(request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def built(build, drawn, server, **changes) -> Path:
    remote = RemoteTeacher(name="teacher", url=f"http://127.0.0.1:{server.server_port}")
    return build.cache(drawn, "cache", teacher=None, remote=remote, **changes)


def test_a_cache_from_a_foreign_server_equals_the_local_one_and_knows_it_by_name_and_probe(
    build, drawn, finished, foreign
):
    cache = built(build, drawn, foreign)
    (manifest, theirs), local = read_cache(cache), read_cache(finished)[1]
    assert np.array_equal(theirs.response_ids, local.response_ids)
    for name in ("teacher_logprobs", "topk_logprobs"):
        assert np.abs(theirs.columns[name] - local.columns[name]).max() <= 1e-4
    assert (theirs.columns["topk_ids"] == local.columns["topk_ids"]).mean() > 0.999
    assert (manifest.teacher.remote, manifest.teacher.name) == ("named", "teacher")
    assert len(manifest.teacher.probe) == 15
    assert verified(cache).problems == []


def with_ids_turned(source: Path, target: Path) -> Path:
    """A copy of a student in which the ids of all tokens but the special ones are dealt out anew."""
    shutil.copytree(source, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    vocabulary, special = tokenizer["model"]["vocab"], {token["content"] for token in tokenizer["added_tokens"]}
    plain = [token for token in vocabulary if token not in special]
    moved = {token: vocabulary[other] for token, other in zip(plain, [*plain[3:], *plain[:3]], strict=True)}
    tokenizer["model"]["vocab"] = vocabulary | moved
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target


def opened(server: ForeignServer, tokenizer: Path):
    remote = RemoteTeacher(name="teacher", url=f"http://127.0.0.1:{server.server_port}")
    return open_remote(remote, tokenizer)


def test_another_tokenizer_of_the_same_size_is_found_out_by_the_texts_of_the_probe_s_ids(foreign, tmp_path):
    student = with_ids_turned(EXAMPLE / "student", tmp_path / "student")
    with pytest.raises(
        ConsistencyError, match=r"tokenizer_mismatch.*of 16 ids have another text.*teacher has '.', student"
    ):
        opened(foreign, student)
    opened(foreign, EXAMPLE / "student").close()


def test_a_server_that_tells_no_texts_is_taken_at_its_name(foreign, tmp_path):
    foreign.tells_texts = False
    teacher = opened(foreign, with_ids_turned(EXAMPLE / "student", tmp_path / "student"))
    teacher.close()
    assert teacher.identity.remote == "named"


def test_more_top_tokens_than_vllm_allows_is_found_out_before_any_row(build, drawn):
    server = ForeignServer("vllm")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ConsistencyError, match=r"teacher_untrue.*HTTP 400.*--max-logprobs"):
            built(build, drawn, server, recipe=build.scoring(topk=MOST_TOP + 1))
        assert not list((build.root / "cache").glob("*.parquet"))
    finally:
        server.shutdown()
        server.server_close()

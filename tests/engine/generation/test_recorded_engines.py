"""A real vLLM's and a real SGLang's wire, replayed: what this program asks, it is answered as those servers answered.

`recorded_engines.json` says of each which version, command, model and day. Its model computes what the example's
teacher does, so the log-probs that the engines gave must be those that this program computes. A request that is not as
it was recorded has no answer: after a change of the requests it is recorded again, from an engine that runs,

    python tests/engine/generation/test_recorded_engines.py vllm PROGRAM
"""

import json
import sys
import tempfile
import threading
from contextlib import closing
from datetime import UTC, datetime
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_mcp.engine.context import Context, EngineWish
from opd_mcp.engine.data.encoding import EncodedPrompt
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.served import Ask, ServedGenerator, draw_body, opened_engine, require_raw
from opd_mcp.engine.models.loading import load_model
from opd_mcp.engine.runtime import open_runtime
from opd_mcp.engine.scoring.connection import Patience, Refusal
from opd_mcp.engine.scoring.dialects import PATHS, WireError, read_answer, request_body
from opd_mcp.engine.scoring.lines import METRICS_PATH, waiting_requests
from opd_mcp.engine.scoring.local import score_sequences
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.schemas.recipes import RuntimeRecipe, Sampling

RECORDING = Path(__file__).with_name("recorded_engines.json")
REPOSITORY = Path(__file__).resolve().parents[3]
EXAMPLE = REPOSITORY / "examples" / "arithmetic"
BAR = 1e-4  # nats
KEY = "a-key-of-this-recording"
CONTEXT = 64
TOPK = 3
PROMPTS = ([2, 9, 4, 14, 7, 3], [2, 4, 5, 15, 8, 16, 3], [2, 12, 3])
SETTINGS = GenerationSettings(Sampling(temperature=0.8, top_p=0.95, max_new_tokens=16), (1,), 8, 0, "recorded")
TOO_LONG = Ask([4 + place % 10 for place in range(CONTEXT + 8)], SETTINGS.sampling, (1,), 7)
ONCE = Patience(timeout_s=30.0, total_s=60.0, attempts=1, proven_s=0.0)
Exchange = dict[str, Any]


def asked(url: str, model: Path) -> dict[str, Any]:
    """All that this program asks of an engine for three prompts: rows, their scores, a refusal, its metrics."""
    wish = EngineWish(url, model, "float32", CONTEXT, TOPK)
    context = Context(RuntimeRecipe(device="cpu"), teacher_key=KEY)
    prompts = [EncodedPrompt(PromptRow(f"row-{place}", ""), ids) for place, ids in enumerate(PROMPTS)]
    with opened_engine(wish, 1, context, ONCE) as (scorer, facts):
        generator = ServedGenerator(scorer, facts)
        drawn = generator.draw(prompts, SETTINGS)
        require_raw(generator)
        scored = scorer.score(drawn, TOPK)
        body, metrics = draw_body(scorer.dialect, scorer.model, TOO_LONG), scorer.server.asked_with(ONCE)
        with pytest.raises(Refusal) as refusal:
            scorer.server.ask("POST", PATHS[scorer.dialect], body)
        waiting = metrics.ask("GET", METRICS_PATH, read=waiting_requests)
        metrics.close()
    return {
        "facts": facts,
        "max_length": scorer.max_length,
        "drawn": drawn,
        "scores": scored,
        "refusal": str(refusal.value),
        "waiting": waiting,
    }


class Wire:
    """An HTTP server on loopback: it answers what was recorded or, before an engine, records what that answers."""

    def __init__(self, exchanges: list[Exchange], port: int | None = None) -> None:
        self.exchanges, self.port, self.unknown = exchanges, port, list[Exchange]()
        wire = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                request = {"method": self.command, "path": self.path}
                request |= {"body": json.loads(self.rfile.read(size))} if size else {}
                status, content = wire.answer(request, self.headers.get("Authorization", ""))
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *args: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: Exchange, key: str) -> tuple[int, bytes]:
        """Status and content; 404 for what was not recorded."""
        if key != f"Bearer {KEY}":
            return 401, b"{}"
        found = next((one for one in self.exchanges if one["request"] == request), None)
        if found is None and self.port is None:
            self.unknown.append(request)
            return 404, b"{}"
        if found is None:
            found = {"request": request, **self.forwarded(request)}
            self.exchanges.append(found)
        answer = found["answer"]
        return found["status"], (answer if isinstance(answer, str) else json.dumps(answer)).encode()

    def forwarded(self, request: Exchange) -> Exchange:
        """What the engine answers, without what nobody reads."""
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            body = json.dumps(request["body"]) if "body" in request else None
            connection.request(request["method"], request["path"], body, headers)
            response = connection.getresponse()
            content = response.read().decode()
        if request["path"] == METRICS_PATH:
            lines = [
                line for line in content.splitlines() if "num_requests_waiting" in line or "num_queue_reqs" in line
            ]
            return {"status": response.status, "answer": "".join(f"{line}\n" for line in lines)}
        answer = json.loads(content or "{}")
        if request["path"] == "/server_info":
            answer = {"version": answer["version"]}
        return {"status": response.status, "answer": answer}

    def close(self) -> None:
        """End it."""
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(params=["vllm", "sglang"])
def wire(request):
    """The recording of an engine, as a server; everything that it is asked must have been recorded."""
    replay = Wire(json.loads(RECORDING.read_bytes())[request.param]["exchanges"])
    replay.kind = request.param
    yield replay
    replay.close()
    assert replay.unknown == []


@pytest.fixture(scope="module")
def teacher():
    """The model that the recorded engines served, here."""
    runtime = open_runtime(RuntimeRecipe(device="cpu"))
    return load_model(EXAMPLE / "teacher", runtime), runtime


STOPPED = [4, 14, 8, 17, 8, 19, 8, 15, 8, 17, 4, 19, 21, 4, 1]
CUT = [9, 14, 7, 17, 12, 19, 12, 14, 7, 17, 5, 19, 5, 14, 7, 17]
# What an engine told to the last digit: of the first two tokens of each row drawn, and of the second row's scores.
EXACT = {
    "vllm": {
        "label": "vllm 0.32.0",
        "drawn": [(-0.09351210296154022, -0.0019368238281458616), (-0.053804412484169006, -0.15481030941009521)],
        "third": [12, 15, 14, 6, 17, 4, 19, 4, 15, 11, 17, 7, 19, 7, 15, 6],
        "scores": [-0.053804412484169006, -0.15481030941009521, -0.00028713393840007484],
        "refusal": "HTTP 400: This model's maximum context length is 64 tokens. However, your prompt contains 72",
    },
    "sglang": {
        "label": "sglang 0.5.23",
        "drawn": [(-0.09351155906915665, -0.0019368238281458616), (-0.053805992007255554, -0.1548106074333191)],
        "third": [12, 16, 4, 17, 4, 19, 4, 15, 11, 17, 7, 19, 7, 16, 12, 17],
        "scores": [-0.0538041852414608, -0.1548106074333191, -0.00028701478731818497],
        "refusal": "HTTP 400: The input (72 tokens) is longer than the model's context length (70 tokens).",
    },
}


def test_all_that_is_asked_is_answered_as_a_real_engine_answered(wire):
    found, exact = asked(wire.url, EXAMPLE / "teacher"), EXACT[wire.kind]
    drawn, scores = found["drawn"], found["scores"]
    assert found["facts"].label() == exact["label"]
    assert found["max_length"] == CONTEXT, "SGLang keeps 6 of its 70"
    assert [drawn.response(row).tolist() for row in range(3)] == [CUT, STOPPED, exact["third"]]
    assert drawn.finish_reasons == ["length", "eos", "length"]
    for row, values in enumerate(exact["drawn"]):
        assert drawn.column("behaviour_logprobs", row)[:2].tolist() == [float(np.float32(value)) for value in values]
    assert (len(scores.scores.logprobs), scores.refused) == (len(drawn.response_ids), {})
    assert found["refusal"].startswith(exact["refusal"])
    assert found["waiting"] == 0


def test_its_log_probs_are_those_of_the_model_here(wire, teacher):
    """Heads of 32 dimensions in place of 24 round differently."""
    found, (model, runtime) = asked(wire.url, EXAMPLE / "teacher"), teacher
    drawn, theirs = found["drawn"], found["scores"].scores
    ours = score_sequences(model, drawn, topk=TOPK, micro_batch_tokens=256, runtime=runtime)
    for logprobs in (drawn.columns["behaviour_logprobs"], theirs.logprobs):
        assert np.abs(logprobs - ours.logprobs).max() <= BAR
    assert np.array_equal(theirs.topk_ids, ours.topk_ids)
    assert np.abs(theirs.topk_logprobs - ours.topk_logprobs).max() <= BAR


def test_a_response_s_part_is_read_to_the_last_digit(wire):
    ids, start = [*PROMPTS[1], *STOPPED], len(PROMPTS[1])
    request = request_body(wire.kind, "teacher", ids, start, TOPK)
    status, content = wire.answer({"method": "POST", "path": PATHS[wire.kind], "body": request}, f"Bearer {KEY}")
    answer = json.loads(content)
    scores, part = read_answer(wire.kind, answer, ids, start, TOPK), read_answer(wire.kind, answer, ids, start + 10, 0)
    assert status == 200
    assert scores.logprobs[:3] == EXACT[wire.kind]["scores"]
    assert scores.topk_ids[:3] == [[4, 5, 9], [14, 16, 15], [8, 10, 12]]
    assert part.logprobs == scores.logprobs[10:]


def test_sglang_names_the_vocabulary_s_last_id_0_and_gives_its_own_log_prob(teacher):
    exchanges = json.loads(RECORDING.read_bytes())["sglang"]["exchanges"]
    ids = [*PROMPTS[1], *STOPPED]
    [answer] = [one["answer"] for one in exchanges if one["request"].get("body", {}).get("input_ids") == ids]
    entries = answer["meta_info"]["input_token_logprobs"]
    place = 1 + STOPPED.index(21)
    assert (entries[place][1], entries[place + 1][1]) == (0, 4)
    read = read_answer("sglang", answer, ids, len(PROMPTS[1]), 0).logprobs[STOPPED.index(21)]
    assert read == answer["meta_info"]["input_top_logprobs"][place][0][0], "the best token there, which is 21"
    assert answer["meta_info"]["input_top_logprobs"][place][0][1] == 21
    entries[place][1] = 3
    with pytest.raises(WireError, match="other tokens"):
        read_answer("sglang", answer, ids, len(PROMPTS[1]), 0)


def test_requests_that_wait_are_counted_once_where_sglang_counts_them_by_priority_too(wire):
    status, told = wire.answer({"method": "GET", "path": METRICS_PATH}, f"Bearer {KEY}")
    assert (status, waiting_requests(told)) == (200, 0)
    lines = [f'sglang:num_queue_reqs{{priority="{of}",tp_rank="0"}} {count}.0\n' for of, count in (("", 3), ("7", 2))]
    assert waiting_requests("".join(lines).encode()) == 3


def recorded(kind: str, program: str) -> Exchange:
    """A recording of an engine of this kind, started as a run starts it, on the example's teacher with wide heads."""
    from opd_mcp.schemas.runs import EngineSettings
    from opd_mcp.worker.engines import EngineModel, EngineProgram, ManagedEngine
    from tools.evidence.engine_place import WIDTH, widened

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = widened(EXAMPLE / "teacher", root / "teacher")
        (root / "run").mkdir()
        engine = ManagedEngine(
            EngineProgram(kind, program, root / "caches", on_gpu=False),
            EngineModel(model, "float32", CONTEXT - 1, TOPK),
            root / "run",
            EngineSettings(start_seconds=900),
            lambda: False,
            lambda code, message: print(code, message, file=sys.stderr),
            key=KEY,
        )
        command = engine.program.command(engine.model, engine.port)
        with engine.running():
            wire = Wire([], engine.port)
            with closing(wire):
                found = asked(wire.url, model)
        config = json.loads((model / "config.json").read_text())
        shown = json.dumps({"command": " ".join(["python", *command[1:]]), "exchanges": wire.exchanges})
    told = json.loads(shown.replace(str(root), "DIR").replace(str(REPOSITORY), "REPOSITORY"))
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size", "tie_word_embeddings")
    return {
        "version": found["facts"].version,
        "date": datetime.now(UTC).date().isoformat(),
        "command": told["command"],
        "model": f"the example's teacher, heads widened to {WIDTH}: " + str({name: config[name] for name in shape}),
        "exchanges": told["exchanges"],
    }


def written(known: dict[str, Exchange]) -> str:
    """The recordings as JSON, one exchange a line."""
    texts = []
    for kind, one in known.items():
        facts = [f"  {json.dumps(name)}: {json.dumps(one[name])}" for name in ("version", "date", "command", "model")]
        lines = ",\n".join(f"   {json.dumps(exchange)}" for exchange in one["exchanges"])
        texts.append(f' "{kind}": {{\n' + ",\n".join([*facts, f'  "exchanges": [\n{lines}\n  ]']) + "\n }")
    return "{\n" + ",\n".join(texts) + "\n}\n"


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    known = json.loads(RECORDING.read_text()) if RECORDING.exists() else {}
    known[sys.argv[1]] = recorded(sys.argv[1], sys.argv[2])
    RECORDING.write_text(written(known))

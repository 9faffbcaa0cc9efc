"""A stand-in for `vllm serve`: its wire, its command line, and two processes; the core outlives the API server.

The core computes with a real model. With VLLM_STAND_IN=quick it loads none and answers every prompt with its number
of tokens, for tests of processes alone.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

OUTLIVES_SECONDS = 300
METRICS = """# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="m"}} {waiting:.1f}
vllm:num_requests_waiting_by_reason{{engine="0",model_name="m",reason="capacity"}} 99.0
vllm:num_requests_running{{engine="0",model_name="m"}} 2.0
"""


class Wire(ThreadingHTTPServer):
    """vLLM's API before a function from a request's body to its answer, or to (status, answer)."""

    daemon_threads = True

    def __init__(
        self, name: str, answer, port: int = 0, *, length: int = 4096, key: str | None = None, version: str = "0.32.0"
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.name, self.answer, self.length, self.key, self.version = name, answer, length, key, version
        self.asked: list[dict] = []
        self.healthy = lambda: True
        self.reload = None
        """What takes the weights of another directory, and says whether it has them; None: it takes none."""
        self.waiting = None
        """How many requests wait, as a function; None: there are no metrics."""
        self.dead = threading.Event()
        """While it is set, connections end without an answer, as those of a killed process do."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def serve_in_background(self) -> "Wire":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        card = {"id": self.server.name, "object": "model", "owned_by": "vllm", "max_model_len": self.server.length}
        answers = {"/v1/models": {"object": "list", "data": [card]}, "/version": {"version": self.server.version}}
        if self.path == "/health":
            self._answer(200 if self.server.healthy() else 503, {})
        elif self.path == "/metrics" and self.server.waiting is not None:
            self._answer(200, METRICS.format(waiting=self.server.waiting()))
        elif self.path in answers and self._allowed():
            self._answer(200, answers[self.path])
        else:
            self._answer(404 if self._allowed() else 401, {"error": {"message": "no"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            self._answer(401, {"error": {"message": "Unauthorized"}})
        elif self.path == "/collective_rpc" and self.server.reload is not None:
            assert body["method"] == "reload_weights"
            self._answer(200 if self.server.reload(body["kwargs"]["weights_path"]) else 500, {})
        elif self.path != "/v1/completions":
            self._answer(404, {"error": {"message": "Not Found"}})
        else:
            self.server.asked.append(body)
            answer = self.server.answer(body)
            self._answer(*(answer if isinstance(answer, tuple) else (200, answer)))

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def _allowed(self) -> bool:
        return self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}"

    def _answer(self, status: int, body: dict | str) -> None:
        if self.server.dead.is_set():
            self.close_connection = True
            return
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def model_answers(path: Path, *, processed: bool = False):
    """From a request's body to vLLM's answer, computed by the model; `processed` log-probs are after temperature."""
    import torch

    from opd_mcp.engine.runtime import Runtime
    from opd_mcp.engine.scoring import server
    from opd_mcp.engine.scoring.local import open_local

    torch.set_num_threads(1)
    service = server.TeacherService(
        open_local(path, Runtime(torch.device("cpu"), torch.float32, 0), 4096), server.RequestLimits()
    )

    def answer(body: dict):
        try:
            jobs = service.jobs({"prompt_logprobs": 0, **body} if not body.get("return_token_ids") else body)
        except server.BadRequest as error:
            return 400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}}
        assert service.scorer.submit(jobs)
        completion = server._completion(body["model"], jobs, [job.future.result() for job in jobs])
        if processed and body.get("return_token_ids"):
            [choice] = completion["choices"]
            choice["logprobs"]["token_logprobs"] = tempered(choice, body["temperature"])
        return completion

    @torch.no_grad()
    def tempered(choice: dict, temperature: float) -> list[float]:
        prompt, drawn = choice["prompt_token_ids"], choice["token_ids"]
        model = service.teacher.model.model
        logits = model(input_ids=torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1].float()
        return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(drawn)[:, None])[:, 0].tolist()

    return answer


def quick_answer(body: dict) -> dict:
    return {"choices": [{"text": "", "tokens": len(body["prompt"])}]}


def core(model: str) -> None:
    """Answer bodies, one a line, as long as somebody asks, and then some time longer."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # an engine is not shown this package
    answer = quick_answer if os.environ.get("VLLM_STAND_IN") == "quick" else model_answers(Path(model))
    print("ready", flush=True)
    for line in sys.stdin:
        body = json.loads(line)
        if (other := body.get("reload")) is not None:
            there = (Path(other) / "model.safetensors").is_file()
            if there and answer is not quick_answer:
                answer = model_answers(Path(other))
            print(json.dumps({"reloaded": there}), flush=True)
        else:
            print(json.dumps(answer(body)), flush=True)
    time.sleep(OUTLIVES_SECONDS)


def serve(arguments: list[str]) -> None:
    """The API server, which starts its core first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    for name in ("host", "served-model-name", "dtype", "seed", "max-logprobs", "logprobs-mode", "generation-config"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--middleware")
    given, _ = parser.parse_known_args(arguments)
    child = subprocess.Popen(
        [sys.executable, __file__, "core", given.model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    turn = threading.Lock()
    if child.stdout.readline() != "ready\n":
        sys.exit("the core did not start")

    def asked(body: dict):
        with turn:
            try:
                child.stdin.write(json.dumps(body) + "\n")
                child.stdin.flush()
                line = child.stdout.readline()
            except OSError:
                line = ""
        found = json.loads(line) if line else [500, {"error": {"message": "EngineCore encountered an issue."}}]
        return tuple(found) if isinstance(found, list) else found

    wire = Wire(given.served_model_name, asked, given.port, length=given.max_model_len, key=os.environ["VLLM_API_KEY"])
    wire.healthy = lambda: child.poll() is None
    if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
        module, _, name = given.middleware.rpartition(".")
        getattr(importlib.import_module(module), name)(
            None
        )  # as the real one, which then closes all paths without a key
        wire.reload = lambda path: asked({"reload": path}).get("reloaded", False)
    wire.serve_forever()


if __name__ == "__main__":
    core(sys.argv[2]) if sys.argv[1] == "core" else serve(sys.argv[1:])

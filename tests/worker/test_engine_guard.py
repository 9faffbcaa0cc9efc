"""An engine that takes new weights answers nobody without its key."""

import importlib.util
from pathlib import Path

import anyio
import pytest

from opd_mcp.worker.engines import ENGINE_SIDE, GUARD, SGLANG_START

MODULE, _, NAME = GUARD.rpartition(".")


@pytest.fixture
def answered(monkeypatch):
    """`answered(path, key)`: the status that a guarded application answers with."""
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    spec = importlib.util.spec_from_file_location(MODULE, ENGINE_SIDE / f"{MODULE}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = getattr(module, NAME)(application)

    def asked(path: str, key: str | None, kind: str = "http"):
        sent = []

        async def send(message):
            sent.append(message)

        headers = [] if key is None else [(b"host", b"here"), (b"authorization", f"Bearer {key}".encode())]
        anyio.run(guard, {"type": kind, "path": path, "headers": headers}, None, send)
        return sent[0].get("status", sent[0].get("code"))

    return asked


@pytest.mark.parametrize(
    "path", ["/collective_rpc", "/v1/completions", "/metrics", "/sleep", "/health/../collective_rpc"]
)
def test_every_path_asks_for_the_key(answered, path):
    assert answered(path, "the-key") == 200
    assert [answered(path, key) for key in (None, "", "another", "the-key ")] == [401] * 4
    assert answered(path, None, "websocket") == 1008


def test_health_is_for_all(answered):
    assert answered("/health", None) == 200


def test_the_engine_s_interpreter_is_shown_nothing_else_of_the_package():
    shown = sorted(file.name for file in Path(ENGINE_SIDE).iterdir() if file.suffix)
    assert shown == [f"{MODULE}.py", SGLANG_START.name]

"""Every line on stdin is answered, the server lives on, and one SIGINT ends it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mcp_types import JSONRPCResponse

from opd_mcp.server.stdio import LINE_BYTES, message_of, written

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": "first",
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}
DEEP = "[" * 100_000 + "]" * 100_000
PING = '{"jsonrpc": "2.0", "id": %s, "method": "ping"}'
# By line: the code and the id of its answer.
BAD_LINES: dict[str, tuple[str | bytes, int, object]] = {
    "half surrogate": ('{"jsonrpc": "2.0", "id": 7, "method": "ping", "params": {"a": "\\ud800"}}', -32700, 7),
    "other half": ('{"jsonrpc": "2.0", "id": "x", "method": "ping", "params": {"\\udc00": 1}}', -32700, "x"),
    "half surrogate as id": (PING % '"\\ud800"', -32700, None),
    "deep nesting": (DEEP, -32700, None),
    "deep parameters": (f'{{"jsonrpc": "2.0", "id": 7, "method": "ping", "params": {{"a": {DEEP}}}}}', -32700, None),
    "no JSON": ("ping", -32700, None),
    "cut off": ('{"jsonrpc": "2.0", "id": 7', -32700, None),
    "not UTF-8": (b'{"jsonrpc": "2.0", "id": 7, "method": "\xff"}', -32700, None),
    "a huge number": (PING % ("9" * 5000), -32700, None),
    "a batch": ("[" + PING % 7 + "]", -32600, None),
    "an empty batch": ("[]", -32600, None),
    "a number": ("7", -32600, None),
    "null": ("null", -32600, None),
    "null as id": (PING % "null", -32600, None),
    "an object as id": (PING % '{"a": 1}', -32600, None),
    "a fraction as id": (PING % "1.5", -32600, None),
    "a truth value as id": (PING % "true", -32600, None),
    "no version": ('{"id": 7, "method": "ping"}', -32600, 7),
    "another version": ('{"jsonrpc": "1.0", "id": 7, "method": "ping"}', -32600, 7),
    "a number as method": ('{"jsonrpc": "2.0", "id": 7, "method": 5}', -32600, 7),
    "a list as parameters": ('{"jsonrpc": "2.0", "id": 7, "method": "ping", "params": [1]}', -32600, 7),
    "nothing": ("{}", -32600, None),
}


@pytest.fixture
def server(tmp_path):
    environment = {**os.environ, "OPD_HOME": str(tmp_path / "workspace"), "XDG_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "opd_mcp.cli", "serve", "--allow-root", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        yield process
        process.kill()


def ask(server, line: str | bytes) -> dict:
    server.stdin.write((line.encode() if isinstance(line, str) else line) + b"\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def connect(server) -> None:
    assert ask(server, json.dumps(INITIALIZE))["id"] == "first"
    server.stdin.write(b'{"jsonrpc": "2.0", "method": "notifications/initialized"}\n')


def test_every_bad_line_is_answered_and_the_next_request_too(server):
    early = ask(server, BAD_LINES["a batch"][0])
    assert early["error"]["code"] == -32600, "before the first message, too"
    connect(server)
    for name, (line, code, request_id) in BAD_LINES.items():
        answer = ask(server, line)
        assert (answer["error"]["code"], answer["id"]) == (code, request_id), (name, answer)
        assert ask(server, PING % 8) == {"jsonrpc": "2.0", "id": 8, "result": {}}, name
    server.stdin.write(b"\n  \n")
    assert ask(server, PING % 9)["id"] == 9
    server.stdin.close()
    assert server.wait(timeout=30) == 0


def test_a_line_beyond_every_bound_is_refused_unread():
    answer = message_of(b'"' + b"x" * (LINE_BYTES + 1))
    assert (answer.error.code, answer.id) == (-32600, None)


def test_an_answer_that_cannot_be_written_is_an_error_of_its_request():
    for value in ("\ud800", {"\udfff": 1}, [b"\xff"]):
        line = json.loads(written(JSONRPCResponse(jsonrpc="2.0", id=5, result={"a": value})))
        assert (line["id"], line["error"]["code"]) == (5, -32603)


@pytest.mark.parametrize("connected", [False, True])
def test_one_sigint_ends_an_idle_server(server, connected):
    assert ask(server, PING % 1)["id"] == 1 if connected else ask(server, "x")["error"]["code"] == -32700
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=30) == -signal.SIGINT


def called(server, tool: str, **arguments: object) -> str:
    call = {"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
    answer = ask(server, json.dumps(call))
    assert answer["id"] == 3
    return answer["result"]["content"][0]["text"]


def test_names_that_are_not_utf_8_end_nothing(server, tmp_path):
    """Folders, data files and models that a listing or an error names."""
    (tmp_path / "data").mkdir()
    odd = os.fsdecode(os.fsencode(tmp_path / "data") + b"/od\xffd")
    shutil.copytree(EXAMPLES / "student", odd)
    Path(odd + ".jsonl").write_text('{"prompt": "1"}\n')
    connect(server)
    good = {"student": str(EXAMPLES / "student"), "teacher": str(EXAMPLES / "teacher"), "prompts": ["1+1=?"]}
    for change in (
        {"student": "/data"},
        {"prompts": "/data"},
        {"student": "/data/odd"},
        {"prompts": "/data/odd.jsonl"},
    ):
        text = called(server, "plan_distillation", **good | {key: f"{tmp_path}{path}" for key, path in change.items()})
        assert "Fix: " in text
        assert "internal_error" not in text
    assert ask(server, PING % 4)["result"] == {}


PANICS = {
    "a pattern that backtracks": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(?:(?:a?){30}){30}(a+)+$"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a template with an unknown token": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("panic", PANICS)
def test_a_native_panic_is_one_error_of_its_call(server, tmp_path, panic):
    models = {}
    for name in ("student", "teacher"):
        models[name] = shutil.copytree(EXAMPLES / name, tmp_path / name)
        file = models[name] / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | PANICS[panic]))
    connect(server)
    arguments = {**{name: str(path) for name, path in models.items()}, "prompts": ["a" * 5000 + "b"]}
    for tool in ("plan_distillation", "start_distillation"):
        text = called(server, tool, **arguments)
        assert "[damaged_file]" in text
        assert "PanicException" in text
        assert "tokenizer.json" in text
    assert ask(server, PING % 4)["result"] == {}

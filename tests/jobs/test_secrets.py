"""No secret that a run meets, in its environment, an error or an argument, is written or shown anywhere."""

import os
from pathlib import Path

import pytest
from mcp import Client

from opd_mcp.schemas.redaction import REDACTED, Redactor
from opd_mcp.server.app import build_server
from opd_mcp.server.settings import ServerSettings

PLANTED = {
    "HF_TOKEN": "planted-hub-token-0123456789",
    "OPD_TEACHER_KEY": "planted-teacher-key-0123456789",
    "OPD_TOKEN": 'planted "http" token/0123456789',
}
TELLING = {"sft.optimizer.learning_rate": 13}


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def planted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def server(planted, service):
    return build_server(service, ServerSettings(redactor=Redactor.of_environment(os.environ)))


def leaks(text: str) -> bool:
    return "planted" in text or "Q" * 8 in text


def files_that_leak(root: Path) -> list[Path]:
    files = [path for path in root.rglob("*") if path.is_file()]
    assert any(path.name == "worker.log" for path in files)
    return [path for path in files if leaks(path.read_bytes().decode("utf-8", errors="replace"))]


@pytest.mark.anyio
async def test_a_run_that_tells_its_secrets_leaves_none_in_the_workspace_or_an_answer(world, server, service, finished):
    run_id = service.start_distillation(world.start_arguments(overrides=TELLING)).run_id
    status = finished(service, run_id)
    assert (status.state, status.error.code) == ("failed", "internal_error")
    assert REDACTED in status.error.cause
    assert any(REDACTED in line for line in status.error.log_tail)
    assert len([alert for alert in status.alerts if alert.code.startswith("told") and REDACTED in alert.message]) == 7
    log = (service.workspace.run(run_id) / "worker.log").read_text()
    assert log.count(REDACTED) >= 3 * 7 + 3
    assert "RuntimeError" in log
    assert not files_that_leak(world.root / "home")
    async with Client(server) as client:
        for tool in ("get_run_status", "get_run_logs", "dashboard_feed", "list_runs", "get_run_metrics"):
            answer = await client.call_tool(tool, {"run_ids": [run_id]} if tool == "get_run_metrics" else {})
            assert not answer.is_error
            assert not leaks(answer.model_dump_json())
        for part in ("recipe", "log", "metrics"):
            assert not leaks((await client.read_resource(f"opd://runs/{run_id}/{part}")).model_dump_json())


@pytest.mark.anyio
@pytest.mark.parametrize("secret", [*PLANTED.values(), "hf_" + "Q" * 34, "https://user:QQQQQQQQ@host"])
async def test_a_secret_in_an_argument_is_refused_before_anything_is_written(world, server, service, secret):
    plan = {"student": world.student, "teacher": world.teacher, "prompts": world.prompts()}
    faults = [
        {"declared_teacher": secret},
        {"prompts": [secret]},
        {"student": f"/data/{secret}"},
        {"overrides": {"prompting.chat_template_kwargs": {"key": [secret]}}},
        {"overrides": {"benchmark.answer_pattern": secret}},
    ]
    async with Client(server) as client:
        for fault in faults:
            for tool in ("plan_distillation", "start_distillation"):
                answer = await client.call_tool(tool, plan | fault)
                assert answer.is_error
                assert "[secret_in_arguments]" in answer.content[0].text
                assert not leaks(answer.model_dump_json())
        echoed = await client.call_tool("get_run_status", {"run_id": "latest", secret: 1})
        assert "[unknown_argument]" in echoed.content[0].text
        assert not leaks(echoed.model_dump_json())
    assert not list(service.workspace.runs.iterdir())
    assert not list(service.workspace.plans.iterdir())


@pytest.mark.anyio
async def test_what_a_data_file_holds_is_shown_without_its_secrets(world, server):
    row = '{"prompt": "log in with planted-hub-token-0123456789 and sk-' + "Q" * 30 + '", "answer": "1"}\n'
    plan = {"student": world.student, "teacher": world.teacher, "prompts": world.file("told.jsonl", row)}
    async with Client(server) as client:
        answer = await client.call_tool("plan_distillation", plan | {"preset": "demo"})
    assert not answer.is_error
    assert REDACTED in answer.structured_content["sample"][0]
    assert not leaks(answer.model_dump_json())

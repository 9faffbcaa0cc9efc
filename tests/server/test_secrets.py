"""No secret comes into the records by an argument, and none is shown in an answer, whatever file it stands in."""

import os
from pathlib import Path

import pytest
from mcp import Client

from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.redaction import environment_secrets
from opd_mcp.server.app import build_server
from opd_mcp.server.serve import ServerSettings
from opd_mcp.service import JobService
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
PLANTED = {
    "HF_TOKEN": "planted-hub-token-0123456789",
    "OPD_TEACHER_KEY": "planted-teacher-key-0123456789",
    "OPD_TOKEN": 'planted "http" token/0123456789',
}
SHAPED = ["hf_" + "Q" * 34, "sk-" + "Q" * 40, "https://user:QQQQQQQQ@host"]


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def service(tmp_path):
    (tmp_path / "data").mkdir()
    settings = JobSettings(lease_folder=tmp_path / "leases", cpu_slots=1, worker_command=("/bin/false",))
    return JobService(Workspace(tmp_path / "home"), AllowedRoots([tmp_path / "data"]), settings)


@pytest.fixture
def server(service, monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return build_server(service, ServerSettings(secrets=environment_secrets(os.environ)))


def leaks(text: str) -> bool:
    return "planted" in text or "Q" * 8 in text


PLAN = {"student": str(EXAMPLES / "student"), "teacher": str(EXAMPLES / "teacher"), "prompts": ["1+1=?"]}


@pytest.mark.parametrize("secret", [*PLANTED.values(), *SHAPED])
async def test_a_secret_in_an_argument_is_refused_before_anything_is_written(server, service, secret):
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
                answer = await client.call_tool(tool, PLAN | fault)
                assert answer.is_error
                assert "[secret_in_arguments]" in answer.content[0].text
                assert not leaks(answer.model_dump_json())
        echoed = await client.call_tool("get_run_status", {"run_id": "latest", secret: 1})
        assert "[unknown_argument]" in echoed.content[0].text
        assert not leaks(echoed.model_dump_json())
    assert not list(service.workspace.runs.iterdir())
    assert not list(service.workspace.plans.iterdir())


WORDS = ["first-word-of-many", PLANTED["HF_TOKEN"], "third-word-of-many"]


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("get_run_status", {"run_id": " ".join(WORDS)}),
        ("get_run_status", {" ".join(WORDS): 1}),
        ("list_runs", {"cursor": "/".join(WORDS)}),
        ("list_runs", {"state": "-".join(WORDS)}),
        ("inspect_cache", {"cache": "/" + "/".join(WORDS)}),
        ("plan_distillation", {"student": "/x", "teacher": "/y", "prompts": WORDS}),
        (
            "plan_distillation",
            {"student": "/x", "teacher": "/y", "prompts": "/p", "overrides": dict.fromkeys(WORDS, 1)},
        ),
    ],
)
async def test_an_error_does_not_tell_which_of_many_words_is_a_secret(server, tool, arguments):
    async with Client(server) as client:
        answer = await client.call_tool(tool, arguments)
    assert answer.is_error
    text = answer.content[0].text
    assert "Fix: " in text
    assert not leaks(text)
    assert not any(word in text for word in WORDS)


async def test_what_a_data_file_holds_is_shown_without_its_secrets(server, tmp_path):
    file = tmp_path / "data" / "told.jsonl"
    file.write_text('{"prompt": "log in with planted-hub-token-0123456789 and ' + SHAPED[1] + '", "answer": "1"}\n')
    async with Client(server) as client:
        answer = await client.call_tool("plan_distillation", PLAN | {"prompts": str(file), "preset": "demo"})
    assert not answer.is_error
    assert "[redacted]" in answer.structured_content["sample"][0]
    assert not leaks(answer.model_dump_json())


async def test_a_journal_and_a_log_that_somebody_else_wrote_are_shown_without_their_secrets(server, service):
    async with Client(server) as client:
        started = await client.call_tool("sample_model", {"model": PLAN["student"], "prompts": ["1+1=?"]})
        run_id = started.structured_content["run_id"]
        directory = service.workspace.run(run_id)
        with JournalWriter(directory / "journal.jsonl", 2) as journal:
            for secret in PLANTED.values():
                journal.append("alert", {"code": "told", "message": secret})
        (directory / "worker.log").write_text("\n".join([*PLANTED.values(), *SHAPED]) + "\n")
        for tool in ("get_run_status", "get_run_logs", "dashboard_feed", "list_runs"):
            answer = await client.call_tool(tool, {})
            assert not answer.is_error
            assert not leaks(answer.model_dump_json()), tool
        log = await client.read_resource(f"opd://runs/{run_id}/log")
    assert "[redacted]" in log.model_dump_json()
    assert not leaks(log.model_dump_json())

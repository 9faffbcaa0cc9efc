"""The audit log: what is in it, after crashes and beyond its size, and what a call does without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mcp import Client

from opd_mcp.client import TasksClient
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.runs import RunList
from opd_mcp.server.app import build_server
from opd_mcp.server.audit import AUDIT_FILE, OLDER_FILES, AuditLog
from opd_mcp.server.serve import ServerSettings
from opd_mcp.store.workspace import Workspace

pytestmark = pytest.mark.anyio
ANSWER = RunList(rows=[], total=0)


@pytest.fixture
def audit(tmp_path) -> AuditLog:
    return AuditLog(Workspace(tmp_path))


async def test_calls_that_change_something_are_recorded_and_others_are_not(client, jobs, run):
    run_id, _ = run
    await client.call_tool("list_runs", {})
    await client.call_tool("get_run_status", {"run_id": run_id})
    await client.call_tool("cancel_run", {"run_id": 7})  # not a valid call: nothing was begun
    for tool in ("cancel_run", "resume_run"):
        await client.call_tool(tool, {"run_id": run_id})
    await client.call_tool("resume_run", {"run_id": "no-such-run"})
    await client.call_tool("start_sft", {"student": "/nowhere", "responses": "/nowhere"})
    entries = AuditLog(jobs.workspace).page(50).entries
    assert [(entry.tool, entry.subject) for entry in entries] == [
        ("cancel_run", run_id), ("resume_run", run_id), ("resume_run", "no-such-run"), ("start_sft", None),
    ]  # fmt: skip
    assert [entry.outcome for entry in entries] == ["ok", "not_found", "unknown_run", "outside_roots"]
    assert len({entry.arguments_sha256 for entry in entries}) == 3  # cancel and resume had the same arguments
    assert all(entry.client.startswith("mcp ") for entry in entries)
    assert (jobs.workspace.root / AUDIT_FILE).stat().st_mode & 0o777 == 0o600


async def test_a_cancelled_task_is_recorded_and_a_server_that_only_reads_cancels_none(jobs, run):
    run_id, _ = run
    async with TasksClient(build_server(jobs, ServerSettings(read_only=True))) as tasks:
        with pytest.raises(Exception, match="--read-only"):
            await tasks.cancel(run_id)
    assert AuditLog(jobs.workspace).page(9).entries == []
    assert jobs.status(run_id).cancel_requested is None
    async with TasksClient(build_server(jobs)) as tasks:
        await tasks.cancel(run_id)
    [entry] = AuditLog(jobs.workspace).page(9).entries
    assert (entry.tool, entry.subject, entry.outcome) == ("tasks/cancel", run_id, "ok")


def test_the_command_line_is_recorded_and_shows_the_log(tmp_path):
    environment = {**os.environ, "OPD_HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": str(tmp_path)}

    def opd_mcp(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "opd_mcp.cli", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert "no call" in opd_mcp("audit").stdout
    for command in (["cancel", "run-a"], ["resume", "run-b\x1b[2J"], ["gc", "--dry-run"], ["gc"]):
        opd_mcp(*command)
    entries = json.loads(opd_mcp("audit", "--json").stdout)["entries"]
    shown = [(entry["tool"], entry["outcome"], entry.get("subject")) for entry in entries]
    assert shown == [("cancel_run", "unknown_run", "run-a"), ("resume_run", "unknown_run", None), ("gc", "ok", None)]
    table = opd_mcp("audit", "--limit", "2").stdout
    assert [line.split()[1:3] for line in table.splitlines()] == [["unknown_run", "resume_run"], ["ok", "gc"]]
    assert "command line" in table
    assert "\x1b" not in table


def test_a_call_during_which_the_process_died_is_there_with_an_unknown_outcome(audit):
    for death in ("os._exit(1)", "os.kill(os.getpid(), 9)", "os.abort()"):
        code = (
            "import os, sys; from pathlib import Path; from opd_mcp.server.audit import AuditLog;"
            "from opd_mcp.store.workspace import Workspace;"
            f"AuditLog(Workspace(Path(sys.argv[1]))).recorded('c', 't', {{'run_id': 'r'}}, lambda: {death})"
        )
        subprocess.run([sys.executable, "-c", code, str(audit.workspace.root)], check=False, stderr=subprocess.DEVNULL)
    assert [entry.outcome for entry in audit.page(9).entries] == ["unknown"] * 3
    audit.recorded("c", "after", {}, lambda: ANSWER)
    assert audit.page(1).entries[0].tool == "after"


@pytest.mark.parametrize("torn", [b'{"call":"0011', b'{"call":"00112233445566', b"\xff\xfe\x00"])
def test_a_torn_last_line_costs_itself_only(audit, torn):
    audit.recorded("c", "before", {}, lambda: ANSWER)
    with audit.file.open("ab") as file:
        file.write(torn)
    audit.recorded("c", "after", {}, lambda: ANSWER)
    page = audit.page(9)
    assert [entry.tool for entry in page.entries] == ["before", "after"]
    assert page.unreadable == 1


def test_its_size_is_bounded_and_the_last_calls_are_kept(tmp_path):
    audit = AuditLog(Workspace(tmp_path), max_bytes=2000)
    for number in range(60):
        audit.recorded("c", f"tool-{number}", {}, lambda: ANSWER)
    files = sorted(tmp_path.glob("audit*.jsonl"))
    assert len(files) == OLDER_FILES + 1
    assert all(file.stat().st_size <= 2000 for file in files)
    tools = [entry.tool for entry in audit.page(10).entries]
    assert tools == [f"tool-{number}" for number in range(50, 60)]


def test_lines_of_several_processes_are_all_there(audit):
    code = (
        "import sys; from pathlib import Path; from opd_mcp.server.audit import AuditLog;"
        "from opd_mcp.schemas.runs import RunList; from opd_mcp.store.workspace import Workspace;"
        "audit = AuditLog(Workspace(Path(sys.argv[1])), max_bytes=20000);"
        "[audit.recorded('c', f'{sys.argv[2]}-{i}', {}, lambda: RunList(rows=[], total=0)) for i in range(40)]"
    )
    root = str(audit.workspace.root)
    processes = [subprocess.Popen([sys.executable, "-c", code, root, name]) for name in "abc"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    page = audit.page(1000)
    assert {entry.tool for entry in page.entries} == {f"{name}-{i}" for name in "abc" for i in range(40)}
    assert {entry.outcome for entry in page.entries} == {"ok"}
    assert page.unreadable == 0


async def test_what_cannot_be_recorded_is_not_begun(jobs, run):
    run_id, _ = run
    (jobs.workspace.root / AUDIT_FILE).mkdir()
    async with Client(build_server(jobs)) as client:
        answer = await client.call_tool("cancel_run", {"run_id": run_id})
    assert answer.is_error
    assert "[workspace_unusable]" in answer.content[0].text
    assert jobs.status(run_id).cancel_requested is None


def test_an_error_is_recorded_by_its_code_and_a_client_without_its_secret(tmp_path):
    audit = AuditLog(Workspace(tmp_path), secrets=("hunter2-hunter2",))

    def refused() -> RunList:
        raise RunError("run_locked", "No.", fix="Wait.")

    with pytest.raises(RunError):
        audit.recorded("agent hunter2-hunter2", "t", {}, refused)
    with pytest.raises(ZeroDivisionError):
        audit.recorded("x" * 999, "t", {}, lambda: RunList(rows=[], total=1 // 0))
    assert [entry.outcome for entry in audit.page(9).entries] == ["run_locked", "ZeroDivisionError"]
    assert b"hunter2" not in Path(audit.file).read_bytes()

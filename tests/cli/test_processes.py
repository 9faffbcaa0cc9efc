"""The command line over a real workspace: what it prints, and how it fails."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from opd_mcp import __version__
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import RunInputs, RunPhase, RunRecord, RunRequest
from opd_mcp.store.journal import utc_now
from opd_mcp.store.runs import LOG_FILE
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def opd_mcp(tmp_path):
    """Runs the command line in a process of its own."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "opd_mcp.cli", *arguments]
        environment = {**os.environ, "OPD_HOME": str(tmp_path / "workspace"), "XDG_RUNTIME_DIR": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)

    return run


@pytest.fixture
def lost_run(tmp_path) -> str:
    """The id of a run that nobody works on, with two lines in its log."""
    store = Store(Workspace(tmp_path / "workspace"))
    request = RunRequest(
        kind="sft", recipe=resolve_recipe("demo", {}), inputs=RunInputs(), phases=[RunPhase(name="sft", key="k")]
    )
    record = RunRecord(
        run_id="sft-1", created_at=utc_now(), request_hash="h", request=request, versions={}, hardware="cpu"
    )
    started = store.start_once(record)
    (started.lock.directory / LOG_FILE).write_text("loading\nsomebody called resume_run\n")
    started.lock.release()
    return record.run_id


def test_an_empty_workspace_lists_no_runs(opd_mcp, tmp_path):
    done = opd_mcp("list", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"rows": [], "total": 0}
    assert (tmp_path / "workspace").is_dir()
    assert "0 of 0 runs" in opd_mcp("list").stdout


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "resume"])
def test_an_unknown_run_is_one_line_on_stderr_and_status_1(opd_mcp, command):
    done = opd_mcp(command, "no-such-run")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("[unknown_run]")
    assert len(done.stderr.splitlines()) == 1
    assert "Run opd-mcp list" in done.stderr


def test_the_next_step_of_a_run_is_a_command_and_its_log_is_shown_as_it_is(opd_mcp, lost_run):
    shown = opd_mcp("status", lost_run).stdout
    assert (
        f"it continues from its last checkpoint; a phase without one starts again. Run opd-mcp resume {lost_run}"
        in shown
    )
    assert f"next: The run is lost; it resumes from its last checkpoint. Run opd-mcp resume {lost_run}" in shown
    assert "log: somebody called resume_run" in shown
    step = json.loads(opd_mcp("status", lost_run, "--json").stdout)["next_action"]
    assert (step["tool"], step["arguments"]) == ("resume_run", {"run_id": lost_run})
    assert opd_mcp("logs", lost_run, "--tail", "1").stdout == "somebody called resume_run\n"


def test_a_root_that_does_not_exist_is_refused(opd_mcp, tmp_path):
    done = opd_mcp("serve", "--allow-root", str(tmp_path / "gone"))
    assert done.returncode == 2
    assert "does not exist" in " ".join(done.stderr.replace("│", " ").split())


def test_the_version_is_the_packages(opd_mcp):
    assert opd_mcp("--version").stdout == f"opd-mcp {__version__}\n"


def test_a_refused_export_is_one_line_and_audited(opd_mcp, tmp_path):
    """The agent's rules hold: here the folder of the destination does not exist."""
    refused = opd_mcp("export", str(EXAMPLES / "arithmetic" / "student"), str(tmp_path / "gone" / "mine"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("[not_found]")
    [call] = json.loads(opd_mcp("audit", "--json").stdout)["entries"]
    assert (call["tool"], call["outcome"]) == ("export_student", "not_found")


def test_the_help_names_the_commands_and_hides_the_worker(opd_mcp):
    done = opd_mcp("--help")
    assert all(command in done.stdout for command in ("serve", "demo", "status", "list", "cancel"))
    assert "worker" not in done.stdout


def test_the_dashboard_is_served_to_whoever_has_its_address(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "opd_mcp.cli", "dashboard", "--no-browser", "--port", str(port)]
    environment = {**os.environ, "OPD_HOME": str(tmp_path / "workspace"), "XDG_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as page:
        try:
            address = page.stdout.readline().removeprefix("Dashboard: ").strip()
            assert answered(address, deadline=time.monotonic() + 60) == 200
            assert answered(address.partition("?")[0], deadline=time.monotonic() + 60) == 401
        finally:
            page.terminate()


def answered(address: str, deadline: float) -> int:
    """The status that a page is answered with, once its server is there."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    while True:
        try:
            return opener.open(address, timeout=10).status
        except urllib.error.HTTPError as refused:
            return refused.code
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)

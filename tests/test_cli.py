"""The command line over a real workspace: what it prints, and how it fails."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture
def opd_mcp(tmp_path):
    """Runs the command line in a process of its own."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "opd_mcp.cli", *arguments]
        environment = {**os.environ, "OPD_HOME": str(tmp_path / "workspace"), "XDG_RUNTIME_DIR": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)

    return run


def test_an_empty_workspace_lists_no_runs(opd_mcp, tmp_path):
    done = opd_mcp("list", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"rows": [], "total": 0}
    assert (tmp_path / "workspace").is_dir()
    assert "0 of 0 runs" in opd_mcp("list").stdout


@pytest.mark.parametrize("command", ["status", "cancel"])
def test_an_unknown_run_is_one_line_on_stderr_and_status_1(opd_mcp, command):
    done = opd_mcp(command, "no-such-run")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("[unknown_run]")
    assert len(done.stderr.splitlines()) == 1


def test_a_root_that_does_not_exist_is_refused(opd_mcp, tmp_path):
    done = opd_mcp("serve", "--allow-root", str(tmp_path / "gone"))
    assert done.returncode == 2
    assert "does not exist" in " ".join(done.stderr.replace("│", " ").split())


def test_the_help_names_the_commands_and_hides_the_worker(opd_mcp):
    done = opd_mcp("--help")
    assert all(command in done.stdout for command in ("serve", "demo", "status", "list", "cancel"))
    assert "worker" not in done.stdout

"""The command line names its own commands wherever an error or a next step names a tool."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import opd_mcp
from opd_mcp.cli import app
from opd_mcp.commands import CLIENTS_ONLY, COMMANDS, in_commands
from opd_mcp.server.serve import ServerSettings
from opd_mcp.server.tools import all_specs
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

SOURCES = Path(opd_mcp.__file__).parent


def advice() -> Iterator[str]:
    """Every text that the package gives as a `fix`, a hole in it as an ellipsis."""
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "fix":
                parts = [part for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
                yield "…".join(str(part.value) for part in parts)


def exists(command: str) -> bool:
    """Whether the command line has a command of these words; words in capitals are its arguments."""
    found = typer.main.get_command(app)
    words = command.split()
    while words and words[0].islower():
        found = getattr(found, "commands", {}).get(words.pop(0))
        if found is None:
            return False
    return len(words) <= sum(part.param_type_name == "argument" for part in found.params)


@pytest.fixture
def tools(tmp_path) -> set[str]:
    service = JobService(Workspace(tmp_path), AllowedRoots([]))
    return {spec.name for spec in all_specs(service, ServerSettings(allow_delete=True))}


def test_every_tool_has_a_command_that_exists_or_is_for_clients_only(tools):
    assert set(COMMANDS) | set(CLIENTS_ONLY) == tools
    assert not set(COMMANDS) & set(CLIENTS_ONLY)
    assert [command for command in [*COMMANDS.values(), "serve"] if not exists(command)] == []
    assert not exists("runs")
    assert not exists("list RUN_ID")


def test_no_fix_leaves_a_tool_unexplained(tools):
    texts = [text for text in advice() if any(tool in text for tool in tools)]
    assert len(texts) > 15
    for text in texts:
        told = in_commands(text)
        assert not any(tool in told for tool in COMMANDS), told
        assert all(tool not in told or "opd-mcp serve" in told for tool in CLIENTS_ONLY), told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Call list_runs(state='running') to see.", "Run opd-mcp list to see."),
        ("Call get_run_status(run_id='a-1', wait_seconds=25)", "Run opd-mcp status a-1"),
        ("Free it, then call resume_run to go on.", "Free it, then run opd-mcp resume RUN_ID to go on."),
        ("stop it with cancel_run.", "stop it with opd-mcp cancel RUN_ID."),
        ("Look with inspect_cache(cache='cache-1');", "Look with opd-mcp cache inspect cache-1;"),
        ("my_list_runs and list_runs_2 are no tools", "my_list_runs and list_runs_2 are no tools"),
        (
            "Call start_sft, then start_sft.",
            "Call start_sft, then start_sft. (Tools that an MCP client of opd-mcp serve calls: start_sft.)",
        ),
    ],
)
def test_a_call_becomes_a_command(text, told):
    assert in_commands(text) == told

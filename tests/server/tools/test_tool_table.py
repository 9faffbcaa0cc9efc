"""The one table of tools: each row is complete, its command exists, and advice names tools as data only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import opd_mcp
from opd_mcp.cli import app
from opd_mcp.schemas.next_action import NextAction, next_call, resume_call
from opd_mcp.server.serve import ServerSettings
from opd_mcp.server.tools.table import TOOLS, command_text, offered_tools

SOURCES = Path(opd_mcp.__file__).parent
BY_NAME = {spec.name: spec for spec in TOOLS}


def keywords(name: str) -> Iterator[tuple[str, str]]:
    """File and text of everything that the package gives under this keyword, a hole in it as an ellipsis."""
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == name:
                parts = [part for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
                yield file.name, "…".join(str(part.value) for part in parts)


def written_calls() -> Iterator[tuple[str, set[str]]]:
    """Tool and arguments of each next step that the package writes out."""
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next_call":
                assert isinstance(node.args[0], ast.Constant)
                missing = [keyword.value for keyword in node.keywords if keyword.arg == "missing"]
                named = {part.value for value in missing for part in ast.walk(value) if isinstance(part, ast.Constant)}
                given = {keyword.arg for keyword in node.keywords if keyword.arg and keyword.arg != "missing"}
                yield str(node.args[0].value), named | given


def exists(command: str) -> bool:
    """Whether the command line has a command of these words; words in braces are its arguments."""
    found = typer.main.get_command(app)
    words = command.split()
    while words and not words[0].startswith("{"):
        found = getattr(found, "commands", {}).get(words.pop(0))
        if found is None:
            return False
    return len(words) <= sum(part.param_type_name == "argument" for part in found.params)


def test_every_name_stands_once_and_every_command_exists():
    assert len(BY_NAME) == len(TOOLS)
    assert [spec.command for spec in TOOLS if spec.command and not exists(spec.command)] == []
    assert {spec.name for spec in TOOLS if spec.command} >= {"get_run_status", "resume_run", "inspect_cache"}
    assert not exists("runs")
    assert not exists("list {run_id}")


def test_deletion_is_offered_only_where_it_is_allowed():
    without, allowed = offered_tools(ServerSettings()), offered_tools(ServerSettings(allow_delete=True))
    assert [spec.name for spec in allowed if spec not in without] == ["delete_artifact", "delete_run"]


def test_no_fix_names_a_tool_in_words():
    fixes = list(keywords("fix"))
    assert len(fixes) > 100
    assert [(file, text) for file, text in fixes if any(tool in text for tool in BY_NAME)] == []


def test_every_next_step_names_a_tool_and_arguments_that_it_has():
    calls = list(written_calls())
    assert len(calls) > 15
    for tool, arguments in calls:
        assert arguments <= set(BY_NAME[tool].request.model_fields), tool


@pytest.mark.parametrize(
    ("action", "for_agents", "for_people"),
    [
        (next_call("list_runs", state="running"), "Call list_runs(state='running')", "Run opd-mcp list"),
        (
            next_call("get_run_status", run_id="a-1", wait_seconds=25),
            "Call get_run_status(run_id='a-1', wait_seconds=25)",
            "Run opd-mcp status a-1",
        ),
        (resume_call(), "Call resume_run(run_id='…')", "Run opd-mcp resume RUN_ID"),
        (resume_call().filled(run_id="a-1"), "Call resume_run(run_id='a-1')", "Run opd-mcp resume a-1"),
        (
            next_call("inspect_cache", cache="cache-1"),
            "Call inspect_cache(cache='cache-1')",
            "Run opd-mcp cache inspect cache-1",
        ),
        (
            next_call("inspect_cache", cache="/c/a;b"),
            "Call inspect_cache(cache='/c/a;b')",
            "Run opd-mcp cache inspect '/c/a;b'",
        ),
        (
            next_call("start_sft", missing=["student"], responses="r"),
            "Call start_sft(student='…', responses='r')",
            "Run opd-mcp sft --student STUDENT --responses r",
        ),
        (
            next_call("start_distillation", plan_id="plan-1"),
            "Call start_distillation(plan_id='plan-1')",
            "Run opd-mcp start plan-1",
        ),
        (
            next_call("start_distillation", missing=["student"], cache_id="cache-1"),
            "Call start_distillation(student='…', cache_id='cache-1')",
            "Run opd-mcp start --student STUDENT --cache cache-1",
        ),
        (
            next_call("plan_distillation", teacher="/t/a b", overrides={"sft.adapter": {"rank": 8}}),
            "Call plan_distillation(teacher='/t/a b', overrides={'sft.adapter': {'rank': 8}})",
            "Run opd-mcp plan --teacher '/t/a b' --set 'sft.adapter={\"rank\": 8}'",
        ),
        (
            next_call("sample_model", model="m 1", prompts=["1+1=?", "2+2=?"]),
            "Call sample_model(model='m 1', prompts=['1+1=?', '2+2=?'])",
            "Run opd-mcp sample 'm 1' '1+1=?' '2+2=?'",
        ),
        (
            next_call("benchmark_student", model="m", baselines=["a b"], columns={"prompt": "q"}),
            "Call benchmark_student(model='m', baselines=['a b'], columns={'prompt': 'q'})",
            "Run opd-mcp benchmark m --baseline 'a b' --column prompt=q",
        ),
        (
            next_call("benchmark_student", missing=["overrides"], model="m", prompts="p"),
            "Call benchmark_student(overrides='…', model='m', prompts='p')",
            "Run opd-mcp benchmark m --set KEY=VALUE --prompts p",
        ),
        (next_call("compare_runs", tag="sweep-1"), "Call compare_runs(tag='sweep-1')", "Run opd-mcp compare sweep-1"),
        (NextAction(why="Read the result."), "", ""),
    ],
)
def test_a_call_is_worded_for_its_reader(action, for_agents, for_people):
    assert action.call_text() == for_agents
    assert command_text(action) == for_people

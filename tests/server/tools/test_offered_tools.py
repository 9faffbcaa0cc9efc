"""`--read-only` and `--tools`: what is left out is not listed, not known, and named in the instructions."""

import subprocess
import sys

import pytest
from mcp import Client

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.server.app import build_server
from opd_mcp.server.serve import ServerSettings
from opd_mcp.server.tools.table import GROUPS, TOOLS, named_groups, unknown_tool_text

pytestmark = pytest.mark.anyio
CHANGES = {spec.name for spec in TOOLS if not spec.read_only}


def test_the_groups_are_the_table():
    grouped = [spec for specs in GROUPS.values() for spec in specs]
    assert sorted(spec.name for spec in grouped) == sorted(spec.name for spec in TOOLS)
    assert {"start_distillation", "sweep", "cancel_run", "resume_run", "delete_artifact", "delete_run"} <= CHANGES


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (ServerSettings(), {spec.name for spec in TOOLS} - {"delete_artifact", "delete_run"}),
        (ServerSettings(read_only=True, allow_delete=True), {spec.name for spec in TOOLS} - CHANGES),
        (ServerSettings(groups=("follow",)), {spec.name for spec in GROUPS["follow"]}),
        (ServerSettings(groups=("follow",), read_only=True), {s.name for s in GROUPS["follow"]} - CHANGES),
        (
            ServerSettings(groups=("plan", "artifacts"), allow_delete=True),
            {spec.name for name in ("plan", "artifacts") for spec in GROUPS[name]},
        ),
    ],
)
async def test_only_what_is_offered_is_listed_and_called(service, settings, expected):
    async with Client(build_server(service, settings)) as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == expected
        for name in {spec.name for spec in TOOLS} - expected:
            arguments = {"run_id": service.run.run_id, "artifact_id": "model-1", "confirm": "model-1"}
            answer = await client.call_tool(name, arguments)
            assert answer.is_error
            assert f"Unknown tool: {name}; this server was started " in answer.content[0].text
        told = client.instructions or ""
    missing = {spec.name for spec in TOOLS if not spec.deletes} - expected
    assert ("started without" in told) == bool(missing)
    assert all(name in told.rpartition("started without")[2] for name in missing)
    assert service.calls == []


def test_groups_are_named_with_commas_or_one_by_one():
    assert named_groups(["plan,follow", "plan"]) == ("plan", "follow")
    assert named_groups([]) == ()
    assert named_groups(["plan,"]) == ("plan",)
    for wrong in (["starts"], [""], ["plan", "x"]):
        with pytest.raises(ArgumentError, match="no such group"):
            named_groups(wrong)


def test_an_unknown_group_ends_the_start_with_one_line():
    command = [sys.executable, "-m", "opd_mcp.cli", "serve", "--tools", "plan,folow"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Nearest: follow" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "name", "why"),
    [
        (ServerSettings(), "delete_run", "without --allow-delete"),
        (ServerSettings(read_only=True, allow_delete=True), "delete_run", "with --read-only"),
        (ServerSettings(groups=("follow",)), "start_sft", "only with the groups follow (--tools)"),
        (ServerSettings(), "start_distilation", "Nearest: start_distillation"),
    ],
)
def test_a_tool_that_is_not_offered_says_why(settings, name, why):
    assert why in unknown_tool_text(name, settings)

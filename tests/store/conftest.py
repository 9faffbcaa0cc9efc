"""A workspace and run records for it."""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.runs import ModelInput, RunInputs, RunKind, RunPhase, RunRecord, RunRequest
from opd_mcp.store.ids import new_id
from opd_mcp.store.journal import utc_now
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace

MakeRecord = Callable[..., RunRecord]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home")


@pytest.fixture
def store(workspace: Workspace) -> Store:
    return Store(workspace)


@pytest.fixture
def make_record() -> MakeRecord:
    """`make_record("teacher-a")`: a new run's record; equal arguments are equal requests."""

    def make(teacher: str = "teacher", *, kind: RunKind = "distill", created_at: str | None = None) -> RunRecord:
        inputs = RunInputs(student=ModelInput(reference="student"), teacher=ModelInput(reference=teacher))
        request = RunRequest(kind=kind, recipe=Recipe(), inputs=inputs, phases=[RunPhase(name="distill", key="k")])
        return RunRecord(
            run_id=new_id(f"{kind}-{teacher}"),
            created_at=created_at or utc_now(),
            request_hash=request.content_hash(),
            request=request,
            versions={"opd-mcp": "0"},
            hardware="cpu",
        )

    return make


@pytest.fixture
def python() -> Callable[[str], list[str]]:
    """`python(code)`: the command line of a fresh interpreter that runs this code."""
    return lambda code: [sys.executable, "-c", textwrap.dedent(code)]

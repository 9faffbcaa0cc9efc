"""A workspace and run records for it."""

import errno
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.runs import ModelInput, RunInputs, RunKind, RunPhase, RunRecord, RunRequest
from opd_mcp.store.journal import utc_now
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace, new_id

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


NEED_ROOM = ("write", "fsync", "replace", "rename", "mkdir")


class Disk:
    """Counts the calls that need room; `full_at` is the first that fails, and all after it fail too."""

    def __init__(self, full_at: int | None = None) -> None:
        self.full_at = full_at
        self.calls = 0

    def take(self) -> None:
        self.calls += 1
        if self.full_at is not None and self.calls >= self.full_at:
            raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def limited_disk(full_at: int | None = None) -> Iterator[Disk]:
    """The disk as this process sees it meanwhile; half of the first write that has no room still gets through."""
    state = Disk(full_at)

    def limited(name: str):
        real = getattr(os, name)

        def call(*args, **kwargs):
            if name == "write" and state.calls + 1 == state.full_at and len(args[1]) > 1:
                state.calls += 1
                return real(args[0], args[1][: len(args[1]) // 2])
            state.take()
            return real(*args, **kwargs)

        return call

    patches = [patch.object(os, name, limited(name)) for name in NEED_ROOM]
    for each in patches:
        each.start()
    try:
        yield state
    finally:
        for each in patches:
            each.stop()


@pytest.fixture
def disk():
    """`disk(full_at)`: a context in which the disk is full from the n-th write on."""
    return limited_disk

"""A run whose journal a test writes, line by line, under the run's lock."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.runs import (
    ModelInput,
    RunInputs,
    RunLabels,
    RunPhase,
    RunRecord,
    RunRequest,
    TrackerName,
    TrackingSettings,
)
from opd_mcp.store.journal import JournalWriter, utc_now
from opd_mcp.store.runs import RunLock, begin_attempt, create_run, taken_up
from opd_mcp.store.workspace import Workspace, new_id
from opd_mcp.tracking.feed import TrackedRun
from opd_mcp.tracking.mirror import Mirror
from opd_mcp.tracking.trackers import tracker_of


@dataclass(frozen=True)
class Writing:
    """The journal of an attempt."""

    journal: JournalWriter

    def append(self, type, data) -> None:
        """One line."""
        self.journal.append(type, data)

    def train(self, first: int, last: int) -> None:
        """Metrics of these steps; the loss is 10 − step."""
        for step in range(first, last + 1):
            self.append("metric", {"step": step, "values": {"loss": 10.0 - step, "broken": float("nan")}})

    def succeed(self) -> None:
        """The end of a run with a verdict and one score."""
        verdict = {"judgement": "better", "sentence": "Better by 3 points."}
        self.append("result", {"verdict": verdict, "scores": {"student": {"greedy_accuracy": [0.5, 0.4, 0.6]}}})
        self.append("state", {"state": "succeeded"})


@dataclass
class WrittenRun:
    """A run that a test writes."""

    workspace: Workspace
    record: RunRecord
    directory: Path
    attempts: int = 0

    @contextmanager
    def attempt(self):
        """An attempt that holds the lock, and its journal."""
        with RunLock.acquire(self.directory) as lock:
            self.attempts = begin_attempt(lock)
            with taken_up(lock) as journal:
                journal.append("state", {"state": "running"})
                journal.append("phase", {"phase": "distill", "event": "started"})
                yield Writing(journal)

    def mirror(self, name: TrackerName, settings: TrackingSettings | None = None, **changes: object) -> Mirror:
        """The mirror of the newest attempt, with the real tracker unless `open_tracker` is given."""
        settings = settings or TrackingSettings(trackers=[name], offline=True, keep_trying_hours=1.0)
        folder = self.workspace.tracking_of(self.record.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        given = {"open_tracker": lambda: tracker_of(name, settings), "attempt": self.attempts, **changes}
        run = TrackedRun.of(self.record, self.workspace.tracking)
        return Mirror(self.directory, folder, name, run, settings=settings, **given)


@pytest.fixture
def written_run(tmp_path: Path) -> WrittenRun:
    workspace = Workspace(tmp_path / "home")
    inputs = RunInputs(student=ModelInput(reference="/secret/place/small"), teacher=ModelInput(reference="org/large"))
    labels = RunLabels(name="first try", tags=["mine"], notes="a note")
    request = RunRequest(
        kind="distill", recipe=Recipe(), inputs=inputs, phases=[RunPhase(name="distill", key="k")], labels=labels
    )
    record = RunRecord(
        run_id=new_id("lightning-small"),
        created_at=utc_now(),
        request_hash=request.content_hash(),
        request=request,
        versions={"opd-mcp": "0"},
        hardware="cpu",
    )
    return WrittenRun(workspace, record, create_run(workspace, record))

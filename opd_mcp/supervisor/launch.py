"""Starts and resumes runs: each once, however many ask, each on this machine or on the executor that it names."""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from opd_mcp.devices.hardware import Target, declared_target, free_disk, target_of
from opd_mcp.devices.leases import LeaseFolder, Place
from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.models import ModelCache
from opd_mcp.planning.costs.admission import admission, require_room, with_claims
from opd_mcp.planning.costs.estimates import estimate_of, measured_costs
from opd_mcp.planning.phases import with_satisfied
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.plans import MethodEstimate
from opd_mcp.schemas.recipes import RuntimeRecipe
from opd_mcp.schemas.runs import RunRecord, RunRequest
from opd_mcp.store.artifacts import ArtifactStore
from opd_mcp.store.claims import RunClaim, is_placed
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import CHECKPOINTS
from opd_mcp.store.store import StartedRun, Store
from opd_mcp.store.worker_process import has_begun, note_exit
from opd_mcp.store.workspace import grace_seconds, has_executors, named_executor, wants_tracking
from opd_mcp.supervisor.executors.local import launch_worker
from opd_mcp.supervisor.liveness import attend
from opd_mcp.supervisor.records import new_record

if TYPE_CHECKING:
    from opd_mcp.schemas.executors import ExecutorReport
    from opd_mcp.supervisor.executors.placed import PlacedRuns, QueuedOn


# Between freeing its locks and becoming a zombie, a process takes microseconds; a loaded machine a little longer.
SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Child:
    """A worker process and the attempt that it makes."""

    directory: Path
    attempt: int
    process: subprocess.Popen[bytes]


class Children:
    """The workers of one server, and their mirrors; safe to share between threads."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._mirrors: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def add(self, directory: Path, attempt: int, process: subprocess.Popen[bytes]) -> None:
        """Watch over a worker that was just launched."""
        with self._lock:
            self._children.append(Child(directory, attempt, process))

    def add_mirrors(self, mirrors: Iterable[subprocess.Popen[bytes]]) -> None:
        """Reap these processes too, whose exit status nobody asks for."""
        with self._lock:
            self._mirrors += mirrors

    def reap(self) -> None:
        """Take the exit status of every worker that has ended; until somebody does, it stays a zombie."""
        with self._lock:
            self._mirrors = [mirror for mirror in self._mirrors if mirror.poll() is None]
            ended = [child for child in self._children if child.process.poll() is not None]
            self._children = [child for child in self._children if child not in ended]
            for child in ended:
                note_exit(child.directory, child.attempt, child.process.returncode)

    def settle(self, directory: Path) -> None:
        """Wait for the worker of a run whose lock is free: it is about to be reapable."""
        with self._lock:
            mine = [child.process for child in self._children if child.directory == directory]
        for process in mine:
            try:
                process.wait(SETTLE_SECONDS)
            except subprocess.TimeoutExpired:
                continue  # suspended, and its lock was taken from it
        self.reap()


BEGIN_SECONDS = 15.0
BEGIN_POLL_SECONDS = 0.05


class Supervisor:
    """Starts the workers of one workspace and reaps those that this process launched; safe to share between threads."""

    def __init__(self, store: Store, leases: LeaseFolder, settings: JobSettings, models: ModelCache) -> None:
        self._store = store
        self._leases = leases
        self._settings = settings
        self._models = models
        self._children = Children()

    def start(self, request: RunRequest) -> StartedRun:
        """A new run, or the active run of the same request.

        Raises ResourceError `not_enough_memory`, `not_enough_disk` or `quota_exceeded`, RunError `launch_failed`.
        """
        self.reap()
        placing = self.placed.placing(request.executor) if request.executor else None
        target = self.target(request.recipe.runtime, request.executor)
        estimate = self._estimate(request, target)
        record = new_record(request, target, estimate)
        quotas = admission(self._store, record)

        def admit() -> None:
            require_room(estimate, target, free_disk(self._store.workspace.root))
            quotas()

        return self._launched(lambda: self._store.start_once(record, admit, placing))

    def resume(self, run_id: str) -> StartedRun:
        """The failed, cancelled or lost run under its next attempt, or the run as it is while it is active.

        Raises what `start` raises for the phases that are left, and what `Store.resume` raises.
        """
        self.reap()
        record = with_phases_left(self._store.record(run_id), self._store.artifacts)
        executor = record.request.executor
        placing = self.placed.placing(executor) if executor else None
        target = self.target(record.request.recipe.runtime, executor)
        estimate = self._estimate(record.request, target)
        quotas = admission(self._store, record)

        def admit() -> None:
            workspace = self._store.workspace
            # Checkpoints that are there are not written a second time.
            free = free_disk(workspace.root) + tree_bytes(workspace.run(run_id) / CHECKPOINTS)
            require_room(estimate, target, free, resumed=run_id)
            quotas()

        return self._launched(lambda: self._store.resume(run_id, admit, placing))

    @cached_property
    def placed(self) -> "PlacedRuns":
        """The runs on other machines; a workspace without executors never loads what it takes."""
        from opd_mcp.supervisor.executors.placed import PlacedRuns

        return PlacedRuns(self._store, self._settings)

    def target(self, runtime: RuntimeRecipe, executor: str | None = None) -> Target:
        """The device that a run would get, and what active runs of this machine will still take of it.

        On an executor it is what the settings say. Raises ArgumentError `unknown_executor`.
        """
        if executor is not None:
            return declared_target(runtime, executor, named_executor(self._store.workspace, executor))
        return with_claims(target_of(runtime, self._leases.busy), self._store, self._settings.cpu_slots)

    def reap(self) -> None:
        """Take the exit status of every worker and mirror that has ended."""
        self._children.reap()

    def attend(self, view: RunView) -> None:
        """See to it that an active run which does not answer its cancel request ends, and a lost one is explained."""
        if is_placed(view.directory):
            self.placed.attend(view)
        if view.state == "lost":
            self._children.settle(view.directory)
        if view.state == "lost" or view.cancel_requested is not None:
            attend(view, grace_seconds(self._store.workspace))

    def place(self, view: RunView) -> "Place | QueuedOn | None":
        """What a queued run waits for: an executor's queue, or a device of this machine."""
        queued = self.placed.place(view) if is_placed(view.directory) else None
        return queued or self._leases.place(view.directory.name)

    def executors(self) -> "list[ExecutorReport]":
        """The executors that the settings name, and what each says of itself; none while they are unusable."""
        return self.placed.reports() if has_executors(self._store.workspace) else []

    def expected_seconds(self, request: RunRequest) -> float | None:
        """What a run is expected to take; None while one of its models is still to be fetched."""
        estimate = self._estimate(request, self.target(request.recipe.runtime, request.executor))
        return estimate.seconds if estimate else None

    def _estimate(self, request: RunRequest, target: Target) -> MethodEstimate | None:
        measured = measured_costs(self._store.workspace.artifacts)
        return estimate_of(request, target, measured, self._models.inspect_model)

    def _launched(self, begin: Callable[[], StartedRun]) -> StartedRun:
        started = begin()
        deadline = time.monotonic() + BEGIN_SECONDS
        # The process that began it may die before its worker lives, and what is acknowledged here must not be lost.
        while started.reused and not has_begun(self._store.view(started.run_id)):
            if time.monotonic() > deadline:
                raise RunError(
                    "run_starting",
                    "Another call is starting this run, and its worker does not live yet.",
                    value=started.run_id,
                    fix="Make the same call again in a moment.",
                )
            time.sleep(BEGIN_POLL_SECONDS)
            started = begin()
        if isinstance(started.lock, RunClaim):
            self.placed.submit(started.lock)
        elif started.lock is not None:
            worker = launch_worker(self._store.workspace, started.lock, self._settings)
            self._children.add(started.lock.directory, started.attempt, worker)
        if started.lock is not None and wants_tracking(self._store.workspace):
            from opd_mcp.tracking.processes import launch_mirrors

            workspace, environment = self._store.workspace, os.environ
            self._children.add_mirrors(launch_mirrors(workspace, started.run_id, started.attempt, environment))
        return started


def with_phases_left(record: RunRecord, artifacts: ArtifactStore) -> RunRecord:
    """The record with those phases marked as satisfied whose artifact is there by now."""
    request = record.request
    phases = with_satisfied(request.phases, artifacts.made_by([phase.key for phase in request.phases]))
    return record.model_copy(update={"request": request.model_copy(update={"phases": phases})})

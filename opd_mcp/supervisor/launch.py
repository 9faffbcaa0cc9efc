"""Starts and resumes runs: each once, however many ask, and each as a detached worker process.

The command line is `opd-mcp worker RUN_ID --workspace PATH --lock-fd N --lease-folder PATH --cpu-slots N`, with this
Python and not by way of a shell or PATH; it ends in `opd_mcp.worker.main.main`, whose answer is the exit status.
"""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.devices.environment import worker_environment
from opd_mcp.devices.hardware import Target, free_disk, target_of
from opd_mcp.devices.leases import LeaseFolder
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
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.logs import open_log
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import CHECKPOINTS, LOG_FILE, RunLock
from opd_mcp.store.store import StartedRun, Store
from opd_mcp.store.worker_process import has_begun, note_exit
from opd_mcp.store.workspace import Workspace, grace_seconds, wants_tracking
from opd_mcp.supervisor.liveness import attend
from opd_mcp.supervisor.records import new_record


def worker_command(workspace: Workspace, run_id: str, lock_fd: int, settings: JobSettings) -> list[str]:
    """The worker's argument list."""
    return [
        *(*settings.worker_command, run_id),
        *("--workspace", str(workspace.root)),
        *("--lock-fd", str(lock_fd)),
        *("--lease-folder", str(settings.lease_folder)),
        *("--cpu-slots", str(settings.cpu_slots)),
    ]


def launch_worker(workspace: Workspace, lock: RunLock, settings: JobSettings) -> subprocess.Popen[bytes]:
    """The run's detached process, which inherits the lock; the caller's copy is closed.

    The lock never goes free in between, so a queued run never looks lost. Raises RunError `launch_failed`.
    """
    run_id = lock.directory.name
    try:
        with open_log(lock.directory / LOG_FILE) as log:
            return subprocess.Popen(
                worker_command(workspace, run_id, lock.descriptor, settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=lock.directory,
                start_new_session=True,
                pass_fds=(lock.descriptor,),
                env=worker_environment(os.environ),
            )
    except OSError as error:
        raise RunError(
            "launch_failed",
            f"The worker process could not be started ({error}).",
            value=run_id,
            fix="Check the machine's process and memory limits, then start again.",
        ) from error
    finally:
        lock.release()


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
        target = self.target(request.recipe.runtime)
        estimate = self._estimate(request, target)
        record = new_record(request, target, estimate)
        quotas = admission(self._store, record)

        def admit() -> None:
            require_room(estimate, target, free_disk(self._store.workspace.root))
            quotas()

        return self._launched(lambda: self._store.start_once(record, admit))

    def resume(self, run_id: str) -> StartedRun:
        """The failed, cancelled or lost run under its next attempt, or the run as it is while it is active.

        Raises what `start` raises for the phases that are left, and what `Store.resume` raises.
        """
        self.reap()
        record = with_phases_left(self._store.record(run_id), self._store.artifacts)
        target = self.target(record.request.recipe.runtime)
        estimate = self._estimate(record.request, target)
        quotas = admission(self._store, record)

        def admit() -> None:
            workspace = self._store.workspace
            # Checkpoints that are there are not written a second time.
            free = free_disk(workspace.root) + tree_bytes(workspace.run(run_id) / CHECKPOINTS)
            require_room(estimate, target, free, resumed=run_id)
            quotas()

        return self._launched(lambda: self._store.resume(run_id, admit))

    def target(self, runtime: RuntimeRecipe) -> Target:
        """The device that a run would get, and what active runs will still take of it."""
        return with_claims(target_of(runtime, self._leases.busy), self._store, self._settings.cpu_slots)

    def reap(self) -> None:
        """Take the exit status of every worker and mirror that has ended."""
        self._children.reap()

    def attend(self, view: RunView) -> None:
        """See to it that an active run which does not answer its cancel request ends, and a lost one is explained."""
        if view.state == "lost":
            self._children.settle(view.directory)
        if view.state == "lost" or view.cancel_requested is not None:
            attend(view, grace_seconds(self._store.workspace))

    def expected_seconds(self, request: RunRequest) -> float | None:
        """What a run is expected to take; None while one of its models is still to be fetched."""
        estimate = self._estimate(request, self.target(request.recipe.runtime))
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
        if started.lock is not None:
            worker = launch_worker(self._store.workspace, started.lock, self._settings)
            self._children.add(started.lock.directory, started.attempt, worker)
            if wants_tracking(self._store.workspace):
                from opd_mcp.tracking.processes import launch_mirrors

                workspace, environment = self._store.workspace, os.environ
                self._children.add_mirrors(launch_mirrors(workspace, started.run_id, started.attempt, environment))
        return started


def with_phases_left(record: RunRecord, artifacts: ArtifactStore) -> RunRecord:
    """The record with those phases marked as satisfied whose artifact is there by now."""
    request = record.request
    phases = with_satisfied(request.phases, artifacts.made_by([phase.key for phase in request.phases]))
    return record.model_copy(update={"request": request.model_copy(update={"phases": phases})})

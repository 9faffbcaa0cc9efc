"""The runs on other machines, from this machine's side: handed over, watched, and ended by files.

A worker needs none of this once its job has begun: it hears the cancel request, queues its next attempt before a
restart and writes its final state by itself.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.devices.hardware import nodes_of
from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.errors import OpdError, RunError
from opd_mcp.schemas.executors import Claim, ExecutorReport, ExecutorSettings, Placing, Submission
from opd_mcp.schemas.runs import FINAL_STATES
from opd_mcp.store.claims import (
    RunClaim,
    begin,
    newest_attempt,
    note_ending,
    note_submission,
    read_beginning,
    read_claim,
    read_ending,
    read_submission,
)
from opd_mcp.store.run_view import RunView, seconds_of
from opd_mcp.store.runs import begin_attempt, cancel_requested, read_record, taken_up
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import grace_seconds, named_executor, read_settings
from opd_mcp.supervisor.executors.interface import Executor, JobState, Work, executor_of

# Grace times from a cancel request until the guardian on the worker's machine must have ended it.
GIVEN_UP = 3.0


@dataclass(frozen=True)
class QueuedOn:
    """A run's place in an executor's queue."""

    executor: str
    job: JobState

    @property
    def position(self) -> int | None:
        """1 for the next one; None where the executor has no queue or does not answer."""
        return self.job.position

    def text(self) -> str:
        """E.g. `queued on big, position 3 (Resources)`."""
        position = f", position {self.position}" if self.position is not None else ""
        waits = self.job.state in ("queued", "expired", "unknown")  # a job that has begun since tells more by its files
        said = f" ({self.job.text})" if waits and self.job.text not in ("", "None") else ""
        return f"queued on {self.executor}{position}{said}"


class PlacedRuns:
    """The executors of one workspace, and its runs there; safe to share between threads."""

    def __init__(self, store: Store, settings: JobSettings) -> None:
        self._store = store
        self._settings = settings
        self._executors: dict[str, tuple[ExecutorSettings, Executor]] = {}

    def placing(self, name: str) -> Placing:
        """How a run on this executor is told alive; raises ArgumentError `unknown_executor`."""
        settings = named_executor(self._store.workspace, name)
        return Placing(executor=name, kind=settings.kind, lease_seconds=settings.lease_seconds)

    def submit(self, claim: RunClaim) -> None:
        """Hand the claimed attempt over; raises RunError `launch_failed`, and the run is lost with that cause."""
        directory, attempt = claim.directory, claim.attempt
        try:
            written = read_claim(directory, attempt)
            assert written is not None, "this process has just claimed it"
            name = written.placing.executor
            settings = named_executor(self._store.workspace, name)
            self._withdraw_earlier(directory, attempt)
            nodes = nodes_of(read_record(directory).request.recipe.runtime, settings)
            work = Work(directory, written, self._command(directory, written, settings), nodes=nodes)
            note_submission(directory, attempt, self._executor(name, settings).submit(work))
        except OpdError as error:
            note_ending(directory, attempt, error.message)
            raise

    def attend(self, view: RunView) -> None:
        """Do for an active or lost run what follows from where its job is, and refresh the view."""
        directory = view.directory
        attempt = newest_attempt(directory)
        claim, submission = read_claim(directory, attempt), read_submission(directory, attempt)
        if (view.written in FINAL_STATES and view.attempt == attempt) or read_ending(directory, attempt) is not None:
            return
        executor = self._known(claim)
        if claim is None or submission is None or executor is None:
            return  # being handed over; or its executor is gone from the settings
        begun = read_beginning(directory, attempt)
        if begun is None and cancel_requested(directory):
            executor.withdraw(claim, submission)
            if begin(directory, attempt):  # from here on no worker may
                with taken_up(RunClaim(directory, attempt)) as journal:
                    journal.append("state", {"state": "cancelled"})
            view.refresh()
            return
        job = executor.look(claim, submission)
        if job.state == "gone":
            note_ending(directory, attempt, job.text)
            view.refresh()
        elif begun is None and job.state == "expired":
            self._queue_again(directory, claim, submission, executor)
        elif (
            begun is not None
            and view.state == "lost"
            and (job.state == "queued" or executor.restarts(submission) > begun.life)
        ):
            self._continue(directory, attempt, claim, submission)
            view.refresh()
        elif view.cancel_requested is not None:
            over = GIVEN_UP * grace_seconds(self._store.workspace)
            if time.time() - seconds_of(view.cancel_requested) > over:
                executor.withdraw(claim, submission)

    def place(self, view: RunView) -> QueuedOn | None:
        """Where a queued run stands; None once its worker has begun and waits for a device over there."""
        attempt = newest_attempt(view.directory)
        claim, submission = read_claim(view.directory, attempt), read_submission(view.directory, attempt)
        if claim is None or read_beginning(view.directory, attempt) is not None:
            return None
        executor = self._known(claim)
        if submission is None or executor is None:
            return QueuedOn(claim.placing.executor, JobState("unknown"))
        return QueuedOn(claim.placing.executor, executor.look(claim, submission))

    def reports(self) -> list[ExecutorReport]:
        """The executors of the settings, and what each says of itself."""
        found = read_settings(self._store.workspace).executors
        return [
            ExecutorReport(name=name, kind=settings.kind, state=self._executor(name, settings).report())
            for name, settings in found.items()
        ]

    def _continue(self, directory: Path, attempt: int, claim: Claim, submission: Submission) -> None:
        """Queue the next attempt of a job that its executor has restarted, unless its worker was faster."""
        with suppress(RunError):
            following = RunClaim.after(directory, attempt, claim.placing, claim.ticket)
            note_submission(directory, following.attempt, submission)
            begin_attempt(following)

    def _queue_again(self, directory: Path, claim: Claim, submission: Submission, executor: Executor) -> None:
        """Hand the job of an attempt over once more; where that fails, the next look tries again."""
        settings = named_executor(self._store.workspace, claim.placing.executor)
        nodes = nodes_of(read_record(directory).request.recipe.runtime, settings)
        work = Work(directory, claim, self._command(directory, claim, settings), submission, nodes)
        with suppress(RunError):
            note_submission(directory, claim.attempt, executor.submit(work))

    def _command(self, directory: Path, claim: Claim, settings: ExecutorSettings) -> list[str]:
        """The worker's argument list."""
        program = (settings.python, "-P", "-m", "opd_mcp.cli", "worker") if settings.python else None
        return [
            *(*(program or self._settings.worker_command), directory.name),
            *("--workspace", str(self._store.workspace.root)),
            *("--ticket", claim.ticket),
        ]

    def _withdraw_earlier(self, directory: Path, attempt: int) -> None:
        """End the job of the attempt before, which may still wait or hang somewhere."""
        claim, submission = read_claim(directory, attempt - 1), read_submission(directory, attempt - 1)
        executor = self._known(claim)
        if claim is not None and submission is not None and executor is not None:
            executor.withdraw(claim, submission)

    def _known(self, claim: Claim | None) -> Executor | None:
        if claim is None:
            return None
        settings = read_settings(self._store.workspace).executors.get(claim.placing.executor)
        same = settings is not None and settings.kind == claim.placing.kind
        return self._executor(claim.placing.executor, settings) if settings is not None and same else None

    def _executor(self, name: str, settings: ExecutorSettings) -> Executor:
        known = self._executors.get(name)
        if known is None or known[0] != settings:
            known = self._executors[name] = settings, executor_of(name, settings, self._active)
        return known[1]

    def _active(self) -> Sequence[Submission]:
        found = []
        for run_id in self._store.active_runs():
            directory = self._store.workspace.run(run_id)
            with suppress(OSError):
                found.append(read_submission(directory, newest_attempt(directory)))
        return [submission for submission in found if submission is not None]

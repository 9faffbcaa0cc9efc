"""Random interleavings of everything that can happen to runs: real stores, real flocks, real journals.

A worker is played by its lock and its journal writer. A crash closes its descriptors, as the kernel does; a suspended
worker keeps its journal writer while somebody else takes over. Two stores are two servers. The clock is the one that
stamps the journal, and it jumps.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.runs import ACTIVE_STATES, ModelInput, RunInputs, RunPhase, RunRecord, RunRequest, RunState
from opd_mcp.store import journal
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.runs import RunLock, cancel_requested, request_cancel, taken_up
from opd_mcp.store.states import TRANSITIONS
from opd_mcp.store.store import StartedRun, Store
from opd_mcp.store.workspace import Workspace

# Where the machine has a file system in memory, ten times as many interleavings fit into the test's time.
MEMORY = Path("/dev/shm")
REQUESTS = ("a", "b")
SERVERS = st.integers(0, 1)
PICK = st.integers(0, 10**6)


@dataclass
class Worker:
    """A process that works on a run: its lock, its journal, and whether it was put to sleep."""

    run_id: str
    lock: RunLock
    writer: JournalWriter | None = None
    suspended: bool = False


def may_reach(before: RunState, after: RunState) -> bool:
    """Whether one or more allowed steps lead from one state to the other."""
    seen: set[RunState] = set()
    ahead = {before}
    while ahead:
        seen |= ahead
        ahead = set().union(*(TRANSITIONS[state] for state in ahead)) - seen
    return after in seen


class Runs(RuleBasedStateMachine):
    """The machine: `workers` have the right to write, `fenced` have lost it and do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.clock = mock.patch.object(journal, "utc_now", self.time)
        self.clock.start()
        self.number = 0
        self.workers: dict[str, Worker] = {}
        self.fenced: list[Worker] = []
        self.expected: dict[str, RunState] = {}
        self.seen: dict[str, RunState] = {}
        self.attempts: dict[str, int] = {}
        self.alerts: dict[str, list[str]] = {}

    def time(self) -> str:
        """The machine's clock, in the journal's form."""
        self.now += timedelta(milliseconds=1)
        return self.now.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    @initialize()
    def open(self) -> None:
        """Two servers open the workspace."""
        self.stores = [Store(Workspace(self.root)) for _ in range(2)]

    def teardown(self) -> None:
        for worker in [*self.workers.values(), *self.fenced]:
            self.close(worker)
        self.clock.stop()
        shutil.rmtree(self.root)

    @rule(server=SERVERS, request=st.sampled_from(REQUESTS))
    def start(self, server: int, request: str) -> None:
        """A start is one new run, or the active one of its request."""
        active = [run_id for run_id in self.active() if self.request_of(run_id) == request]
        started = self.stores[server].start_once(self.record(request))
        if active:
            assert (started.reused, started.run_id) == (True, active[0])
            return
        assert started.run_id not in self.expected
        self.begun(started)

    @rule(server=SERVERS, pick=PICK)
    @precondition(lambda self: self.expected)
    def resume(self, server: int, pick: int) -> None:
        """A resume is the next attempt, the active run as it is, or refused with a reason."""
        run_id = self.choose(sorted(self.expected), pick)
        state = self.expected[run_id]
        others = [other for other in self.active() if self.request_of(other) == self.request_of(run_id)]
        if state == "succeeded" or (others and others != [run_id]):
            code = "run_not_active" if state == "succeeded" else "same_request_active"
            with pytest.raises(RunError, match=code):
                self.stores[server].resume(run_id)
            return
        started = self.stores[server].resume(run_id)
        assert started.reused == (state in ACTIVE_STATES)
        if not started.reused:
            self.begun(started)
            assert not cancel_requested(started.lock.directory)

    @rule(pick=PICK)
    @precondition(lambda self: self.awake())
    def write(self, pick: int) -> None:
        """The worker begins, or goes on with its work."""
        worker = self.choose(self.awake(), pick)
        if self.expected[worker.run_id] == "queued":
            worker.writer = worker.writer or taken_up(worker.lock)
            worker.writer.append("state", {"state": "running"}, durable=False)
            self.expected[worker.run_id] = "running"
        else:
            self.number += 1
            worker.writer.append("alert", {"code": str(self.number), "message": "seen"}, durable=False)
            self.alerts[worker.run_id].append(str(self.number))

    @rule(pick=PICK, state=st.sampled_from(["succeeded", "failed"]))
    @precondition(lambda self: self.awake("running"))
    def end(self, pick: int, state: RunState) -> None:
        """A running worker writes a final state and goes, or the one that it was asked for."""
        worker = self.choose(self.awake("running"), pick)
        state = "cancelled" if cancel_requested(worker.lock.directory) else state
        worker.writer.append("state", {"state": state}, durable=False)
        self.expected[worker.run_id] = state
        self.close(self.workers.pop(worker.run_id))

    @rule(pick=PICK)
    @precondition(lambda self: self.workers)
    def cancel(self, pick: int) -> None:
        """Somebody asks an active run to stop."""
        request_cancel(self.choose(self.all_workers(), pick).lock.directory)

    @rule(pick=PICK)
    @precondition(lambda self: self.workers)
    def crash(self, pick: int) -> None:
        """A worker dies without a word: the kernel frees its lock."""
        worker = self.workers.pop(self.choose(self.all_workers(), pick).run_id)
        self.close(worker)
        self.expected[worker.run_id] = "lost"

    @rule(pick=PICK)
    @precondition(lambda self: self.awake("running"))
    def suspend_and_replace_the_lock(self, pick: int) -> None:
        """A worker is stopped and its lock file replaced: its run is lost, and it does not know."""
        worker = self.workers.pop(self.choose(self.awake("running"), pick).run_id)
        lock = worker.lock.directory / "lock"
        (copy := lock.with_name("copy")).touch()
        os.replace(copy, lock)
        self.fenced.append(worker)
        self.expected[worker.run_id] = "lost"

    @rule(pick=PICK)
    @precondition(lambda self: self.fenced)
    def wake(self, pick: int) -> None:
        """A fenced worker wakes, and all that it tries is refused."""
        worker = self.choose(self.fenced, pick)
        before = worker.writer.path.read_bytes()
        for attempt in (
            lambda: worker.writer.append("alert", {"code": "late", "message": "never seen"}),
            lambda: worker.writer.append("state", {"state": "succeeded"}),
            worker.writer.check_fence,
            worker.writer.sync,
        ):
            with pytest.raises(RunError, match="attempt_superseded"):
                attempt()
        assert worker.writer.path.read_bytes() == before

    @rule(pick=PICK)
    @precondition(lambda self: any(worker.run_id in self.workers for worker in self.fenced))
    def wake_between_look_and_write(self, pick: int) -> None:
        """The worst case: it had looked before it slept, and writes one line behind the newer attempt's first one."""
        mine = [worker for worker in self.fenced if worker.run_id in self.workers]
        worker = self.choose(mine, pick)
        with mock.patch.object(JournalWriter, "check_fence"):
            worker.writer.append("alert", {"code": "late", "message": "never seen"}, durable=False)

    @rule(days=st.integers(-400, 400))
    def jump(self, days: int) -> None:
        """The clock is set."""
        self.now += timedelta(days=days)

    @rule()
    def lose_the_index(self) -> None:
        """The index is deleted while the servers are down."""
        for file in self.root.glob("opd.sqlite*"):
            file.unlink()
        self.open()

    @rule(server=SERVERS)
    def restart_a_server(self, server: int) -> None:
        """A server ends and another one comes; the workers own themselves."""
        self.stores[server] = Store(Workspace(self.root))

    @invariant()
    def views_and_lists_agree_with_what_happened(self) -> None:
        if not hasattr(self, "stores"):
            return
        for store in self.stores:
            views = {run_id: store.view(run_id) for run_id in self.expected}
            assert {run_id: view.state for run_id, view in views.items()} == self.expected
            listed = store.list_runs(limit=10**6)
            assert {row.run_id: row.state for row in listed.rows} == self.expected, "none vanished, none invented"
            for run_id, view in views.items():
                assert [alert.code for alert in view.alerts] == self.alerts[run_id][-20:]
                assert view.attempt == self.attempts[run_id]
        for run_id, state in self.expected.items():
            assert may_reach(self.seen.get(run_id, "queued"), state)
        self.seen = dict(self.expected)

    @invariant()
    def at_most_one_process_may_write(self) -> None:
        writers = [*self.workers.values(), *self.fenced]
        for run_id in self.expected:
            holding = [worker for worker in writers if worker.run_id == run_id and worker.lock.holds()]
            assert len(holding) == (run_id in self.workers)
        for request in REQUESTS:
            assert sum(self.request_of(run_id) == request for run_id in self.active()) <= 1

    def begun(self, started: StartedRun) -> None:
        run_id = started.run_id
        self.workers[run_id] = Worker(run_id, started.lock)
        self.expected[run_id] = "queued"
        self.attempts[run_id] = self.attempts.get(run_id, 0) + 1
        assert started.attempt == self.attempts[run_id]
        self.alerts.setdefault(run_id, [])

    def record(self, request: str) -> RunRecord:
        self.number += 1
        inputs = RunInputs(student=ModelInput(reference=request))
        asked = RunRequest(kind="distill", recipe=Recipe(), inputs=inputs, phases=[RunPhase(name="distill", key="k")])
        return RunRecord(
            run_id=f"{request}-{self.number}",
            created_at=self.time(),
            request_hash=asked.content_hash(),
            request=asked,
            versions={},
            hardware="cpu",
        )

    def request_of(self, run_id: str) -> str:
        return run_id.split("-", maxsplit=1)[0]

    def active(self) -> list[str]:
        return [run_id for run_id, state in self.expected.items() if state in ACTIVE_STATES]

    def all_workers(self) -> list[Worker]:
        return [self.workers[run_id] for run_id in sorted(self.workers)]

    def awake(self, state: RunState | None = None) -> list[Worker]:
        return [worker for worker in self.all_workers() if state in {None, self.expected[worker.run_id]}]

    def choose(self, among: list, pick: int):
        return among[pick % len(among)]

    def close(self, worker: Worker) -> None:
        worker.lock.release()
        if worker.writer is not None:
            worker.writer.close()


TestRuns = Runs.TestCase
TestRuns.settings = settings(
    derandomize=True,
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

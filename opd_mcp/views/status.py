"""What a run's view and record say to its reader: snapshot, status, ETA, and the one next call."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from opd_mcp.devices.leases import Place
from opd_mcp.planning.phases import cache_id_of
from opd_mcp.schemas.reports import StageCost
from opd_mcp.schemas.runs import ACTIVE_STATES, Alert, Failure, RunRecord, RunSnapshot, RunState, RunStatus
from opd_mcp.store.run_view import RunView, seconds_of
from opd_mcp.store.runs import read_record, run_directory
from opd_mcp.store.workspace import Workspace
from opd_mcp.supervisor.liveness import lost_failure

# Failures that the same run may get over; any other one comes back unless something is changed first.
RESUME_HELPS = frozenset(
    {
        *("worker_lost", "worker_terminated", "internal_error", "launch_failed"),
        *("not_enough_disk", "offline", "teacher_unreachable", "device_unavailable"),
        *("quota_exceeded", "unknown_setting", "invalid_setting"),
    }
)
MIN_CHECK_SECONDS = 5.0
MAX_CHECK_SECONDS = 300.0
UNKNOWN_CHECK_SECONDS = 15.0
# How far the pace of finished phases may correct what was expected of the others.
PACE_LIMITS = (0.05, 20.0)
COUNTS_IN_PARTS = ("benchmark",)


def snapshot_of(view: RunView, record: RunRecord, *, reused: bool = False) -> RunSnapshot:
    """The run as the tools that start or stop it answer."""
    kind = record.request.kind
    return RunSnapshot(
        run_id=record.run_id,
        kind=kind,
        state=view.state,
        phase=view.phase,
        progress=view.progress,
        reused=reused,
        cache_id=cache_id_of(record.request.phases),
        result=view.result,
        error=failure(view),
        next_action=next_action(view, record),
    )


def failure(view: RunView) -> Failure | None:
    """Why the run did not succeed, in its own words or, for a lost one, in ours."""
    return lost_failure(view.directory, view.attempt) if view.state == "lost" else view.error


def status_of(view: RunView, record: RunRecord, place: Place | None) -> RunStatus:
    """The run as `get_run_status` answers; `place` is where it stands in its device's queue."""
    active = view.state in ACTIVE_STATES
    cancelling = view.cancel_requested is not None
    eta = remaining_seconds(view, record, time.time()) if view.state == "running" and not cancelling else None
    return RunStatus(
        run_id=record.run_id,
        kind=record.request.kind,
        state=view.state,
        created_at=record.created_at,
        updated_at=view.updated_at or record.created_at,
        phase=view.phase if active else None,
        phases_done=view.phases_done,
        phases_total=len(record.request.phases),
        progress=view.progress if active else None,
        queue_position=place.position if place else None,
        waits_for=place.text() if place else None,
        cancel_requested=view.cancel_requested,
        eta_s=None if eta is None else round(eta, 1),
        elapsed_s=_elapsed(view, time.time()),
        metrics=view.metrics,
        alerts=distinct_alerts(view),
        result=view.result,
        error=failure(view),
        next_check_s=(MIN_CHECK_SECONDS if cancelling else _next_check(eta)) if active else None,
        next_action=next_action(view, record),
    )


def distinct_alerts(view: RunView) -> list[Alert]:
    """The latest alerts, each code and text once, at its last time: a resumed run raises many of them again."""
    latest: dict[tuple[str, str], Alert] = {}
    for alert in view.alerts:
        latest.pop((alert.code, alert.message), None)
        latest[alert.code, alert.message] = alert
    return list(latest.values())


def costs_by_stage(view: RunView) -> list[StageCost]:
    """What each stage took, once: what the run itself computed stays so when a later attempt takes it over."""
    latest: dict[str, StageCost] = {}
    for cost in view.costs:
        if not cost.reused or cost.stage not in latest:
            latest[cost.stage] = cost
    return list(latest.values())


def remaining_seconds(view: RunView, record: RunRecord, now: float) -> float | None:
    """Seconds to the end of all phases; None while the current phase's pace, or a later phase's cost, is unknown.

    Later phases count as they were expected, corrected by how the finished ones went.
    """
    expected = record.expected_phase_seconds
    pace = _pace(view, record)
    current = _current_remaining(view, expected, pace, now)
    later = [phase.name for phase in record.request.phases if phase.name not in {*view.phases_done, view.phase}]
    if current is None or any(name not in expected for name in later):
        return None
    return current + pace * sum(expected[name] for name in later)


def next_action(view: RunView, record: RunRecord) -> str:
    """The one next call, ready to make."""
    run_id = record.run_id
    if view.state in ACTIVE_STATES:
        call = f"Call get_run_status(run_id='{run_id}', wait_seconds=25)"
        if view.cancel_requested is None:
            return call
        return f"A cancellation is pending, do not ask again. {call} until the state is cancelled"
    if view.state != "succeeded":
        fixed_first = view.state == "failed" and view.error is not None and view.error.code not in RESUME_HELPS
        return view.error.fix if fixed_first and view.error else f"Call resume_run(run_id='{run_id}')"
    return _worse_than_before(view) + _after_success(record, benchmarked="benchmark" in view.artifacts)


def _worse_than_before(view: RunView) -> str:
    """What must not go unsaid of a run that did what it was asked to: a result below its baseline, beyond chance."""
    for comparison in (view.result or {}).get("comparisons", []):
        difference, low, high = comparison["accuracy_difference"]
        if high < 0:
            return (
                f"Beware: {comparison['candidate']} is less accurate than {comparison['baseline']} "
                f"({difference:+.3f} [{low:.3f}, {high:.3f}]); see alerts and get_run_metrics before using it. "
            )
    return ""


def _after_success(record: RunRecord, *, benchmarked: bool) -> str:
    run_id, inputs = record.run_id, record.request.inputs
    teacher = inputs.teacher.reference if inputs.teacher else "…"
    match record.request.kind:
        case "generate":
            return f"Call start_sft(student='…', responses='{run_id}')"
        case "sft":
            return f"Call build_teacher_cache(teacher='{teacher}', student='{run_id}', prompts='…')"
        case "cache":
            student = inputs.student.reference if inputs.student else "…"
            cache_id = cache_id_of(record.request.phases)
            return f"Call start_distillation(student='{student}', cache_id='{cache_id}')"
        case "distill" if not benchmarked:
            return f"Call benchmark_student(model='{run_id}', prompts='…', teacher='{teacher}')"
        case "sample":
            return "Read result: `samples` holds the texts."
        case _:
            return (
                "Read result: `scores` holds the evidence, `paths` the absolute paths of what was made; "
                f"the whole report is the resource opd://runs/{run_id}/report"
            )


def _current_remaining(view: RunView, expected: dict[str, float], pace: float, now: float) -> float | None:
    if view.phase is None or view.phase in view.phases_done:
        return 0.0
    by_progress = by_expectation = None
    if view.progress is not None and view.progress.eta_s is not None and view.updated_at is not None:
        by_progress = max(view.progress.eta_s - max(now - seconds_of(view.updated_at), 0.0), 0.0)
    if view.phase in expected and view.phase_started_at is not None:
        left = pace * expected[view.phase] - (now - seconds_of(view.phase_started_at))
        by_expectation = left if left > 0 else None
    # A benchmark counts anew for each model and measurement, so its progress is never that of the whole phase.
    if view.phase in COUNTS_IN_PARTS or by_progress is None:
        return by_expectation
    return by_progress


def _pace(view: RunView, record: RunRecord) -> float:
    computed = [cost for cost in costs_by_stage(view) if not cost.reused]
    known = [(cost.seconds, record.expected_phase_seconds.get(cost.stage, 0.0)) for cost in computed]
    actual, planned = sum(pair[0] for pair in known), sum(pair[1] for pair in known)
    if planned <= 0 or actual <= 0:
        return 1.0
    return min(max(actual / planned, PACE_LIMITS[0]), PACE_LIMITS[1])


def _elapsed(view: RunView, now: float) -> float | None:
    if view.started_at is None:
        return None
    end = view.finished_at or (view.updated_at if view.state == "lost" else None)
    return round(max((seconds_of(end) if end else now) - seconds_of(view.started_at), 0.0), 1)


def _next_check(eta: float | None) -> float:
    if eta is None:
        return UNKNOWN_CHECK_SECONDS
    return round(min(max(eta, MIN_CHECK_SECONDS), MAX_CHECK_SECONDS), 1)


def wait_token_of(view: RunView) -> str:
    """A short text that changes with state, phase, phases done and alerts."""
    state: RunState = view.state
    return f"{state}/{view.phase or '-'}/{len(view.phases_done)}/{view.alert_count}"


MAX_VIEWS = 64
Answer = TypeVar("Answer")


class Views:
    """The latest used views of a workspace's runs; safe to share between threads."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._views: OrderedDict[str, tuple[threading.Lock, RunView, RunRecord]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, run_id: str, answer: Callable[[RunView, RunRecord], Answer]) -> Answer:
        """What `answer` makes of the refreshed view and the record; raises UnknownIdError `unknown_run`."""
        with self._lock:
            if run_id not in self._views:
                directory = run_directory(self._workspace, run_id)
                self._views[run_id] = (threading.Lock(), RunView(directory), read_record(directory))
            self._views.move_to_end(run_id)
            while len(self._views) > MAX_VIEWS:
                self._views.popitem(last=False)
            lock, view, record = self._views[run_id]
        with lock:
            return answer(view.refresh(), record)

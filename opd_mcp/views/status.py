"""What a run's view and record say to its reader: snapshot, status and ETA."""

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from opd_mcp.devices.leases import Place
from opd_mcp.planning.costs.estimates import PROCESS_START
from opd_mcp.planning.phases import cache_id_of
from opd_mcp.schemas.reports import StageCost, summed_costs
from opd_mcp.schemas.runs import (
    ACTIVE_STATES,
    Alert,
    Failure,
    RunLabels,
    RunRecord,
    RunSnapshot,
    RunStatus,
    phase_label,
)
from opd_mcp.store.run_view import RunView, seconds_of
from opd_mcp.supervisor.liveness import lost_failure, worker_alert

if TYPE_CHECKING:
    from opd_mcp.supervisor.executors.placed import QueuedOn
from opd_mcp.views.next_steps import next_action, run_verdict

MIN_CHECK_SECONDS = 5.0
MAX_CHECK_SECONDS = 300.0
UNKNOWN_CHECK_SECONDS = 15.0
# How far the pace of finished phases may correct what was expected of the others.
PACE_LIMITS = (0.05, 20.0)
COUNTS_IN_PARTS = ("benchmark",)


def snapshot_of(
    view: RunView, record: RunRecord, *, reused: bool = False, wanted: RunLabels | None = None
) -> RunSnapshot:
    """The run as the tools that start or stop it answer; `wanted` is what the caller of a start would call it."""
    kind = record.request.kind
    return RunSnapshot(
        run_id=record.run_id,
        kind=kind,
        state=view.state,
        phase=view.phase,
        progress=view.progress,
        name=record.request.labels.name,
        reused=reused,
        note=_other_labels(record.request.labels, wanted) if reused and wanted else None,
        cache_id=cache_id_of(record.request.phases),
        result=judged_result(view, record),
        error=failure(view),
        next_action=next_action(view, record),
    )


def _other_labels(labels: RunLabels, wanted: RunLabels) -> str | None:
    """That an active run keeps its own labels, for a caller who gave others."""
    given = {name: value for name, value in wanted if value}
    other = [name for name, value in given.items() if getattr(labels, name) != value]
    if not other:
        return None
    tags = f", tags {', '.join(labels.tags)}" if labels.tags else ""
    return f"This request is active already as {labels.name!r}{tags}; the {' and '.join(other)} given are not used."


def judged_result(view: RunView, record: RunRecord) -> dict[str, Any] | None:
    """The run's result with the verdict on it, which a training without a report lacks."""
    verdict = run_verdict(view, record)
    return view.result if verdict is None else {**(view.result or {}), "verdict": verdict.to_dict()}


def failure(view: RunView) -> Failure | None:
    """Why the run did not succeed, in its own words or, for a lost one, in ours."""
    if view.state == "lost":
        return lost_failure(view.directory, view.attempt)
    error = view.error
    if error is None or error.call is None:
        return error
    # A stage that fails does not know which run it was part of.
    return error.model_copy(update={"call": error.call.filled(run_id=view.directory.name)})


def status_of(view: RunView, record: RunRecord, place: "Place | QueuedOn | None") -> RunStatus:
    """The run as `get_run_status` answers; `place` is where it stands in its device's or executor's queue."""
    active = view.state in ACTIVE_STATES
    cancelling = view.cancel_requested is not None
    eta = remaining_seconds(view, record, time.time()) if view.state == "running" and not cancelling else None
    return RunStatus(
        run_id=record.run_id,
        kind=record.request.kind,
        state=view.state,
        name=record.request.labels.name,
        tags=record.request.labels.tags or None,
        notes=record.request.labels.notes,
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
        alerts=[*distinct_alerts(view), *filter(None, [worker_alert(view)])],
        result=judged_result(view, record),
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
    latest: dict[tuple[str, int | None], StageCost] = {}
    for cost in view.costs:
        if not cost.reused or (cost.stage, cost.round) not in latest:
            latest[cost.stage, cost.round] = cost
    return summed_costs(latest.values())


def remaining_seconds(view: RunView, record: RunRecord, now: float) -> float | None:
    """Seconds to the end of all phases; None while the current phase's pace, or a later phase's cost, is unknown.

    Later phases count as they were expected, corrected by how the finished ones went.
    """
    rounds = Counter[str](phase.name for phase in record.request.phases if phase.satisfied_by is None)
    expected = {name: seconds / max(rounds[name], 1) for name, seconds in record.expected_phase_seconds.items()}
    pace = _pace(view, expected)
    current = _current_remaining(view, expected, pace, now)
    begun = {*view.phases_done, phase_label(view.phase or "", view.round)}
    later = [phase.name for phase in record.request.phases if phase.label not in begun]
    if current is None or any(name not in expected for name in later):
        return None
    return current + pace * sum(expected[name] for name in later)


def _current_remaining(view: RunView, expected: dict[str, float], pace: float, now: float) -> float | None:
    # A run begins with what the process itself takes to start, before its first phase and within it.
    start = 0.0 if view.phases_done else expected.get(PROCESS_START, 0.0)
    if view.phase is None or phase_label(view.phase, view.round) in view.phases_done:
        return start
    by_progress = by_expectation = None
    if view.progress is not None and view.progress.eta_s is not None and view.updated_at is not None:
        by_progress = max(view.progress.eta_s - max(now - seconds_of(view.updated_at), 0.0), 0.0)
    if view.phase in expected and view.phase_started_at is not None:
        left = start + pace * expected[view.phase] - (now - seconds_of(view.phase_started_at))
        by_expectation = left if left > 0 else None
    # A benchmark counts from zero for each model and measurement, so its progress is never that of the whole phase.
    if view.phase in COUNTS_IN_PARTS or by_progress is None:
        return by_expectation
    return by_progress


def _pace(view: RunView, expected: dict[str, float]) -> float:
    """Actual over expected seconds of what was computed; `expected` are those of one phase by name."""
    computed = [cost for cost in costs_by_stage(view) if not cost.reused]
    done = Counter(label.split()[0] for label in view.phases_done)
    known = [(cost.seconds, expected.get(cost.stage, 0.0) * done[cost.stage]) for cost in computed]
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
    """A short text that changes with state, phase, phases done and alerts, that of the process included."""
    state, alert = view.state, worker_alert(view)
    return f"{state}/{view.phase or '-'}/{len(view.phases_done)}/{view.alert_count}/{alert.code if alert else '-'}"

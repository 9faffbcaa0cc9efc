"""What the dashboard shows: up to four runs in full, and the newest ones to choose from."""

from collections.abc import Sequence

from opd_mcp.schemas.answers import DashboardFeed, DashboardRun, ShownPhase
from opd_mcp.schemas.next_action import advice_text
from opd_mcp.schemas.reports import Curve
from opd_mcp.schemas.runs import ACTIVE_STATES, RunRecord, phase_label
from opd_mcp.schemas.texts import shortened
from opd_mcp.store.run_view import RunView
from opd_mcp.store.store import Store
from opd_mcp.views.compare import compared
from opd_mcp.views.metrics import LOSS_KEYS, series
from opd_mcp.views.next_steps import run_verdict
from opd_mcp.views.status import costs_by_stage, status_of

MAX_RUNS = 4
LISTED_RUNS = 30
CURVE_POINTS = 80
SHOWN_METRICS = (*LOSS_KEYS, "reverse_kl_k3", "mean_logprob", "accuracy", "gradient_norm")
MAX_CURVES = 5


def dashboard_feed(store: Store, run_ids: Sequence[str]) -> DashboardFeed:
    """The chosen runs, else the newest one; raises UnknownIdError `unknown_run`."""
    listed = store.list_runs(limit=LISTED_RUNS).rows
    chosen = list(dict.fromkeys(run_ids))[:MAX_RUNS] or [row.run_id for row in listed[:1]]
    runs = [shown_run(store.record(run_id), store.view(run_id, keep_series=True)) for run_id in chosen]
    comparison = compared(store, chosen) if len(chosen) > 1 else None
    return DashboardFeed(runs=runs, listed=listed, comparison=comparison)


def shown_run(record: RunRecord, view: RunView) -> DashboardRun:
    """One run with its phases, curves, costs and scores, from a view with full series."""
    status = status_of(view, record, None)
    result = view.result or {}
    failed = status.error
    return DashboardRun(
        run_id=record.run_id,
        kind=record.request.kind,
        state=view.state,
        verdict=run_verdict(view, record),
        created_at=record.created_at,
        name=record.request.labels.name,
        tags=record.request.labels.tags,
        notes=record.request.labels.notes,
        models=" ← ".join(
            source.reference.rstrip("/").rsplit("/", 1)[-1]
            for source in (record.request.inputs.student or record.request.inputs.model, record.request.inputs.teacher)
            if source is not None
        ),
        phases=[ShownPhase(name=phase.label, state=phase_state(view, phase.label)) for phase in record.request.phases],
        progress=status.progress,
        eta_s=status.eta_s,
        elapsed_s=status.elapsed_s,
        curves=curves(view),
        alerts=status.alerts[-5:],
        costs=costs_by_stage(view),
        scores=result.get("scores", {}),
        comparisons=result.get("comparisons", []),
        teacher_row=result.get("teacher_row"),
        error=f"[{failed.code}] {shortened(failed.cause, 300)} Fix: {advice_text(failed.fix, failed.call)}"
        if failed
        else None,
    )


def phase_state(view: RunView, label: str) -> str:
    """`done`, `running`, `stopped` or `waiting`."""
    if label in view.phases_done:
        return "done"
    if view.state in ACTIVE_STATES:
        return "running" if view.phase and label == phase_label(view.phase, view.round) else "waiting"
    return "stopped" if view.state != "succeeded" else "done"


def curves(view: RunView) -> list[Curve]:
    """The telling metrics of the training phases, the last phase's first."""
    points = view.series
    names = [f"{phase}.{key}" for phase in ("distill", "sft") for key in SHOWN_METRICS if f"{phase}.{key}" in points]
    found = [series(name, points[name], CURVE_POINTS) for name in names[:MAX_CURVES]]
    return [Curve(key=item.key, steps=item.steps, values=item.values) for item in found if item.steps]

"""What the dashboard shows: runs in short for agents, in full for the page, and a list of runs to choose from."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from opd_mcp.schemas.answers import CurveMark, DashboardFeed, DashboardRun, RunDetail, RunDocument, ShownPhase
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.next_action import advice_text
from opd_mcp.schemas.reports import BenchmarkReport, Curve, ShownAnswers
from opd_mcp.schemas.requests import ReadDashboard
from opd_mcp.schemas.resolve import changed_settings, leaves
from opd_mcp.schemas.runs import ACTIVE_STATES, RunRecord, RunRow, phase_label
from opd_mcp.schemas.texts import shortened
from opd_mcp.store.logs import log_page
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import CHECKPOINTS, LOG_FILE
from opd_mcp.store.store import Store
from opd_mcp.views.compare import compared, report_of
from opd_mcp.views.metrics import LOSS_KEYS, inputs_of, objectives, series
from opd_mcp.views.next_steps import run_verdict
from opd_mcp.views.status import costs_by_stage, status_of

MAX_RUNS = 4
LISTED_RUNS, PAGE_RUNS = 30, 20
CURVE_POINTS, PAGE_CURVE_POINTS, SPARK_POINTS = 80, 400, 24
HELD_OUT = ("held_out_reverse_kl", "held_out_accuracy")
SHOWN_METRICS = (*HELD_OUT, *LOSS_KEYS, "reverse_kl_k3", "mean_logprob", "accuracy", "gradient_norm")
MAX_CURVES = 7
TRAINING = ("distill", "sft")
LOG_LINES = 12
CHECKPOINT = "step-"
"""How the name of a checkpoint's directory begins; the step follows."""


def dashboard_feed(store: Store, run_ids: Sequence[str]) -> DashboardFeed:
    """The chosen runs in short, else an active one or the newest; raises UnknownIdError `unknown_run`."""
    found = store.list_runs(limit=LISTED_RUNS)
    chosen = list(dict.fromkeys(run_ids))[:MAX_RUNS] or opened(found.rows)
    runs = [shown_run(store.record(run_id), store.view(run_id, keep_series=True)) for run_id in chosen]
    comparison = compared(store, chosen) if len(chosen) > 1 else None
    return DashboardFeed(runs=runs, listed=found.rows, total=found.total, comparison=comparison)


def dashboard_page(store: Store, run_ids: Sequence[str], arguments: ReadDashboard) -> DashboardFeed:
    """The chosen runs in full, and the page of runs that the filters ask for, each with its curve in small.

    Raises UnknownIdError `unknown_run`, ArgumentError `invalid_argument` for a cursor that no page gave.
    """
    filters = {name: getattr(arguments, name) for name in ("state", "kind", "name", "tag", "cursor")}
    found = store.list_runs(limit=PAGE_RUNS, **filters)
    chosen = list(dict.fromkeys(run_ids)) or opened(found.rows)
    return DashboardFeed(
        runs=[run_in_full(store, run_id) for run_id in chosen],
        listed=found.rows,
        total=found.total,
        next_cursor=found.next_cursor,
        sparks={row.run_id: points for row in found.rows if (points := store.views.sparkline(row.run_id, spark))},
        comparison=compared(store, chosen) if len(chosen) > 1 else None,
    )


def opened(rows: Sequence[RunRow]) -> list[str]:
    """The run that is shown where none was chosen: one that runs, else one that waits, else the newest."""
    order = {"running": 0, "queued": 1}
    return [row.run_id for row in sorted(rows, key=lambda row: order.get(row.state, 2))[:1]]


def spark(view: RunView) -> list[float]:
    """The training objective of a run's last training phase in a few points; empty before it has two."""
    name = next(objectives(view.series), None)
    values = series(name, view.series[name], SPARK_POINTS).values if name else []
    return values if len(values) > 1 else []


def shown_run(record: RunRecord, view: RunView, points: int = CURVE_POINTS) -> DashboardRun:
    """One run with its phases, curves of so many points, costs and scores, from a view with full series."""
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
        curves=curves(view, points),
        alerts=status.alerts[-5:],
        costs=costs_by_stage(view),
        scores=result.get("scores", {}),
        comparisons=result.get("comparisons", []),
        teacher_row=result.get("teacher_row"),
        error=f"[{failed.code}] {shortened(failed.cause, 300)} Fix: {advice_text(failed.fix, failed.call)}"
        if failed
        else None,
    )


def run_in_full(store: Store, run_id: str) -> DashboardRun:
    """One run with all that the page shows of it; raises UnknownIdError `unknown_run`."""
    record, view = store.record(run_id), store.view(run_id, keep_series=True)
    shown, report = shown_run(record, view, PAGE_CURVE_POINTS), report_of(store, view)
    makers = makers_of_reused(store, view)
    found = [*shown.curves, *(curve for phase, maker in makers.items() for curve in curves_of(store, maker, phase))]
    found.sort(key=lambda curve: TRAINING.index(curve.key.partition(".")[0]))
    samples: list[ShownAnswers] = []
    if isinstance(report, BenchmarkReport):
        samples = report.samples
        found = found or report.curves  # a benchmark has none: those of the training that led to its model
    told = detail(store, record, view).model_copy(update={"samples": samples, "curves_of": makers})
    return shown.model_copy(update={"curves": found, "detail": told})


def makers_of_reused(store: Store, view: RunView) -> dict[str, str]:
    """By training phase whose result was reused, the run that made it, where it is still there."""
    found = {}
    for cost in costs_by_stage(view):
        if cost.reused and cost.stage in TRAINING and cost.stage in view.artifacts:
            with suppress(OpdError):  # deleted since
                maker = store.artifacts.get(view.artifacts[cost.stage]).record.run_id
                if maker is not None and maker != view.directory.name and store.exists(maker):
                    found[cost.stage] = maker
    return found


def curves_of(store: Store, run_id: str, phase: str) -> list[Curve]:
    """The curves of one phase of a run."""
    found = curves(store.view(run_id, keep_series=True), PAGE_CURVE_POINTS)
    return [curve for curve in found if curve.key.startswith(f"{phase}.")]


def detail(store: Store, record: RunRecord, view: RunView) -> RunDetail:
    """The run's settings, plan, log, marks and documents."""
    request = record.request
    export = request.inputs.export if view.state == "succeeded" else None
    return RunDetail(
        preset=request.recipe.preset,
        settings=recipe_settings(record),
        changed=sorted(changed_settings(request.recipe)),
        inputs=inputs_of(record),
        planned_seconds=record.expected_phase_seconds,
        log=log_page(record.run_id, view.directory / LOG_FILE, tail=LOG_LINES).lines,
        marks=[*alert_marks(view), *checkpoint_marks(view)],
        documents=documents(store, record, view),
        export=None if export is None else export.destination,
    )


def recipe_settings(record: RunRecord) -> dict[str, Any]:
    """Every setting of the run's recipe, by its dotted key."""
    return dict(leaves(record.request.recipe.to_dict()))


def alert_marks(view: RunView) -> list[CurveMark]:
    """The alerts that were raised after a recorded step, at that step."""
    return [
        CurveMark(phase=phase, step=step, kind="alert", text=alert.code)
        for alert, (phase, step) in zip(view.alerts, view.alert_places, strict=True)
        if step is not None
    ]


def checkpoint_marks(view: RunView) -> list[CurveMark]:
    """The checkpoints that a resumed run could begin with; a finished phase keeps none."""
    found = sorted((view.directory / CHECKPOINTS).glob(f"*/{CHECKPOINT}*"))
    return [
        CurveMark(phase=path.parent.name.split(" ")[0], step=int(step), kind="checkpoint", text="checkpoint")
        for path in found
        if (step := path.name.removeprefix(CHECKPOINT)).isdecimal()
    ]


def documents(store: Store, record: RunRecord, view: RunView) -> list[RunDocument]:
    """The run's report, and the card of its export, where they are."""
    found = []
    if (artifact_id := view.artifacts.get("benchmark")) is not None:
        with suppress(OpdError):  # deleted since
            path = str(store.artifacts.get(artifact_id).path)
            found.append(RunDocument(kind="report", path=path, resource=f"opd://runs/{record.run_id}/report"))
    export = record.request.inputs.export
    if export is not None and view.state == "succeeded":
        found.append(RunDocument(kind="card", path=f"{export.destination}/README.md"))
    return found


def phase_state(view: RunView, label: str) -> str:
    """`done`, `running`, `stopped` or `waiting`."""
    if label in view.phases_done:
        return "done"
    if view.state in ACTIVE_STATES:
        return "running" if view.phase and label == phase_label(view.phase, view.round) else "waiting"
    return "stopped" if view.state != "succeeded" else "done"


def curves(view: RunView, count: int = CURVE_POINTS) -> list[Curve]:
    """The telling metrics of the training phases, at most `count` points each, the last phase's first."""
    points = view.series
    names = [f"{phase}.{key}" for phase in TRAINING for key in SHOWN_METRICS if f"{phase}.{key}" in points]
    found = [series(name, points[name], count) for name in names[:MAX_CURVES]]
    return [Curve(key=item.key, steps=item.steps, values=item.values) for item in found if item.steps]

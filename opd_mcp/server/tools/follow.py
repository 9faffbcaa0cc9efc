"""The tools that follow, stop and resume runs, and that show their metrics and logs."""

from typing import Any

from opd_mcp.schemas.answers import LogPage, MetricsReport, RunComparison
from opd_mcp.schemas.requests import (
    CancelRun,
    CompareRuns,
    GetRunLogs,
    GetRunMetrics,
    GetRunStatus,
    ListRuns,
    ResumeRun,
)
from opd_mcp.schemas.runs import RunList, RunSnapshot, RunStatus
from opd_mcp.server.render.monitoring import comparison_text, log_text, metrics_text
from opd_mcp.server.render.runs import cancel_text, list_text, snapshot_text, status_text
from opd_mcp.server.tools.spec import ToolSpec

SNAPSHOT_PARTS = frozenset({"Failure", "Progress", "NextAction"})

TOOLS: tuple[ToolSpec[Any, Any], ...] = (
    ToolSpec(
        name="get_run_status",
        title="Follow a run",
        description="State, phase, progress, ETA, metrics with trend, and the result or error. With "
        "`wait_seconds` (25 at most) it blocks until a phase change, an alert or the end. A wait that expires "
        "is normal: the run goes on, do not restart it, call again.",
        request=GetRunStatus,
        answer=RunStatus,
        call=lambda service, request: service.status(request.run_id),
        text=status_text,
        command="status {run_id}",
        read_only=True,
        waits=True,
        explained=True,
        opaque=frozenset({"NextAction"}),
    ),
    ToolSpec(
        name="list_runs",
        title="List runs",
        description="Runs of this workspace, newest first, in pages.",
        request=ListRuns,
        answer=RunList,
        call=lambda service, request: service.list_runs(**dict(request)),
        text=list_text,
        command="list",
        read_only=True,
        opaque=frozenset({"RunRow"}),
    ),
    ToolSpec(
        name="cancel_run",
        title="Cancel a run",
        description="Asks an active run, or all with a tag, to stop at the next step. Finished phases are kept.",
        request=CancelRun,
        answer=RunSnapshot,
        call=lambda service, request: service.cancel(request.run_id),
        text=cancel_text,
        command="cancel {run_id}",
        destructive=True,
        opaque=SNAPSHOT_PARTS,
    ),
    ToolSpec(
        name="resume_run",
        title="Resume a run",
        description="Resumes a failed, cancelled or lost run from its last checkpoint, under its run_id.",
        request=ResumeRun,
        answer=RunSnapshot,
        call=lambda service, request: service.resume(request.run_id),
        text=snapshot_text,
        command="resume {run_id}",
        starts_run=True,
        opaque=SNAPSHOT_PARTS,
    ),
    ToolSpec(
        name="get_run_metrics",
        title="Read training curves",
        description="Metrics of up to 4 runs: series thinned out to `max_points`, trend, a one-line diagnosis, and "
        "which settings differ between the runs.",
        request=GetRunMetrics,
        answer=MetricsReport,
        call=lambda service, request: service.run_metrics(request),
        text=metrics_text,
        command="metrics {run_ids}",
        read_only=True,
        opaque=frozenset({"MetricSeries"}),
    ),
    ToolSpec(
        name="compare_runs",
        title="Compare runs",
        description="One table of up to 32 runs: settings that differ, accuracy, reverse KL, cost, and the best "
        "paired with each other run, from their reports.",
        request=CompareRuns,
        answer=RunComparison,
        call=lambda service, request: service.compare_runs(request),
        text=comparison_text,
        command="compare {tag}",
        read_only=True,
        opaque=frozenset({"ComparedRun", "PairedRuns", "NextAction"}),
    ),
    ToolSpec(
        name="get_run_logs",
        title="Read a run's log",
        description="The last lines of a run's log, older ones by cursor.",
        request=GetRunLogs,
        answer=LogPage,
        call=lambda service, request: service.run_logs(request),
        text=log_text,
        command="logs {run_id}",
        read_only=True,
    ),
)

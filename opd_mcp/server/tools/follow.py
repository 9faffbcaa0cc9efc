"""The tools that follow, stop and resume runs: `get_run_status`, `list_runs`, `cancel_run`, `resume_run`."""

from typing import Any

from anyio import to_thread
from mcp.server.mcpserver import Context

from opd_mcp.schemas.answers import LogPage, MetricsReport
from opd_mcp.schemas.requests import CancelRun, GetRunLogs, GetRunMetrics, GetRunStatus, ListRuns, ResumeRun
from opd_mcp.schemas.runs import RunList, RunSnapshot, RunStatus
from opd_mcp.server.protocol.tool_spec import Reply, ToolSpec
from opd_mcp.server.protocol.waiting import StatusCalls
from opd_mcp.server.render.listings import log_text, metrics_text
from opd_mcp.server.render.runs import cancel_text, list_text, snapshot_text
from opd_mcp.service import JobService


def specs(service: JobService) -> list[ToolSpec[Any]]:
    """The tools of this topic."""
    statuses = StatusCalls(service)

    async def list_runs(request: ListRuns, context: Context) -> Reply:
        runs = await to_thread.run_sync(service.list_runs, request.state, request.kind, request.limit, request.cursor)
        return Reply(runs, list_text(runs))

    async def cancel_run(request: CancelRun, context: Context) -> Reply:
        snapshot = await to_thread.run_sync(service.cancel, request.run_id)
        return Reply(snapshot, cancel_text(snapshot))

    async def resume_run(request: ResumeRun, context: Context) -> Reply:
        # A thread is not cancelled with its caller: a resume is done or not begun, never half.
        snapshot = await to_thread.run_sync(service.resume, request.run_id)
        return Reply(snapshot, snapshot_text(snapshot))

    return [
        ToolSpec(
            name="get_run_status",
            title="Follow a run",
            description="State, phase, progress, ETA, metrics with trend, and the result or error. With "
            "`wait_seconds` (25 at most) it blocks until a phase change, an alert or the end. A wait that expires "
            "is normal: the run goes on, do not restart it, call again.",
            request=GetRunStatus,
            answer=RunStatus,
            call=statuses.reply,
            read_only=True,
            explained=True,
        ),
        ToolSpec(
            name="list_runs",
            title="List runs",
            description="Runs of this workspace, newest first, in pages.",
            request=ListRuns,
            answer=RunList,
            call=list_runs,
            read_only=True,
            opaque=frozenset({"RunRow"}),
        ),
        ToolSpec(
            name="cancel_run",
            title="Cancel a run",
            description="Asks an active run to stop at its next step. What its finished phases made is kept.",
            request=CancelRun,
            answer=RunSnapshot,
            call=cancel_run,
            read_only=False,
            destructive=True,
            opaque=frozenset({"Failure", "Progress"}),
        ),
        ToolSpec(
            name="resume_run",
            title="Resume a run",
            description="Takes a failed, cancelled or lost run up again from its last checkpoint, under its run_id.",
            request=ResumeRun,
            answer=RunSnapshot,
            call=resume_run,
            read_only=False,
            starts_run=True,
            opaque=frozenset({"Failure", "Progress"}),
        ),
    ]


def look_specs(service: JobService) -> list[ToolSpec[Any]]:
    """The tools of this topic."""

    async def get_run_metrics(request: GetRunMetrics, context: Context) -> Reply:
        report = await to_thread.run_sync(service.run_metrics, request)
        return Reply(report, metrics_text(report))

    async def get_run_logs(request: GetRunLogs, context: Context) -> Reply:
        page = await to_thread.run_sync(service.run_logs, request)
        return Reply(page, log_text(page))

    return [
        ToolSpec(
            name="get_run_metrics",
            title="Compare training curves",
            description="Metrics of up to 4 runs: series thinned out to `max_points`, trend, a one-line diagnosis, and "
            "which settings differ between the runs.",
            request=GetRunMetrics,
            answer=MetricsReport,
            call=get_run_metrics,
            read_only=True,
            opaque=frozenset({"MetricSeries"}),
        ),
        ToolSpec(
            name="get_run_logs",
            title="Read a run's log",
            description="The last lines of a run's log, older ones by cursor. Never needed to learn the state: "
            "get_run_status has a failed run's last lines.",
            request=GetRunLogs,
            answer=LogPage,
            call=get_run_logs,
            read_only=True,
        ),
    ]

"""The tools that look into runs: `get_run_metrics`, `get_run_logs`."""

from typing import Any

from anyio import to_thread
from mcp.server.mcpserver import Context

from opd_mcp.jobs.service import JobService
from opd_mcp.schemas.answers import LogPage, MetricsReport
from opd_mcp.schemas.requests import GetRunLogs, GetRunMetrics
from opd_mcp.server.lists import log_text, metrics_text
from opd_mcp.server.registration import Reply, ToolSpec


def specs(service: JobService) -> list[ToolSpec[Any]]:
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

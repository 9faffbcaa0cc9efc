"""The dashboard as an MCP App: `open_dashboard` for the model, `dashboard_feed` for the page alone."""

from functools import cache
from importlib.resources import files
from typing import Any

from anyio import to_thread
from mcp.server.apps import Apps, ResourceCsp
from mcp.server.mcpserver import Context

from opd_mcp.schemas.answers import DashboardFeed
from opd_mcp.schemas.requests import OpenDashboard
from opd_mcp.server.protocol.tool_spec import Reply, ToolSpec
from opd_mcp.server.render.listings import dashboard_text
from opd_mcp.service import JobService

PAGE = "ui://opd-mcp/dashboard.html"
_OPAQUE = frozenset({"DashboardRun", "RunRow"})


def specs(service: JobService) -> list[ToolSpec[Any]]:
    """The tools of this topic."""

    async def feed(request: OpenDashboard, context: Context) -> Reply:
        found = await to_thread.run_sync(service.dashboard, request.run_ids)
        return Reply(found, dashboard_text(found))

    shared: dict[str, Any] = {"request": OpenDashboard, "answer": DashboardFeed, "call": feed, "read_only": True}
    return [
        ToolSpec(
            name="open_dashboard",
            title="Open the dashboard",
            description="Shows the user a live page of up to 4 runs: phases, curves, costs, comparison; as text where "
            "the client has no pages.",
            meta={"ui": {"resourceUri": PAGE, "visibility": ["model"]}},
            opaque=_OPAQUE,
            **shared,
        ),
        ToolSpec(
            name="dashboard_feed",
            title="Dashboard feed",
            description="What the dashboard's page reads.",
            meta={"ui": {"resourceUri": PAGE, "visibility": ["app"]}},
            opaque=_OPAQUE,
            **shared,
        ),
    ]


def dashboard_app() -> Apps:
    """The extension that carries the page; it needs nothing from any network."""
    apps = Apps()
    apps.add_html_resource(
        PAGE, dashboard_html(), title="Distillation runs", csp=ResourceCsp(connect_domains=[], resource_domains=[])
    )
    return apps


@cache
def dashboard_html() -> str:
    """The page as it is sent."""
    return (files("opd_mcp.server") / "dashboard.html").read_text(encoding="utf-8")

"""The dashboard's tools: `open_dashboard` for the model, `dashboard_feed` for the page alone."""

from typing import Any

from opd_mcp.schemas.answers import DashboardFeed
from opd_mcp.schemas.requests import OpenDashboard, ReadDashboard
from opd_mcp.server.render.monitoring import dashboard_text
from opd_mcp.server.tools.spec import ToolSpec

PAGE = "ui://opd-mcp/dashboard.html"
SHARED: dict[str, Any] = {
    "answer": DashboardFeed,
    "text": dashboard_text,
    "read_only": True,
    "opaque": frozenset({"DashboardRun", "RunRow", "RunComparison"}),
}

TOOLS: tuple[ToolSpec[Any, Any], ...] = (
    ToolSpec(
        name="open_dashboard",
        title="Open the dashboard",
        description="Shows the user a live page of up to 4 runs: phases, curves, costs, comparison; as text where "
        "the client has no pages.",
        request=OpenDashboard,
        call=lambda service, request: service.dashboard(request.run_ids),
        command="dashboard",
        meta={"ui": {"resourceUri": PAGE, "visibility": ["model"]}},
        **SHARED,
    ),
    ToolSpec(
        name="dashboard_feed",
        title="Dashboard feed",
        description="What the dashboard's page reads.",
        request=ReadDashboard,
        call=lambda service, request: service.dashboard_page(request),
        meta={"ui": {"resourceUri": PAGE, "visibility": ["app"]}},
        **SHARED,
    ),
)

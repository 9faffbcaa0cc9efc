"""The dashboard's page, as an MCP App and as HTML for the HTTP server; it needs nothing from any network."""

from functools import cache
from importlib.resources import files

from mcp.server.apps import Apps, ResourceCsp

from opd_mcp.server.tools.dashboard import PAGE


def dashboard_app() -> Apps:
    """The extension that carries the page."""
    apps = Apps()
    apps.add_html_resource(
        PAGE, dashboard_html(), title="Distillation runs", csp=ResourceCsp(connect_domains=[], resource_domains=[])
    )
    return apps


@cache
def dashboard_html() -> str:
    """The page as it is sent."""
    return (files("opd_mcp.server") / "dashboard.html").read_text(encoding="utf-8")

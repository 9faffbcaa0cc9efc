"""The dashboard's page: one HTML file without anything from elsewhere, the same for an app's frame and a browser."""

from functools import cache
from importlib.resources import files


@cache
def dashboard_html() -> str:
    """The page as it is sent."""
    return (files("opd_mcp.server") / "dashboard.html").read_text(encoding="utf-8")

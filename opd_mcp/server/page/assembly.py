"""The dashboard as the one HTML file that clients and browsers get, put together from the files next to this one."""

from functools import cache
from importlib.resources import files

STYLES = ("vendor/uPlot.min.css", "style.css")
LIBRARY = "vendor/uPlot.iife.min.js"
SCRIPTS = (
    "elements.js",
    "charts.js",
    "feed.js",
    "run_list.js",
    "run.js",
    "samples.js",
    "compare.js",
    "main.js",
)
"""In the order in which they are read: all share one scope."""


@cache
def dashboard_html() -> str:
    """The page as it is sent: it loads nothing."""
    page = page_file("page.html")
    parts = {
        "STYLE": "\n".join(map(page_file, STYLES)),
        "LIBRARY": page_file(LIBRARY),
        "SCRIPT": "\n".join(map(page_file, SCRIPTS)),
    }
    for name, content in parts.items():
        before, after = page.split(f"\n{name}\n")
        page = f"{before}\n{content}\n{after}"
    return page


def page_file(name: str) -> str:
    """The text of one of the page's files."""
    return (files("opd_mcp.server.page") / name).read_text(encoding="utf-8")

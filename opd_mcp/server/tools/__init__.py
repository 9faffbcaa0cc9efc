"""The MCP tools, one module a topic; each offers `specs(service)`.

To add a tool: write its request in schemas/requests.py, its spec in the topic's module, its text in server/texts.py.
"""

from typing import Any

from opd_mcp.jobs.service import JobService
from opd_mcp.server.registration import ToolSpec
from opd_mcp.server.settings import ServerSettings
from opd_mcp.server.tools import artifacts, cache, dashboard, follow, look, plan, setup, start

DEFAULTS = ServerSettings()


def all_specs(service: JobService, settings: ServerSettings = DEFAULTS) -> list[ToolSpec[Any]]:
    """Every tool of the server, in the order in which an agent uses them."""
    return [
        *setup.specs(service),
        *plan.specs(service),
        *start.specs(service, settings),
        *cache.specs(service),
        *follow.specs(service),
        *look.specs(service),
        *artifacts.specs(service, settings),
        *dashboard.specs(service),
    ]

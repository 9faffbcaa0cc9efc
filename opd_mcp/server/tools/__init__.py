"""The MCP tools, one module a topic; each offers `specs(service)`.

To add a tool: write its request in schemas/requests.py, its spec in the topic's module, its text in server/texts.py.
"""

from typing import Any

from opd_mcp.server.protocol.tool_spec import ToolSpec
from opd_mcp.server.serve import ServerSettings
from opd_mcp.server.tools import artifacts, dashboard, follow, plan, start
from opd_mcp.service import JobService

DEFAULTS = ServerSettings()


def all_specs(service: JobService, settings: ServerSettings = DEFAULTS) -> list[ToolSpec[Any]]:
    """Every tool of the server, in the order in which an agent uses them."""
    return [
        *plan.setup_specs(service),
        *plan.specs(service),
        *start.specs(service, settings),
        *artifacts.cache_specs(service),
        *follow.specs(service),
        *follow.look_specs(service),
        *artifacts.specs(service, settings),
        *dashboard.specs(service),
    ]

"""The table of all tools, in the order in which an agent uses them, and the commands that do the same.

To add a tool: its request in schemas/requests.py, its row in its group's file here, its text in server/render/.
Nothing here imports mcp, so that the command line can read it.
"""

from typing import TYPE_CHECKING, Any

from opd_mcp.schemas.next_action import NextAction
from opd_mcp.server.tools import artifacts, dashboard, follow, plan, start
from opd_mcp.server.tools.spec import ToolSpec

if TYPE_CHECKING:
    from opd_mcp.server.serve import ServerSettings

TOOLS: tuple[ToolSpec[Any, Any], ...] = (
    *plan.TOOLS,
    *start.TOOLS,
    artifacts.INSPECT_CACHE,
    *follow.TOOLS,
    *artifacts.TOOLS,
    *dashboard.TOOLS,
)


def offered_tools(settings: "ServerSettings") -> list[ToolSpec[Any, Any]]:
    """The tools that a server with these settings lists."""
    return [spec for spec in TOOLS if settings.allow_delete or not spec.deletes]


def command_text(action: NextAction) -> str:
    """A next step as people at a terminal read it, e.g. `Run opd-mcp status x`; empty without a tool."""
    spec = next((spec for spec in TOOLS if spec.name == action.tool), None)
    if spec is None:
        return ""
    if spec.command is None:
        return f"{action.call_text()} in an MCP client of opd-mcp serve"
    values = {name: name.upper() for name in spec.request.model_fields} | action.arguments
    return f"Run opd-mcp {spec.command.format(**values)}"

"""The MCP server over a JobService: `build_server(service)`; serve.py says how it is served."""

import logging
import sys
from typing import Any

from mcp.server import MCPServer
from mcp.server.apps import Apps, ResourceCsp
from mcp.server.caching import CacheHint
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, InputRequiredResult

import opd_mcp
from opd_mcp.server.guidance import INSTRUCTIONS, add_prompts
from opd_mcp.server.page.assembly import dashboard_html
from opd_mcp.server.protocol.sdk_tool import sdk_tool
from opd_mcp.server.protocol.tasks import RunTasks, TasksExtension
from opd_mcp.server.resources import RunWatcher, add_resources
from opd_mcp.server.serve import ServerSettings
from opd_mcp.server.tools.dashboard import PAGE
from opd_mcp.server.tools.table import offered_tools, restriction_text, unknown_tool_text
from opd_mcp.service import JobService

DEFAULTS = ServerSettings()
STATIC = CacheHint(ttl_ms=3_600_000, scope="public")
"""For what never changes while a server runs."""


class OpdServer(MCPServer):
    """The SDK's server; a call of a tool that it does not offer is answered with the reason."""

    def __init__(self, settings: ServerSettings, **options: Any) -> None:
        super().__init__("opd-mcp", **options)
        self._settings = settings
        self._offered = frozenset(spec.name for spec in offered_tools(settings))

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """The tool's answer; raises ToolError."""
        if name not in self._offered:
            raise ToolError(unknown_tool_text(name, self._settings))
        return await super().call_tool(name, arguments, context)


def build_server(service: JobService, settings: ServerSettings = DEFAULTS) -> MCPServer:
    """The server with all tools; it holds no state of a run, so any number of them may share a workspace."""
    # Before MCPServer: its own rich handler takes seconds to print a first traceback.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    specs = offered_tools(settings)
    starting = frozenset(spec.name for spec in specs if spec.starts_run)
    watcher = RunWatcher(service)
    server = OpdServer(
        settings,
        title="Lightning OPD distillation",
        version=opd_mcp.__version__,
        instructions=INSTRUCTIONS + restriction_text(settings),
        tools=[sdk_tool(spec, service, settings) for spec in specs],
        extensions=[TasksExtension(RunTasks(service, starting, settings)), dashboard_app()],
        log_level="WARNING",
        lifespan=watcher.lifespan,
        subscriptions=watcher.bus,
        cache_hints={"tools/list": STATIC, "prompts/list": STATIC, "resources/templates/list": STATIC},
    )
    add_resources(server, service, settings.secrets)
    add_prompts(server)
    return server


def dashboard_app() -> Apps:
    """The extension that carries the page."""
    apps = Apps()
    apps.add_html_resource(
        PAGE, dashboard_html(), title="Distillation runs", csp=ResourceCsp(connect_domains=[], resource_domains=[])
    )
    return apps

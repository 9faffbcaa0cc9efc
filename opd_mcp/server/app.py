"""The MCP server over a JobService: `build_server(service)`; how it is served is serve.py's concern."""

import logging
import sys

from mcp.server import MCPServer

import opd_mcp
from opd_mcp.jobs.service import JobService
from opd_mcp.server.instructions import INSTRUCTIONS
from opd_mcp.server.registration import tool_from_spec
from opd_mcp.server.tools import all_specs


def build_server(service: JobService) -> MCPServer:
    """The server with all tools; it holds no state of a run, so any number of them may share a workspace."""
    # Before MCPServer: its own rich handler takes seconds to print a first traceback.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    return MCPServer(
        "opd-mcp",
        title="Lightning OPD distillation",
        version=opd_mcp.__version__,
        instructions=INSTRUCTIONS,
        tools=[tool_from_spec(spec) for spec in all_specs(service)],
        log_level="WARNING",
    )

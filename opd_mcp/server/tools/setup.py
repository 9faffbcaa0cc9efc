"""`inspect_setup`: where am I, what can this machine do, what can I try."""

from typing import Any

from anyio import to_thread
from mcp.server.mcpserver import Context

from opd_mcp.jobs.service import JobService
from opd_mcp.schemas.requests import InspectSetup
from opd_mcp.schemas.setup import SetupReport
from opd_mcp.server.registration import Reply, ToolSpec
from opd_mcp.server.texts import setup_text


def specs(service: JobService) -> list[ToolSpec[Any]]:
    """The tools of this topic."""

    async def inspect_setup(request: InspectSetup, context: Context) -> Reply:
        report = await to_thread.run_sync(service.setup)
        return Reply(report, setup_text(report))

    return [
        ToolSpec(
            name="inspect_setup",
            title="Inspect the set-up",
            description="Version, devices and free memory, workspace, allowed roots, active runs, limits, and the "
            "absolute paths of a small example task that runs on any machine. Call it first.",
            request=InspectSetup,
            answer=SetupReport,
            call=inspect_setup,
            read_only=True,
            opaque=frozenset({"Limits", "Quotas", "Device", "ActiveRun", "ExamplePaths", "Finding"}),
        )
    ]

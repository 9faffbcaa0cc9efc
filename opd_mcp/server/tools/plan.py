"""`plan_distillation`: what would run, what it costs, and what stands in the way."""

from typing import Any

from anyio import to_thread
from mcp.server.mcpserver import Context

from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.requests import InspectSetup, PlanDistillation
from opd_mcp.schemas.setup import SetupReport
from opd_mcp.server.protocol.tool_spec import Reply, ToolSpec
from opd_mcp.server.render.runs import plan_text, setup_text
from opd_mcp.service import JobService

_OPAQUE = frozenset(
    {"Recipe", "RunInputs", "ModelIdentity", "TeacherClaim", "ConsistencyVerdict", "PlannedPhase", "PhaseEstimate"}
    | {"Finding", "PromptHygiene", "RolloutStatistics"}
)


def specs(service: JobService) -> list[ToolSpec[Any]]:
    """The tools of this topic."""

    async def plan_distillation(request: PlanDistillation, context: Context) -> Reply:
        plan = await to_thread.run_sync(service.plan, request)
        return Reply(plan, plan_text(plan))

    return [
        ToolSpec(
            name="plan_distillation",
            title="Plan a distillation",
            description="Checks the inputs and answers with the resolved recipe, the phases (and which of them "
            "existing artifacts already satisfy), time, memory and disk for live and lightning, `blocking` and "
            "`warnings`. Starts nothing. Give the `plan_id` to start_distillation.",
            request=PlanDistillation,
            answer=Plan,
            call=plan_distillation,
            read_only=True,
            open_world=True,
            opaque=_OPAQUE,
        )
    ]


def setup_specs(service: JobService) -> list[ToolSpec[Any]]:
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

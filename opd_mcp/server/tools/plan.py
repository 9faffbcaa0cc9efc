"""`plan_distillation`: what would run, what it costs, and what stands in the way."""

from typing import Any

from anyio import to_thread
from mcp.server.mcpserver import Context

from opd_mcp.jobs.service import JobService
from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.server.registration import Reply, ToolSpec
from opd_mcp.server.texts import plan_text

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

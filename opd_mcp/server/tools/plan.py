"""What an agent calls first: `inspect_setup`, and `plan_distillation`, which starts nothing."""

from typing import Any

from opd_mcp.schemas.answers import SetupReport
from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.requests import InspectSetup, PlanDistillation
from opd_mcp.server.render.plans import plan_text
from opd_mcp.server.render.workspace import setup_text
from opd_mcp.server.tools.spec import ToolSpec

TOOLS: tuple[ToolSpec[Any, Any], ...] = (
    ToolSpec(
        name="inspect_setup",
        title="Inspect the set-up",
        description="Devices and free memory, executors, workspace, allowed roots, active runs, limits, and the paths "
        "of a small example task that runs on any machine. Call it first.",
        request=InspectSetup,
        answer=SetupReport,
        call=lambda service, request: service.setup(),
        text=setup_text,
        command="doctor",
        read_only=True,
        opaque=frozenset({"Limits", "Quotas", "Device", "ActiveRun", "ExamplePaths", "Finding", "NextAction"}),
    ),
    ToolSpec(
        name="plan_distillation",
        title="Plan a distillation",
        description="Checks the inputs and answers with recipe, phases, time, memory and disk of live and lightning, "
        "`preview` of the data, `blocking` and `warnings`. Starts nothing. Give the `plan_id` to start_distillation.",
        request=PlanDistillation,
        answer=Plan,
        call=lambda service, request: service.plan(request),
        text=plan_text,
        command="plan",
        options=True,
        read_only=True,
        open_world=True,
        opaque=frozenset(
            {"Recipe", "RunInputs", "ModelIdentity", "TeacherClaim", "ConsistencyVerdict", "PlannedPhase"}
            | {"PhaseEstimate", "FitOption", "Finding", "PromptHygiene", "RolloutStatistics", "NextAction", "Preview"}
            | {"GradingPlan"}
        ),
    ),
)

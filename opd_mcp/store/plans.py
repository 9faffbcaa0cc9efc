"""Plans, one file each, so that a `plan_id` means the same plan in every process."""

from pathlib import Path

from opd_mcp.identity.files import read_schema, write_atomic
from opd_mcp.schemas.errors import UnknownIdError, nearest
from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.store.ids import is_id
from opd_mcp.store.workspace import Workspace

PLAN_AGAIN = "Call plan_distillation again and use the plan_id of its answer."


def save_plan(workspace: Workspace, plan: Plan, arguments: PlanDistillation) -> None:
    """Keep a plan and what was asked for under its id; the same plan again is the same file."""
    write_atomic(workspace.plans / f"{plan.plan_id}.json", plan.to_json(indent=2) + "\n")
    write_atomic(_arguments_file(workspace, plan.plan_id), arguments.to_json(indent=2) + "\n")


def read_plan(workspace: Workspace, plan_id: str) -> Plan:
    """The plan of an id; raises UnknownIdError `unknown_plan` with the nearest ids, IntegrityError `damaged_file`."""
    file = workspace.plans / f"{plan_id}.json"
    if is_id(plan_id) and file.is_file():
        return read_schema(file, Plan, fix=PLAN_AGAIN)
    raise UnknownIdError(
        "unknown_plan",
        "There is no such plan in this workspace.",
        value=plan_id,
        nearest=nearest(plan_id, [path.stem for path in workspace.plans.glob("*.json")]),
        fix="Call plan_distillation and use the plan_id of its answer.",
    )


def read_plan_arguments(workspace: Workspace, plan: Plan) -> PlanDistillation:
    """What a saved plan was asked for; raises IntegrityError `damaged_file`."""
    return read_schema(_arguments_file(workspace, plan.plan_id), PlanDistillation, fix=PLAN_AGAIN)


def _arguments_file(workspace: Workspace, plan_id: str) -> Path:
    return workspace.plans / f"{plan_id}.arguments"

"""Plans, one file each, so that a `plan_id` means the same plan in every process."""

from pydantic import ValidationError

from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.base import first_problem
from opd_mcp.schemas.errors import IntegrityError, UnknownIdError, nearest
from opd_mcp.schemas.plans import Plan
from opd_mcp.store.ids import is_id
from opd_mcp.store.workspace import Workspace


def save_plan(workspace: Workspace, plan: Plan) -> None:
    """Keep a plan under its id; the same plan again is the same file."""
    write_atomic(workspace.plans / f"{plan.plan_id}.json", plan.to_json(indent=2) + "\n")


def read_plan(workspace: Workspace, plan_id: str) -> Plan:
    """The plan of an id; raises UnknownIdError `unknown_plan` with the nearest ids, IntegrityError `damaged_file`."""
    file = workspace.plans / f"{plan_id}.json"
    if is_id(plan_id) and file.is_file():
        try:
            return Plan.from_json(file.read_bytes())
        except ValidationError as error:
            raise IntegrityError(
                "damaged_file",
                f"The plan cannot be used ({first_problem(error)}).",
                value=plan_id,
                fix="Call plan_distillation again.",
            ) from error
    raise UnknownIdError(
        "unknown_plan",
        "There is no such plan in this workspace.",
        value=plan_id,
        nearest=nearest(plan_id, [path.stem for path in workspace.plans.glob("*.json")]),
        fix="Call plan_distillation and use the plan_id of its answer.",
    )

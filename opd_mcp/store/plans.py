"""Plans, one file each, so that a `plan_id` means the same plan in every process."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.base import Record, Schema, first_problem
from opd_mcp.schemas.errors import IntegrityError, UnknownIdError, nearest
from opd_mcp.schemas.next_action import plan_call
from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.store.workspace import Workspace, is_id

Content = TypeVar("Content", bound=Schema)


def _with_next_action_as_data(values: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had the next call as a sentence."""
    plan = values.get("plan")
    if not isinstance(plan, dict):
        return values
    return {**values, "plan": {**plan, "next_action": {"why": plan.get("next_action")}}}


class SavedPlan(Record):
    """`plans/<plan_id>.json`."""

    upgrades = (_with_next_action_as_data,)
    plan: Plan


def save_plan(workspace: Workspace, plan: Plan, arguments: PlanDistillation) -> None:
    """Save a plan and its arguments under its id; the same plan writes the same files."""
    write_atomic(_arguments_file(workspace, plan.plan_id), arguments.to_json(indent=2) + "\n")
    write_atomic(_plan_file(workspace, plan.plan_id), SavedPlan(plan=plan).sealed().to_json(indent=2) + "\n")


def read_plan(workspace: Workspace, plan_id: str) -> Plan:
    """The plan of an id; raises UnknownIdError `unknown_plan` with the nearest ids, IntegrityError `damaged_file`."""
    if is_id(plan_id) and _plan_file(workspace, plan_id).is_file():
        return _read(SavedPlan, _plan_file(workspace, plan_id)).plan
    raise UnknownIdError(
        "unknown_plan",
        "There is no such plan in this workspace.",
        value=plan_id,
        nearest=nearest(plan_id, [path.stem for path in workspace.plans.glob("*.json")]),
        fix="Plan a distillation and give the plan_id of the answer.",
        call=plan_call(),
    )


def read_arguments(workspace: Workspace, plan: Plan) -> PlanDistillation:
    """The arguments of a saved plan; raises IntegrityError `damaged_file`."""
    return _read(PlanDistillation, _arguments_file(workspace, plan.plan_id))


def _plan_file(workspace: Workspace, plan_id: str) -> Path:
    return workspace.plans / f"{plan_id}.json"


def _arguments_file(workspace: Workspace, plan_id: str) -> Path:
    return workspace.plans / f"{plan_id}.arguments"


def _read(kind: type[Content], file: Path) -> Content:
    try:
        return kind.from_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else error.strerror
        raise IntegrityError(
            "damaged_file",
            f"The plan cannot be used ({why}).",
            value=file,
            fix="Plan again with the same arguments.",
            call=plan_call(),
        ) from error

"""What a plan stands for, so that a start can tell whether it is still the same and what has changed."""

from collections.abc import Sequence

from opd_mcp.schemas.plans import Plan, PlannedPhase
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.runs import RunInputs, RunPhase


def fingerprint(
    arguments: PlanDistillation, inputs: RunInputs, recipe: Recipe, phases: Sequence[RunPhase | PlannedPhase]
) -> dict[str, object]:
    """What a plan stands for, part by part; estimates, free memory and finished phases are not in it."""
    parts: dict[str, object] = {"arguments": arguments.to_dict(), "recipe": recipe.to_dict()}
    for name, value in inputs:
        parts[f"inputs.{name}"] = value.to_dict() if hasattr(value, "to_dict") else value
    parts.pop("inputs.baselines")
    parts["phases"] = [[phase.name, phase.key] for phase in phases]
    return parts


def changed_parts(arguments: PlanDistillation, saved: Plan, now: Plan) -> list[str]:
    """What differs between a saved plan and what its arguments give now, e.g. `student.identity.weights`."""
    before, after = (fingerprint(arguments, plan.inputs, plan.recipe, plan.phases) for plan in (saved, now))
    changed = [path for part in before for path in _differences(part, before[part], after[part])]
    # Keys follow from everything else, so they are named only when nothing else explains them.
    causes = [path.removeprefix("inputs.") for path in changed if not path.startswith("phases")]
    return causes or changed


def _differences(path: str, before: object, after: object) -> list[str]:
    if before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        names = dict.fromkeys([*before, *after])
        return [found for name in names for found in _differences(f"{path}.{name}", before.get(name), after.get(name))]
    return [path]

"""The recipe that a tool's arguments ask for: preset, overrides, method and estimator, without contradictions."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from opd_mcp.devices.hardware import Target, target_of
from opd_mcp.identity.models import is_untrained
from opd_mcp.planning.engines import require_engines_used
from opd_mcp.planning.references import ResolvedModel
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.recipes import Method, Preset, Recipe, RuntimeRecipe
from opd_mcp.schemas.requests import PlanDistillation, StartDistillation
from opd_mcp.schemas.resolve import chosen_preset, require_divisible, resolve_recipe
from opd_mcp.schemas.runs import RunKind

Distillation = TypeVar("Distillation", PlanDistillation, StartDistillation)


def usable_recipe(
    preset: Preset,
    overrides: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
    target: Callable[[RuntimeRecipe], Target] | None = None,
) -> Recipe:
    """The resolved recipe, for an available device; `given` holds the recipe keys that the tool's arguments set.

    Raises ArgumentError as `requested_recipe`, or ResourceError `device_unavailable`.
    """
    recipe = requested_recipe(preset, overrides, given or {})
    (target or target_of)(recipe.runtime)
    return recipe


def requested_recipe(preset: Preset, overrides: Mapping[str, Any], given: Mapping[str, Any]) -> Recipe:
    """The preset with the overrides, and with what arguments say by dotted key; None stands for an absent argument.

    Raises ArgumentError: `invalid_argument` where an override contradicts an argument, and as `resolve_recipe`.
    """
    said = {key: value for key, value in given.items() if value is not None}
    require_no_contradiction(overrides, said)
    return resolve_recipe(preset, {**overrides, **said})


def require_no_contradiction(overrides: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Raise ArgumentError `invalid_argument` for an override whose key an argument sets to something else."""
    for key, value in said.items():
        if overrides.get(key, value) != value:
            name = key.rpartition(".")[2]
            raise ArgumentError(
                "invalid_argument",
                f"The override {key}={overrides[key]!r} contradicts the argument {name}={value!r}.",
                value=overrides[key],
                fix=f"Leave out the override and give {name}=….",
            )


def distillation_recipe(arguments: PlanDistillation | StartDistillation) -> Recipe:
    """The resolved recipe of a distillation, with its method and estimator.

    Raises ArgumentError: `invalid_argument` for an override that contradicts an argument or another override, and as
    `resolve_recipe`.
    """
    overrides, estimator = arguments.overrides, arguments.estimator
    require_no_contradiction(overrides, {"distill.method": arguments.method})
    preset: Preset = "quick" if arguments.preset == "auto" else arguments.preset
    recipe = requested_recipe(preset, overrides, {"distill.estimator": estimator})
    recipe = method_recipe(recipe, arguments.method)
    require_divisible(recipe)
    require_engines_used(recipe, arguments.method)
    if "score.topk" in overrides and recipe.score.topk != overrides["score.topk"]:
        raise ArgumentError(
            "invalid_argument",
            f"The override score.topk={overrides['score.topk']!r} contradicts distill.topk={recipe.distill.topk}: "
            f"{estimator} trains on the teacher's top {recipe.distill.topk} tokens.",
            value=overrides["score.topk"],
            fix="Leave out score.topk, or lower distill.topk.",
        )
    return recipe


def fitted_to(arguments: Distillation, student: ResolvedModel) -> tuple[Distillation, str | None]:
    """The arguments with the preset that fits the student where none was named, and why that one."""
    if arguments.preset != "auto":
        return arguments, None
    untrained = student.facts is not None and student.facts.adapter is None and is_untrained(student.facts.path)
    chosen = chosen_preset(student.input.parameters, untrained=untrained)
    update = {"preset": chosen.preset, "overrides": {**chosen.overrides, **arguments.overrides}}
    return arguments.model_copy(update=update), chosen.why


def method_recipe(recipe: Recipe, method: Method) -> Recipe:
    """The recipe for a method; a cache for the top-k estimator holds at least the k that it trains on.

    Raises ArgumentError `invalid_argument` for a live distillation with what needs a cache's scores.
    """
    if method == "sft":
        return recipe
    for key, value, off in (
        ("repair", recipe.distill.repair, "none"),
        ("extrapolation", recipe.distill.extrapolation, 1.0),
        ("rounds", recipe.distill.rounds, 1),
    ):
        if method == "live" and value != off:
            raise ArgumentError(
                "invalid_argument",
                f"distill.{key} works on a teacher cache; live distillation has none.",
                value=value,
                fix=f"Leave out distill.{key}, or use method='lightning'.",
            )
    distill = recipe.distill.model_copy(update={"method": method})
    update: dict[str, object] = {"distill": distill}
    if method == "lightning" and recipe.score.topk < distill.teacher_tokens:
        update["score"] = recipe.score.model_copy(update={"topk": distill.teacher_tokens})
    return recipe.model_copy(update=update)


def kind_of(method: Method) -> RunKind:
    """The kind of a run of a method."""
    return "sft" if method == "sft" else "distill"

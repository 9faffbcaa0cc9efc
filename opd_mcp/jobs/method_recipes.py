"""Recipes with a method and an estimator applied."""

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.recipes import Method, Recipe
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.resolve import resolve_recipe


def distillation_recipe(arguments: PlanDistillation) -> Recipe:
    """The resolved recipe with the method and estimator applied.

    Raises ArgumentError: `unknown_override`, or `invalid_argument` for an override that contradicts an argument.
    """
    for key, argument in (("distill.method", arguments.method), ("distill.estimator", arguments.estimator)):
        if arguments.overrides.get(key, argument) != argument:
            name = key.removeprefix("distill.")
            raise ArgumentError(
                "invalid_argument",
                f"The override {key} contradicts the argument {name}={argument!r}.",
                value=arguments.overrides[key],
                fix=f"Leave out the override and give {name}=….",
            )
    recipe = resolve_recipe(arguments.preset, arguments.overrides)
    recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"estimator": arguments.estimator})})
    return method_recipe(recipe, arguments.method)


def method_recipe(recipe: Recipe, method: Method) -> Recipe:
    """The recipe for a method; a cache for the top-k estimator holds at least the k that it trains on."""
    if method == "sft":
        return recipe
    distill = recipe.distill.model_copy(update={"method": method})
    update: dict[str, object] = {"distill": distill}
    if method == "lightning" and distill.estimator != "sampled" and recipe.score.topk < distill.topk:
        update["score"] = recipe.score.model_copy(update={"topk": distill.topk})
    return recipe.model_copy(update=update)

"""Arms: what a distillation is set against in one call, each a plan of its own with the same settings and seeds.

`live` queries the teacher at every step, with the same estimator, steps and batch. `opsa` is the control without a
teacher: the same rollouts and steps. `sft_more` spends on further SFT what rollouts, scores and training would take.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_mcp.planning.asked_recipes import method_recipe
from opd_mcp.planning.costs.workload import Workload
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.plans import Plan, PlannedArm
from opd_mcp.schemas.recipes import Method, Recipe
from opd_mcp.schemas.requests import Baseline, PlanDistillation
from opd_mcp.schemas.runs import PhaseName

PlanOf = Callable[[PlanDistillation], Plan]
ASKED = "asked"
"""The name of the arm that is the distillation itself."""
ARM_TAG = "arm:"
"""How the tag begins that names the arm of a run."""
OF_A_CACHE = ("distill.repair", "distill.extrapolation", "distill.rounds", "distill.round_trigger")
OF_A_TEACHER = (*OF_A_CACHE[:2], "distill.entropy_share")
CACHE_PHASES: tuple[PhaseName, ...] = ("rollout", "score", "distill")


@dataclass(frozen=True)
class Arm:
    """One run of a comparison: the arm's name, its seed, and the plan's arguments that make it."""

    name: str
    seed: int
    arguments: PlanDistillation

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from the other runs."""
        return {"arm": self.name, "runtime.seed": self.seed}


def has_arms(arguments: PlanDistillation) -> bool:
    """Whether the arguments ask for more than one run."""
    return bool(arguments.baseline) or arguments.seeds > 1


def arms_of(arguments: PlanDistillation, plan: Plan, workload: Workload | None) -> list[Arm]:
    """All runs that the arguments of a plan ask for, those of the first seed first, in it the plan's own.

    Raises ArgumentError `invalid_argument` for a baseline that is the plan's own method, or that cannot be sized.
    """
    each = [(ASKED, arguments), *((name, baseline_of(name, arguments, plan, workload)) for name in arguments.baseline)]
    first = plan.recipe.runtime.seed
    return [
        Arm(name, seed, _with(own, {"runtime.seed": seed}) if seed != first else own)
        for seed in range(first, first + arguments.seeds)
        for name, own in each
    ]


def baseline_of(name: Baseline, arguments: PlanDistillation, plan: Plan, workload: Workload | None) -> PlanDistillation:
    """The arguments of a baseline, without baselines of its own."""
    if arguments.method != "lightning":
        raise ArgumentError(
            "invalid_argument",
            "Baselines are set against a lightning distillation.",
            value=arguments.method,
            fix="Leave out method, or leave out baseline.",
        )
    if name == "live":
        return _with(arguments, {}, OF_A_CACHE, method="live")
    if name == "opsa":
        return _with(arguments, {}, OF_A_TEACHER, estimator="opsa")
    if workload is None:
        raise ArgumentError(
            "invalid_argument",
            "How much SFT costs what this distillation costs is not known while a model is still to be fetched.",
            value=name,
            fix="Fetch the models first, or leave 'sft_more' out.",
        )
    return _with(arguments, {"sft.steps": sft_steps(plan, workload)}, method="sft")


def sft_steps(plan: Plan, workload: Workload) -> int:
    """The steps of an SFT that takes as many FLOPs as rollouts, scores and distillation, after those of the run's SFT.

    FLOPs as the plan counts them, not seconds: measured speeds change, and an arm must stay the same run.
    """
    steps = plan.recipe.sft.steps
    each = workload.work("sft").flops / steps
    spent = sum(workload.work(name).flops for name in CACHE_PHASES)
    before = steps if any(phase.name == "sft" for phase in plan.phases) else 0
    return before + max(1, math.ceil(spent / each))


def with_arms(arguments: PlanDistillation, plan: Plan, workload: Workload | None, plan_of: PlanOf) -> Plan:
    """The plan with a row per arm, and with what stands in the way of one."""
    arms, blocking = [], list(plan.blocking)
    for arm in arms_of(arguments, plan, workload)[: 1 + len(arguments.baseline)]:
        own = plan if arm.name == ASKED else plan_of(arm.arguments)
        seconds = next((estimate.seconds for estimate in own.estimates if estimate.method == own.method), None)
        arms.append(PlannedArm(name=arm.name, runs=arguments.seeds, seconds=seconds))
        known = {finding.code for finding in blocking}
        blocking += [
            finding.model_copy(update={"message": f"Arm '{arm.name}': {finding.message}"})
            for finding in own.blocking
            if finding.code not in known
        ]
    return plan.model_copy(update={"arms": arms, "blocking": blocking})


def compared_recipe(recipe: Recipe, asked: Method, method: Method) -> Recipe:
    """The recipe for a method that a plan sets next to the asked one: without what only a cache's scores allow."""
    if method == "live" != asked:
        plain = {"repair": "none", "extrapolation": 1.0, "rounds": 1}
        recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update=plain)})
    return method_recipe(recipe, method)


def arm_of(tags: Sequence[str]) -> str | None:
    """The arm that a run's tags name."""
    return next((tag.removeprefix(ARM_TAG) for tag in tags if tag.startswith(ARM_TAG)), None)


def _with(
    arguments: PlanDistillation, overrides: Mapping[str, Any], without: Sequence[str] = (), **changes: Any
) -> PlanDistillation:
    kept = {key: value for key, value in arguments.overrides.items() if key not in without}
    alone = {"baseline": [], "seeds": 1}
    return arguments.model_copy(update={**alone, **changes, "overrides": {**kept, **overrides}})

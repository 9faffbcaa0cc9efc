"""Baselines and seeds: which runs one call asks for, and that each arm differs from it in what it is named for."""

import pytest

from opd_mcp.planning.arms import arms_of
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.requests import PlanDistillation


def test_a_plan_has_a_row_per_arm_and_its_arms_share_steps_batch_and_seeds(world, service):
    overrides = {"distill.rounds": 2, "distill.steps": 7, "runtime.seed": 3}
    arguments = world.plan_arguments(baseline=["live", "opsa", "sft_more"], seeds=2, overrides=overrides)
    plan = service.plan(arguments)
    assert plan.blocking == []
    assert [(arm.name, arm.runs) for arm in plan.arms] == [("asked", 2), ("live", 2), ("opsa", 2), ("sft_more", 2)]
    assert all(arm.seconds for arm in plan.arms)
    arms = arms_of(arguments, plan, service.workload(plan))
    assert [(arm.name, arm.seed) for arm in arms[::4]] == [("asked", 3), ("asked", 4)]
    _, live, opsa, sft_more = (service.plan(arm.arguments) for arm in arms[:4])
    for other in (live, opsa):
        assert (other.recipe.distill.steps, other.recipe.distill.batch_size) == (7, plan.recipe.distill.batch_size)
        assert other.recipe.runtime == plan.recipe.runtime
    assert (live.method, live.recipe.distill.estimator, live.recipe.distill.rounds) == ("live", "sampled", 1)
    assert (opsa.method, opsa.recipe.distill.estimator, opsa.recipe.distill.rounds) == ("lightning", "opsa", 2)
    assert sft_more.method == "sft"
    flops = {phase.phase: phase.flops for phase in plan.estimates[0].phases}
    more = next(phase.flops for phase in sft_more.estimates[0].phases if phase.phase == "sft")
    spent = flops["rollout"] + flops["score"] + flops["distill"]
    each = flops["sft"] / plan.recipe.sft.steps
    assert spent <= more - flops["sft"] < spent + each


def test_without_baselines_a_plan_is_what_it_was(world, service):
    plain = service.plan(world.plan_arguments())
    assert plain.arms == []
    assert service.plan(world.plan_arguments(baseline=[], seeds=1)).plan_id == plain.plan_id
    assert service.plan(world.plan_arguments(seeds=2)).plan_id != plain.plan_id


def test_one_baseline_may_be_given_by_its_name():
    given = {"student": "s", "teacher": "t", "prompts": "p"}
    assert PlanDistillation(**given, baseline="live").baseline == ["live"]


def test_a_live_distillation_has_no_baselines_and_neither_has_a_cache(world, service):
    with pytest.raises(ArgumentError, match="against a lightning"):
        service.plan(world.plan_arguments(method="live", baseline="opsa"))
    from_cache = world.start_arguments(baseline="live").model_copy(update={"cache_id": "cache-1"})
    with pytest.raises(ArgumentError, match="runs of their own"):
        service.start_distillation(from_cache)

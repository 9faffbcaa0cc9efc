"""A plan says what is known of Δ and the engine gap before anything runs, on what basis, and why the rest is absent."""

import pytest

from opd_mcp.schemas.requests import StartDistillation
from opd_mcp.server.render.plans import plan_text

SHORT = {"sft.steps": 3, "distill.steps": 3}


def codes(plan):
    return {warning.code: warning.message for warning in plan.warnings}


@pytest.fixture
def built(service, world, finished, sft_student):
    """(student, cache id): a cache of that student's rollouts, scored by the teacher that it was fine-tuned on."""
    student = sft_student(world.teacher)
    started = service.build_teacher_cache(world.cache_arguments(student))
    assert finished(service, started.run_id).state == "succeeded"
    return student, started.cache_id


def test_the_same_proven_weights_make_delta_zero_by_construction(service, world, sft_student):
    for changes in ({}, {"student": sft_student(world.teacher)}):
        verdict = service.plan(world.plan_arguments(**changes)).consistency
        assert (verdict.teacher_delta.basis, verdict.teacher_delta.mean_abs) == ("by_construction", 0)
        assert verdict.teacher_delta.tokens == 0, "nothing was measured"
        assert verdict.engine_gap is None
        assert verdict.not_measured == "engine_gap (measured when the cache is built)"
        assert verdict.measured_in is None


def test_what_is_only_asserted_is_not_zero_but_measured_when_the_teacher_s_files_are_here(service, world):
    here = service.plan(world.plan_arguments(declared_teacher=world.teacher))
    assert here.consistency.teacher_delta is None
    assert here.consistency.not_measured == (
        "teacher_delta (measured when the cache is built), engine_gap (measured when the cache is built)"
    )
    name_only = service.plan(world.plan_arguments(declared_teacher="teacher")).consistency
    assert name_only.not_measured.startswith("teacher_delta (the SFT teacher's files are not at hand), engine_gap")
    assert "not known: teacher_delta (measured when the cache is built), engine_gap" in plan_text(here)


def test_the_plan_s_own_cache_says_what_its_building_measured(service, world, finished):
    arguments = world.plan_arguments()
    run = service.start_distillation(StartDistillation(**arguments.model_dump()))
    assert finished(service, run.run_id).state == "succeeded"
    plan = service.plan(arguments)
    scored = next(phase.satisfied_by for phase in plan.phases if phase.name == "score")
    assert plan.consistency.measured_in == scored
    assert plan.consistency.engine_gap.largest == 0.001
    assert plan.consistency.not_measured is None
    assert (plan.rollouts.truncated_fraction, plan.rollouts.empty_responses) == (0.5, 2)
    assert f"50% of the rollouts in {scored} have no end" in codes(plan)["rollouts_truncated"]
    assert f"2 of 6 rollouts in {scored} hold no token but the end" in codes(plan)["rollouts_empty"]
    text = plan_text(plan)
    assert "teacher delta: 0 by construction, since teacher and SFT teacher have the same weights" in text
    assert "engine gap: mean 0.0001, largest 0.001 nats over 10 tokens" in text
    assert f"rollouts in {scored}, where these were measured: 6 rows of 1 tokens, truncated 50.0%, empty 2" in text


def test_another_recipe_is_shown_what_the_newest_cache_of_the_same_models_measured(service, world, finished, built):
    student, first = built
    other = world.plan_arguments(student=student, overrides={"rollout.count": 3})
    plan = service.plan(other)
    assert not any(phase.satisfied_by for phase in plan.phases)
    assert plan.consistency.measured_in == first
    assert plan.consistency.engine_gap.tokens == 10
    second = service.build_teacher_cache(world.cache_arguments(student, overrides={"rollout.count": 4}))
    assert finished(service, second.run_id).state == "succeeded"
    assert service.plan(other).consistency.measured_in == second.cache_id


def test_a_cache_of_other_models_is_not_asked(service, world, sft_student, built):
    student, _ = built
    allowed = {"allow_teacher_mismatch": True, "teacher": world.other_teacher}
    assert service.plan(world.plan_arguments(student=student, **allowed)).consistency.measured_in is None
    assert service.plan(world.plan_arguments(student=sft_student(world.other_teacher), **allowed)).rollouts is None


def test_a_cache_that_cannot_be_read_is_passed_over(service, world, built):
    student, cache = built
    (world.root / "home" / "artifacts" / "cache" / cache / "manifest.json").write_text("{}")
    plan = service.plan(world.plan_arguments(student=student, overrides={"rollout.count": 3}))
    assert plan.consistency.measured_in is None
    assert plan.blocking == []


def test_a_live_run_has_nothing_to_measure_them_on(service, world):
    verdict = service.plan(world.plan_arguments(method="live", declared_teacher=world.teacher)).consistency
    assert verdict.not_measured.count("a live run builds no cache") == 2
    assert service.plan(world.plan_arguments(method="sft")).consistency.not_measured is None

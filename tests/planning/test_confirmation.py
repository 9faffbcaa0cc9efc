"""Which starts the user must agree to first."""

import pytest

from opd_mcp.planning.confirmation import is_confirmed
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.requests import StartDistillation

MANY_HOURS = 1000.0


def test_a_cheap_consistent_plan_is_not_asked_about(world, service):
    assert service.start_question(world.start_arguments(), MANY_HOURS) is None


def test_a_plan_above_the_threshold_is_asked_about_by_its_id(world, service):
    arguments = world.plan_arguments()
    plan = service.plan(arguments)
    for start in (StartDistillation(plan_id=plan.plan_id), StartDistillation(**arguments.model_dump())):
        question = service.start_question(start, 0.0)
        assert question.confirm == plan.plan_id
        assert "hours" in question.text


def test_another_teacher_than_the_sft_teacher_is_asked_about(world, service, sft_student):
    student = sft_student(world.other_teacher)
    allowed = world.start_arguments(student=student, allow_teacher_mismatch=True)
    question = service.start_question(allowed, MANY_HOURS)
    assert "teacher_other_style@" in question.text
    assert "teacher@" in question.text
    # Without the permission the plan is blocked, and the start says so by itself.
    assert service.start_question(world.start_arguments(student=student), MANY_HOURS) is None


def test_a_cache_with_a_mismatch_is_asked_about_by_the_id_it_will_have(world, service, sft_student):
    student = sft_student(world.other_teacher)
    question = service.cache_question(world.cache_arguments(student, allow_teacher_mismatch=True))
    assert question.confirm.startswith("cache-")
    assert service.cache_question(world.cache_arguments(sft_student(world.teacher))) is None


def test_the_same_request_asks_the_same(world, service):
    questions = {service.start_question(world.start_arguments(), 0.0) for _ in range(2)}
    assert len(questions) == 1


def test_only_the_id_itself_confirms(world, service):
    question = service.start_question(world.start_arguments(), 0.0)
    assert is_confirmed(question, question.confirm)
    assert not is_confirmed(question, None)
    with pytest.raises(ArgumentError):
        is_confirmed(question, "yes")

"""Whether a run fits: refused with numbers before it starts, on the device that it would take."""

import pytest

from opd_mcp.devices.hardware import Target
from opd_mcp.planning.admission import memory_shortage, with_claims
from opd_mcp.schemas.errors import OpdError, ResourceError
from opd_mcp.schemas.requests import GenerateTeacherResponses

AUTO = {"runtime.device": "auto"}


def responses(world, **changes) -> GenerateTeacherResponses:
    return GenerateTeacherResponses(teacher=world.teacher, prompts=world.prompts(), preset="demo", **changes)


def test_a_start_that_does_not_fit_is_refused_with_the_numbers_and_the_override(world, service, gpu):
    gpu(total=400, free=300)
    with pytest.raises(ResourceError, match=r"not_enough_memory.*needs about \d+ MiB.*Tiny has 300 MiB free"):
        service.generate_teacher_responses(responses(world, overrides=AUTO))
    assert service.list_runs().total == 0
    plan = service.plan(world.plan_arguments(overrides=AUTO))
    [shortage] = plan.blocking
    assert (shortage.code, "distill.micro_batch_tokens" in shortage.fix) == ("not_enough_memory", True)
    with pytest.raises(OpdError, match=r"plan_blocked.*300 MiB"):
        service.start_distillation(world.start_arguments(overrides=AUTO))


def test_what_the_holder_of_the_gpu_has_taken_is_not_missing(world, service, leases, gpu):
    gpu(total=80_000, free=300)
    assert service.plan(world.plan_arguments(overrides=AUTO)).blocking
    lease = leases.acquire("another-run", ["gpu-GPU-1a"], 1, lambda: False)
    assert not service.plan(world.plan_arguments(overrides=AUTO)).blocking
    lease.release()


def test_on_the_cpu_active_runs_claim_what_they_do_not_hold_yet(world, service, busy_machine):
    target = Target("cpu", "1 CPU thread", 1 << 30)
    assert with_claims(target, service.store, 2).claimed == 0
    run = service.generate_teacher_responses(responses(world))
    expected = service.store.record(run.run_id).expected_memory_bytes
    assert 0 < with_claims(target, service.store, 2).claimed <= expected
    assert with_claims(target, service.store, 1).claimed == 0, "with one slot nobody works beside"
    service.cancel(run.run_id)


def test_the_words_of_a_shortage_name_needed_free_and_claimed():
    target = Target("cpu", "1 CPU thread", 8 << 30, claimed=3 << 30)
    assert memory_shortage(5 << 30, target) is None
    said = memory_shortage((5 << 30) + 1, target).message
    assert "needs about 5 GiB" in said
    assert "has 8 GiB free, and active runs are expected to take 3 GiB more" in said

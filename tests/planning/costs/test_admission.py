"""Whether a run fits: refused with numbers before it starts, on the device that it would take."""

import pytest

from opd_mcp.devices.hardware import Target
from opd_mcp.devices.leases import Wish
from opd_mcp.planning.costs.admission import SHORT_SECONDS, is_short, memory_shortage, short_admission, with_claims
from opd_mcp.schemas.errors import OpdError, ResourceError
from opd_mcp.schemas.requests import GenerateTeacherResponses, SampleModel

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
    assert with_claims(target, service.store, 1).claimed == 0, "with one slot no other run works"
    service.cancel(run.run_id)


def test_the_words_of_a_shortage_name_needed_free_and_claimed():
    target = Target("cpu", "1 CPU thread", 8 << 30, claimed=3 << 30)
    assert memory_shortage(5 << 30, target) is None
    said = memory_shortage((5 << 30) + 1, target).message
    assert "needs about 5 GiB" in said
    assert "has 8 GiB free, and active runs are expected to take 3 GiB more" in said


@pytest.fixture
def sample_record(world, service, busy_machine):
    """The record of a queued run that samples a small model."""
    run_id = service.sample_model(SampleModel(model=world.student, prompts=["1+1=?"])).run_id
    yield service.store.record(run_id)
    service.cancel(run_id)


def test_short_is_a_sample_or_an_export_of_known_size_that_ends_soon(world, service, sample_record):
    assert is_short(sample_record)
    export = sample_record.request.model_copy(update={"kind": "export"})
    assert is_short(sample_record.model_copy(update={"request": export}))
    for change in (
        {"expected_seconds": SHORT_SECONDS + 1},
        {"expected_seconds": None},
        {"expected_memory_bytes": None},
        {"request": sample_record.request.model_copy(update={"kind": "benchmark"})},
    ):
        assert not is_short(sample_record.model_copy(update=change))


MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "admitted"),
    [
        ((40_000, 79_000, 30_000), True),
        ((40_000, 79_000, 40_000), False),  # the holder has not taken yet what it will need
        ((40_000, 20_000, 30_000), False),  # somebody else's program has
        ((None, 79_000, 30_000), False),  # nobody knows what the holder will need
    ],
)
def test_a_gpu_admits_a_short_run_next_to_its_holder_where_both_fit(service, sample_record, gpu, sizes, admitted):
    holder_needs, free, wanted = sizes
    leases = service.leases
    gpu(total=80_000, free=free)
    needs = None if holder_needs is None else holder_needs * MIB
    lease = leases.acquire_any("long", [Wish(["gpu-GPU-1a"])], lambda: False, needs)
    record = sample_record.model_copy(update={"expected_memory_bytes": wanted * MIB})
    assert short_admission(service.store, record, leases)("short-gpu-GPU-1a") is admitted
    lease.release()


def test_the_cpu_admits_a_short_run_that_fits_and_no_other(service, sample_record, leases):
    assert short_admission(service.store, sample_record, leases)("short-cpu")
    record = sample_record.model_copy(update={"expected_memory_bytes": 1 << 60})
    assert not short_admission(service.store, record, leases)("short-cpu")

"""What a resume is refused for: too little memory, disk or quota for the phases that are left."""

import pytest

from opd_mcp.devices.hardware import Target
from opd_mcp.identity.models import inspect_model
from opd_mcp.planning.costs.estimates import estimate_of
from opd_mcp.planning.costs.run_workload import expected_disk
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.workspace import SETTINGS_FILE
from opd_mcp.supervisor import launch
from opd_mcp.supervisor.launch import with_phases_left

AUTO = {"runtime.device": "auto"}
CPU = Target("cpu", "1 CPU thread", 1 << 40)
TIB = 1 << 40


@pytest.fixture
def cancelled(service, leases, finished):
    """`cancelled(start, arguments)`: the id of a run that was started, and cancelled while it was queued."""

    def make(start, arguments) -> str:
        lease = leases.acquire("somebody-else", leases.cpu_slot_names(), 2, lambda: False)
        run_id = start(arguments).run_id
        service.cancel(run_id)
        assert finished(service, run_id).state == "cancelled"
        lease.release()
        return run_id

    return make


@pytest.fixture
def half_done(world, service, until, finished):
    """The id of a run that was cancelled in its distillation, after responses, SFT and the cache."""
    run_id = service.start_distillation(world.start_arguments(overrides={"distill.steps": 500})).run_id
    until(service, run_id, lambda status: status.phase == "distill")
    service.cancel(run_id)
    assert finished(service, run_id).state == "cancelled"
    return run_id


def not_begun(service, run_id) -> bool:
    view = service.store.view(run_id)
    return (view.state, view.attempt) == ("cancelled", 1)


def test_a_resume_that_does_not_fit_into_memory_is_refused_as_a_start_is(world, service, gpu, cancelled, finished):
    gpu(total=80_000, free=80_000)
    run_id = cancelled(service.start_distillation, world.start_arguments(overrides=AUTO))
    gpu(total=400, free=300)
    with pytest.raises(ResourceError, match=r"not_enough_memory.*needs about \d+ MiB.*has 300 MiB") as caught:
        service.resume(run_id)
    assert (caught.value.call.tool, "once memory is free" in caught.value.fix) == ("resume_run", True)
    assert not_begun(service, run_id)
    gpu(total=80_000, free=80_000)
    service.resume(run_id)
    assert finished(service, run_id).state == "succeeded"


def test_a_start_that_does_not_fit_on_the_disk_is_refused(world, service, sft_student):
    student = sft_student(world.teacher)
    runs = service.list_runs().total
    with pytest.raises(ResourceError, match=r"not_enough_disk.*writes up to \d.*TiB.*rollout.count"):
        service.build_teacher_cache(world.cache_arguments(student, overrides={"rollout.count": 10**12}))
    assert service.list_runs().total == runs


def test_a_resume_that_does_not_fit_on_the_disk_is_refused(world, service, cancelled, monkeypatch):
    run_id = cancelled(service.start_distillation, world.start_arguments())
    monkeypatch.setattr(launch, "free_disk", lambda path: 1)
    with pytest.raises(ResourceError, match=r"not_enough_disk.*writes up to .* has 1 B free") as caught:
        service.resume(run_id)
    assert "opd-mcp gc" in caught.value.fix
    assert not_begun(service, run_id)


def test_only_the_phases_that_are_left_count(service, half_done):
    record = service.store.record(half_done)
    assert not any(phase.satisfied_by for phase in record.request.phases)
    left = with_phases_left(record, service.store.artifacts)
    estimate = estimate_of(left.request, CPU, [], inspect_model)
    assert [phase.phase for phase in estimate.phases] == ["process_start", "distill", "benchmark"]


def test_the_size_quota_counts_the_phases_that_are_left(service, half_done, finished):
    request = service.store.record(half_done).request
    left = sum(expected_disk(name, request.recipe, request.inputs) for name in ("distill", "benchmark"))
    settings = service.workspace.root / SETTINGS_FILE
    settings.write_text(f"[quotas]\nmax_bytes = {tree_bytes(service.workspace.root) + left // 2}\n")
    with pytest.raises(ResourceError, match="quota_exceeded"):
        service.resume(half_done)
    settings.write_text(f"[quotas]\nmax_bytes = {tree_bytes(service.workspace.root) + left + (1 << 20)}\n")
    service.resume(half_done)
    assert finished(service, half_done).state == "succeeded"


def test_checkpoints_that_are_there_are_not_written_again(service, half_done, monkeypatch, finished):
    monkeypatch.setattr(launch, "free_disk", lambda path: 1)
    with pytest.raises(ResourceError, match="not_enough_disk"):
        service.resume(half_done)
    checkpoint = service.workspace.run(half_done) / "checkpoints" / "distill" / "weights"
    checkpoint.parent.mkdir(exist_ok=True)
    with checkpoint.open("wb") as file:
        file.truncate(2 * TIB)  # a hole: it is the length that counts
    service.resume(half_done)
    assert finished(service, half_done).state == "succeeded"

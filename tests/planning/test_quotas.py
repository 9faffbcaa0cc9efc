"""Quotas refuse a start with numbers, and stop a run that goes beyond them."""

import time
from pathlib import Path

import psutil
import pytest

from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.schemas.next_action import next_call
from opd_mcp.schemas.reports import CheckpointRecord
from opd_mcp.schemas.requests import StartDistillation
from opd_mcp.server.render.workspace import setup_text
from opd_mcp.store.journal import read_journal
from opd_mcp.store.run_view import seconds_of
from opd_mcp.store.runs import JOURNAL_FILE
from opd_mcp.store.worker_process import WORKER_FILE, WorkerProcess
from opd_mcp.store.workspace import SETTINGS_FILE, read_settings


def settle(service, text):
    (service.workspace.root / SETTINGS_FILE).write_text(text)


def refused(service, arguments):
    with pytest.raises(ResourceError) as caught:
        service.start_distillation(arguments)
    assert caught.value.code == "quota_exceeded"
    return caught.value


def test_without_a_file_there_are_no_quotas(service):
    assert service.setup().quotas.to_dict() == {}


def test_set_quotas_are_shown(service):
    settle(service, "[quotas]\nmax_running_runs = 3\n")
    assert "quota: max_running_runs = 3" in setup_text(service.setup())


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("[quotas]\nmax_runing_runs = 3\n", "unknown_setting", "quotas.max_running_runs"),
        ("[quota]\n", "unknown_setting", "quotas"),
        ("[quotas]\nmax_bytes = 'many'\n", "invalid_setting", "max_bytes"),
        ("quotas = 3\n", "invalid_setting", "quotas"),
        ("[quotas\n", "invalid_setting", "not TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_way_out(service, text, code, told):
    settle(service, text)
    with pytest.raises(ArgumentError) as caught:
        read_settings(service.workspace)
    assert caught.value.code == code
    assert told in str(caught.value)


def test_more_runs_than_set_are_refused_and_the_same_run_is_not(world, service, busy_machine):
    settle(service, "[quotas]\nmax_running_runs = 1\n")
    first = service.start_distillation(world.start_arguments())
    error = refused(service, world.start_arguments(teacher=world.other_teacher))
    assert error.message == f"{first.run_id} is active, and max_running_runs lets 1 be active at a time."
    assert error.value == "1"
    assert first.run_id in error.fix
    assert service.start_distillation(world.start_arguments()).reused
    service.cancel(first.run_id)


def test_a_plan_foretells_the_quota_that_its_start_would_break(world, service, busy_machine):
    settle(service, "[quotas]\nmax_running_runs = 1\n")
    before = service.plan(world.plan_arguments())
    first = service.start_distillation(world.start_arguments())
    plan = service.plan(world.plan_arguments(teacher=world.other_teacher))
    [finding] = [warning for warning in plan.warnings if warning.code == "quota_exceeded"]
    assert finding.message == f"{first.run_id} is active, and max_running_runs lets 1 be active at a time."
    assert plan.next_action == finding.call.with_why(finding.fix)
    assert finding.call == next_call("start_distillation", plan_id=plan.plan_id)
    assert refused(service, StartDistillation(plan_id=plan.plan_id)).message == finding.message
    assert "quota_exceeded" not in [warning.code for warning in before.warnings]
    service.cancel(first.run_id)


def test_a_plan_whose_run_is_active_warns_of_no_quota(world, service, busy_machine):
    settle(service, "[quotas]\nmax_running_runs = 1\n")
    plan = service.plan(world.plan_arguments())
    run = service.start_distillation(StartDistillation(plan_id=plan.plan_id))
    assert "quota_exceeded" not in [warning.code for warning in service.plan(world.plan_arguments()).warnings]
    assert service.start_distillation(StartDistillation(plan_id=plan.plan_id)).reused
    service.cancel(run.run_id)


def test_a_plan_foretells_hours_and_bytes_with_the_numbers(world, service):
    settle(service, "[quotas]\nmax_gpu_hours = 1e-9\nmax_bytes = 10\n")
    told = [warning.message for warning in service.plan(world.plan_arguments()).warnings]
    assert any("max_gpu_hours is 1e-09" in message for message in told)
    assert any("max_bytes is 10" in message for message in told)


def test_a_run_that_is_too_long_or_too_large_is_refused_and_leaves_nothing(world, service):
    settle(service, "[quotas]\nmax_gpu_hours = 1e-9\n")
    assert "max_gpu_hours is 1e-09" in refused(service, world.start_arguments()).message
    settle(service, "[quotas]\nmax_bytes = 10\n")
    assert "max_bytes is 10" in refused(service, world.start_arguments()).message
    assert service.list_runs().total == 0


def test_a_run_beyond_its_hours_stops_and_goes_on_when_more_are_set(world, service, until, finished, busy_machine):
    run_id = service.start_distillation(world.start_arguments()).run_id
    settle(service, "[quotas]\nmax_gpu_hours = 1e-9\n")
    busy_machine.release()
    status = finished(service, run_id)
    assert (status.state, status.error.code) == ("failed", "quota_exceeded")
    with pytest.raises(ResourceError, match="quota_exceeded"):
        service.resume(run_id)
    settle(service, "[quotas]\nmax_gpu_hours = 10\nmax_running_runs = 1\n")
    service.resume(run_id)
    assert finished(service, run_id).state == "succeeded"


def records(service, run_id, type):
    journal = read_journal(service.workspace.run(run_id) / JOURNAL_FILE)
    return [record for record in journal if record.type == type]


def series(service, run_id):
    """Loss and gradient norm by step, as the newest attempt that took the step told them."""
    metrics = [record.data for record in records(service, run_id, "metric")]
    return {data["step"]: (data["values"]["loss"], data["values"]["gradient_norm"]) for data in metrics}


def weights(status):
    return (Path(status.result["paths"]["sft"]) / "model.safetensors").read_bytes()


def test_a_real_training_beyond_its_hours_leaves_a_checkpoint_and_ends_as_if_it_had_not_been_stopped(
    world, real_service, undisturbed_service, leases, until, finished
):
    arguments = world.sft_arguments(**{"sft.steps": 400, "sft.batch_size": 2})
    other = undisturbed_service.start_sft(arguments).run_id
    whole = finished(undisturbed_service, other)
    assert whole.state == "succeeded"
    begun = seconds_of(records(undisturbed_service, other, "state")[1].time)
    first_step = seconds_of(records(undisturbed_service, other, "metric")[0].time)
    allowed = 2 * (first_step - begun) + 3.0  # the training begins within it, on a machine half as fast as well

    lease = leases.acquire("somebody-else", leases.cpu_slot_names(), 2, lambda: False)
    run_id = real_service.start_sft(arguments).run_id
    settle(real_service, f"[quotas]\nmax_gpu_hours = {allowed / 3600}\n")
    lease.release()
    until(real_service, run_id, lambda status: status.phase == "sft" and status.progress and status.progress.done)
    directory = real_service.workspace.run(run_id)
    worker = psutil.Process(WorkerProcess.from_json((directory / WORKER_FILE).read_bytes()).pid)
    worker.suspend()  # in the middle of its training, until its time is over
    over = seconds_of(records(real_service, run_id, "state")[1].time) + allowed + 0.5
    while time.time() < over:
        time.sleep(0.05)
    worker.resume()
    stopped = finished(real_service, run_id)
    assert (stopped.state, stopped.error.code) == ("failed", "quota_exceeded")
    assert f"max_gpu_hours is {allowed / 3600}" in stopped.error.cause
    last = max(series(real_service, run_id))
    assert 0 < last < 400
    checkpoint = max((directory / "checkpoints" / "sft").glob("step-*"))
    assert CheckpointRecord.from_json((checkpoint / "checkpoint.json").read_bytes()).state.step == last

    with pytest.raises(ResourceError, match="quota_exceeded"):
        real_service.resume(run_id)
    settle(real_service, "[quotas]\nmax_gpu_hours = 1\n")
    real_service.resume(run_id)
    resumed = finished(real_service, run_id)
    assert resumed.state == "succeeded", resumed
    [went_on] = [r.data["step"] for r in records(real_service, run_id, "phase") if r.data["event"] == "resumed"]
    assert went_on == last, "nothing was computed twice"
    assert weights(resumed) == weights(whole)
    assert series(real_service, run_id) == series(undisturbed_service, other)

"""Quotas refuse a start with numbers, and stop a run that goes beyond them."""

import pytest

from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.schemas.requests import StartDistillation
from opd_mcp.server.texts import setup_text
from opd_mcp.store.settings import SETTINGS_FILE, read_settings


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
    assert plan.next_action == finding.fix
    assert f"then call start_distillation(plan_id='{plan.plan_id}')" in finding.fix
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

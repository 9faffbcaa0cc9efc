"""What an agent reads first."""

from pathlib import Path

import pytest

from opd_mcp.maintenance.doctor import checks
from opd_mcp.schemas.next_action import next_call
from opd_mcp.server.render.workspace import setup_text


def test_setup_names_the_machine_the_roots_and_the_example(service, world, busy_machine):
    report = service.setup()
    cpu = report.devices[-1]
    assert (cpu.kind, cpu.slots, cpu.slots_busy) == ("cpu", 2, 2)
    assert 0 < cpu.free_memory_bytes <= cpu.total_memory_bytes
    assert report.workspace in report.allowed_roots
    assert str(world.root / "data") in report.allowed_roots
    assert all(Path(path).exists() for path in report.example.to_dict().values())
    assert report.example.teacher in report.next_action.arguments.values()


def test_active_runs_are_listed(service, world, busy_machine):
    run = service.start_distillation(world.start_arguments())
    assert [(active.run_id, active.state) for active in service.setup().active_runs] == [(run.run_id, "queued")]
    service.cancel(run.run_id)


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("[quotas]\nmax_running_run = 1\n", "unknown_setting", "quotas.max_running_run"),
        ("[quotas\n", "invalid_setting", "not TOML"),
    ],
)
def test_settings_that_cannot_be_read_are_a_part_of_the_answer_in_the_doctor_s_words(service, text, code, told):
    whole = service.setup()
    assert (whole.problem, "problem" in whole.to_dict()) == (None, False)
    (service.workspace.root / "settings.toml").write_text(text)
    report = service.setup()
    assert report.problem.code == code
    assert told in report.problem.message
    doctor = next(check for check in checks(service) if check.name == "settings")
    assert (report.problem.message, report.problem.fix) == (doctor.found, doctor.fix)
    assert report.example == whole.example
    assert report.next_action == next_call("inspect_setup", f"Resolve {code} and look again: {doctor.fix}")
    assert f"PROBLEM [{code}] {doctor.found} Fix: {doctor.fix}" in setup_text(report)

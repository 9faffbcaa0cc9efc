"""What an agent reads first."""

from pathlib import Path


def test_setup_names_the_machine_the_roots_and_the_example(service, world, busy_machine):
    report = service.setup()
    cpu = report.devices[-1]
    assert (cpu.kind, cpu.slots, cpu.slots_busy) == ("cpu", 2, 2)
    assert 0 < cpu.free_memory_bytes <= cpu.total_memory_bytes
    assert report.workspace in report.allowed_roots
    assert str(world.root / "data") in report.allowed_roots
    assert all(Path(path).exists() for path in report.example.to_dict().values())
    assert report.example.teacher in report.next_action


def test_active_runs_are_listed(service, world, busy_machine):
    run = service.start_distillation(world.start_arguments())
    assert [(active.run_id, active.state) for active in service.setup().active_runs] == [(run.run_id, "queued")]
    service.cancel(run.run_id)

"""The watch over training steps: what is a stall and what is not, and one in a real worker."""

import dataclasses
import threading

import pytest

from opd_mcp.store.journal import read_journal
from opd_mcp.worker.watchdog import Pulse, WatchSettings, watching

SETTINGS = WatchSettings(floor=0.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pulse(clock) -> Pulse:
    """The pulse of a phase with six steps of one second each."""
    pulse = Pulse(clock)
    for second in range(7):
        clock.now = float(second)
        pulse.beat()
    return pulse


def test_a_step_of_ten_medians_is_told_once(pulse, clock):
    clock.now += 9.9
    assert pulse.new_stall(SETTINGS) is None
    clock.now += 0.1
    stall = pulse.new_stall(SETTINGS)
    assert (stall.seconds, stall.median) == (10.0, 1.0)
    clock.now += 100
    assert pulse.new_stall(SETTINGS) is None, "the same stall"
    pulse.beat()
    clock.now += 10
    assert pulse.new_stall(SETTINGS) is not None, "the next one"


def test_short_steps_may_take_the_floor(pulse, clock):
    clock.now += 19
    assert pulse.new_stall(WatchSettings(floor=20.0)) is None


@pytest.mark.parametrize("quiet", [Pulse.pause, Pulse.reset])
def test_a_checkpoint_or_another_phase_is_no_step(pulse, clock, quiet):
    quiet(pulse)
    clock.now += 1000
    assert pulse.new_stall(SETTINGS) is None
    pulse.beat()
    clock.now += 5
    pulse.beat()
    clock.now += 9
    assert pulse.new_stall(SETTINGS) is None, "the time of the checkpoint is in no median"


def test_few_steps_say_nothing(clock):
    pulse = Pulse(clock)
    for second in range(SETTINGS.steps):
        clock.now = float(second)
        pulse.beat()
    clock.now += 1000
    assert pulse.new_stall(SETTINGS) is None


def test_the_stacks_show_where_all_threads_are(pulse, clock, capfd, caplog):
    told = threading.Event()
    clock.now += 10
    with watching(pulse, lambda code, message: told.set(), WatchSettings(floor=0.0, poll=0.001)):
        assert told.wait(10)
    assert "Step stalled for 10.0 s" in caplog.text
    assert "test_the_stacks_show_where_all_threads_are" in capfd.readouterr().err


def test_a_worker_that_stands_still_says_so_and_where(world, until, finished):
    settings = world.settings
    command = (*settings.worker_command, "--stall-seconds", "0.5")
    service = dataclasses.replace(world, settings=dataclasses.replace(settings, worker_command=command)).service()
    overrides = {"sft.steps": 8, "sft.optimizer.learning_rate": 555.0}
    run_id = service.start_distillation(world.start_arguments(method="sft", overrides=overrides)).run_id
    status = until(service, run_id, lambda status: "step_stalled" in [alert.code for alert in status.alerts])
    assert status.state == "running"
    [stalled] = [alert for alert in status.alerts if alert.code == "step_stalled"]
    assert "the median is 0.0" in stalled.message
    service.cancel(run_id)
    finished(service, run_id)
    directory = service.workspace.run(run_id)
    assert "in stand_still" in (directory / "worker.log").read_text()
    told = [record.data["code"] for record in read_journal(directory / "journal.jsonl") if record.type == "alert"]
    assert told.count("step_stalled") == 1

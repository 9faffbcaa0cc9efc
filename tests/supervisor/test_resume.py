"""Resuming: the same run goes on as its next attempt, and nothing of an earlier one counts any more."""

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.requests import SampleModel
from opd_mcp.server.render.runs import result_lines
from opd_mcp.store.journal import read_journal

LONG = {"sft.steps": 100_000}
BRIEF = {"sft.steps": 200}


def worker_of(run_id: str) -> psutil.Process:
    """The worker process of a run, the latest one."""
    found = [process for process in psutil.process_iter(["cmdline"]) if run_id in (process.info["cmdline"] or [])]
    return max(found, key=psutil.Process.create_time)


def in_sft(status) -> bool:
    return status.phase == "sft" and status.progress is not None


def test_a_lost_run_goes_on_under_its_id(world, service, until, finished):
    run_id = service.start_distillation(world.start_arguments(overrides=BRIEF)).run_id
    until(service, run_id, in_sft)
    worker_of(run_id).kill()
    assert finished(service, run_id).state == "lost"
    resumed = world.service().resume(run_id)
    assert (resumed.run_id, resumed.state, resumed.reused, resumed.error) == (run_id, "queued", False, None)
    status = finished(service, run_id)
    assert (status.state, status.error) == ("succeeded", None)
    assert [row.run_id for row in service.list_runs().rows] == [run_id]
    records = read_journal(service.workspace.run(run_id) / "journal.jsonl")
    assert {record.attempt for record in records} == {1, 2}


def test_phases_that_the_run_itself_finished_are_not_told_as_reused(world, service, until, finished):
    arguments = world.start_arguments(overrides={"distill.steps": 200})
    run_id = service.start_distillation(arguments).run_id
    until(service, run_id, lambda status: status.phase == "distill")
    service.cancel(run_id)
    finished(service, run_id)
    service.resume(run_id)
    status = finished(service, run_id)
    stages = ["generate_responses", "sft", "rollout", "score", "distill", "benchmark"]
    assert [(cost["stage"], cost["reused"]) for cost in status.result["costs"]] == [(name, False) for name in stages]
    assert not any("reused" in line for line in result_lines(status.result))
    [shown] = service.dashboard([run_id]).runs
    assert [(cost.stage, cost.reused) for cost in shown.costs] == [(name, False) for name in stages]
    other = finished(service, service.start_distillation(world.start_arguments(overrides={"distill.steps": 3})).run_id)
    reused = {cost["stage"] for cost in other.result["costs"] if cost["reused"]}
    assert reused == {"generate_responses", "sft", "rollout", "score"}, "another run's work"


def test_a_cancelled_run_forgets_the_request_to_stop(world, service, until, finished):
    run_id = service.start_distillation(world.start_arguments(overrides=BRIEF)).run_id
    until(service, run_id, in_sft)
    service.cancel(run_id)
    status = finished(service, run_id)
    assert (status.state, status.next_action.call_text()) == ("cancelled", f"Call resume_run(run_id='{run_id}')")
    assert [row.state for row in service.list_runs().rows] == ["cancelled"]
    service.resume(run_id)
    assert [row.state for row in service.list_runs().rows] in (["queued"], ["running"])
    assert finished(service, run_id).state == "succeeded"


def test_an_active_run_is_answered_as_it_is_and_a_finished_one_is_refused(world, service, until, finished):
    run_id = service.start_distillation(world.start_arguments(overrides=BRIEF)).run_id
    until(service, run_id, in_sft)
    again = service.resume(run_id)
    assert (again.reused, again.state) == (True, "running")
    finished(service, run_id)
    with pytest.raises(RunError, match=r"run_not_active.*succeeded"):
        service.resume(run_id)


def test_bad_input_keeps_its_own_way_out(world, service, busy_machine, finished):
    run_id = service.start_distillation(world.start_arguments()).run_id
    world.prompts(count=7)
    busy_machine.release()
    status = finished(service, run_id)
    assert (status.state, status.error.code, status.next_action.why) == ("failed", "input_changed", status.error.fix)


def test_a_run_is_not_resumed_beside_another_one_of_its_request(world, service, busy_machine, until, finished):
    arguments = world.start_arguments()
    first = service.start_distillation(arguments).run_id
    service.cancel(first)
    finished(service, first)
    second = service.start_distillation(arguments).run_id
    with pytest.raises(RunError, match=rf"same_request_active.*{second}"):
        service.resume(first)
    service.cancel(second)


def test_each_attempt_writes_its_samples_into_a_folder_of_its_own(world, service, busy_machine, finished):
    run_id = service.sample_model(SampleModel(model=world.student, prompts=["1+1=?"])).run_id
    service.cancel(run_id)
    assert finished(service, run_id).state == "cancelled"
    busy_machine.release()
    service.resume(run_id)
    samples = Path(finished(service, run_id).result["paths"]["samples"])
    assert samples == service.workspace.run(run_id) / "sample-2" / "samples.json"
    assert samples.is_file()


def test_a_suspended_worker_that_wakes_after_a_resume_writes_nothing(world, service, until, finished):
    run_id = service.start_distillation(world.start_arguments(overrides=BRIEF)).run_id
    until(service, run_id, in_sft)
    old, directory = worker_of(run_id), service.workspace.run(run_id)
    old.suspend()
    # The lock of a suspended process is held for ever, unless somebody puts another file in its place.
    shutil.copy(directory / "lock", directory / "another")
    os.replace(directory / "another", directory / "lock")
    assert service.status(run_id).state == "lost"
    assert not service.resume(run_id).reused
    assert finished(service, run_id).state == "succeeded"
    journal, artifacts = directory / "journal.jsonl", service.store.artifacts.list()
    before = journal.read_bytes()
    old.send_signal(signal.SIGCONT)
    old.wait(20)
    assert journal.read_bytes() == before
    service.store.rebuild()
    assert service.store.artifacts.list() == artifacts
    assert "attempt_superseded" in (directory / "worker.log").read_text()

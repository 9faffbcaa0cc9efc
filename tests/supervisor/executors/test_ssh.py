"""Runs on hosts that ssh reaches: a stand-in for ssh that runs the script here, real workers."""

import os
import signal

from opd_mcp.server.render.workspace import setup_text
from opd_mcp.store.claims import read_submission


def start(world, placed, steps: int) -> str:
    arguments = world.sft_arguments(**{"sft.steps": steps}).model_copy(update={"executor": "desks"})
    return placed.start_sft(arguments).run_id


def test_a_run_is_started_on_the_host_that_answers(world, placed, cluster, finished):
    run_id = start(world, placed, 1)
    assert finished(placed, run_id).state == "succeeded"
    assert read_submission(placed.workspace.run(run_id), 1).host == "desk"
    assert all(call[-1] == "/bin/sh -s" and "BatchMode=yes" in call for call in cluster.calls("ssh"))
    found = placed.setup()
    assert "executor big (slurm): nodes: 2 idle, 1 down" in setup_text(found)
    reports = {report.name: report.state for report in found.executors}
    assert reports["big"] == "nodes: 2 idle, 1 down"
    assert reports["desks"].startswith("down: ssh: connect to host down")
    assert reports["desks"].endswith("; desk answers")


def test_a_worker_that_is_killed_there_is_lost_and_resumes(world, placed, until, finished):
    run_id = start(world, placed, 150)
    directory = placed.workspace.run(run_id)
    until(placed, run_id, lambda status: status.phase == "sft")
    os.kill(int(read_submission(directory, 1).job), signal.SIGKILL)
    status = finished(placed, run_id)
    assert (status.state, status.error.cause) == (
        "lost",
        "The worker's process on desk is gone, without a final state.",
    )
    placed.resume(run_id)
    assert finished(placed, run_id).state == "succeeded"


def test_a_worker_that_is_suspended_there_is_lost_by_its_silence_and_writes_nothing_more(
    world, placed, until, finished
):
    run_id = start(world, placed, 400)
    directory = placed.workspace.run(run_id)
    until(placed, run_id, lambda status: status.phase == "sft")
    sleeper = int(read_submission(directory, 1).job)
    os.kill(sleeper, signal.SIGSTOP)
    status = finished(placed, run_id)
    assert status.state == "lost"
    assert "no sign of life" in status.error.cause
    placed.resume(run_id)
    os.kill(sleeper, signal.SIGCONT)
    status = finished(placed, run_id)
    assert status.state == "succeeded", status
    assert "attempt_superseded" in (directory / "worker.log").read_text()
    assert not any(alert.code == "damaged_journal" for alert in status.alerts)

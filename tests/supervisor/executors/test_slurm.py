"""Runs on a Slurm cluster: a small stand-in for its programs, real workers, the files of the run between them."""

import os
import signal

import pytest

from opd_mcp.schemas.errors import RunError
from opd_mcp.store.claims import newest_attempt, read_beginning
from opd_mcp.store.journal import read_journal
from opd_mcp.worker.main import REQUEUE_STATUS as STATUS_OF_WORKER


@pytest.fixture
def start(world, placed):
    """`start(steps)`: the id of a run on the cluster."""

    def begin(steps: int = 1, **overrides: object) -> str:
        arguments = world.sft_arguments(**{"sft.steps": steps, **overrides})
        return placed.start_sft(arguments.model_copy(update={"executor": "big"})).run_id

    return begin


def states(directory) -> list[str]:
    return [record.data["state"] for record in read_journal(directory / "journal.jsonl") if record.type == "state"]


def worker_of(directory) -> int:
    return read_beginning(directory, newest_attempt(directory)).pid


def test_a_run_waits_in_the_queue_and_is_computed_there(placed, cluster, start, until, finished, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    cluster.hold()
    first, second = start(), start(steps=2)
    status = placed.status(second)
    assert (status.state, status.queue_position) == ("queued", 2)
    assert status.waits_for == "queued on big, position 2 (Resources)"
    cluster.let_go()
    for run_id in (first, second):
        ended = finished(placed, run_id)
        assert ended.state == "succeeded", ended
    listed = {row.artifact_id for row in placed.store.artifacts.list()}
    assert {placed.store.view(run_id).artifacts["sft"] for run_id in (first, second)} <= listed
    assert placed.store.record(first).request.executor == "big"
    [call, _] = cluster.calls("sbatch")
    assert {"--export=NIL", "--partition=main", "--requeue", "--signal=B:TERM@120"} <= set(call)
    assert "hf_abc" not in (cluster.root / "1.sh").read_text()


def test_a_cancelled_run_never_begins_even_when_its_job_does(placed, cluster, start, finished):
    cluster.hold()
    run_id = start()
    directory = placed.workspace.run(run_id)
    assert placed.cancel(run_id).state == "cancelled"
    assert cluster.calls("scancel") == [["1"]]
    journal = (directory / "journal.jsonl").read_bytes()
    cluster.change(1, state="PENDING")  # a cluster that begins it all the same
    cluster.let_go()
    placed.setup()
    while cluster.job(1)["state"] == "RUNNING":
        placed.setup()
    assert "run_locked" in (directory / "worker.log").read_text()
    assert (directory / "journal.jsonl").read_bytes() == journal


def test_a_working_run_hears_its_cancel_request_by_file(placed, start, until, finished):
    run_id = start(**{"sft.optimizer.learning_rate": 555})
    until(placed, run_id, lambda status: status.phase == "sft")
    placed.cancel(run_id)
    assert finished(placed, run_id).state == "cancelled"


def test_a_preempted_job_queues_its_next_attempt_and_goes_on(placed, cluster, start, until, finished):
    run_id = start(steps=150)
    directory = placed.workspace.run(run_id)
    until(placed, run_id, lambda status: status.phase == "sft")
    os.kill(worker_of(directory), signal.SIGTERM)
    status = finished(placed, run_id)
    assert status.state == "succeeded", status
    assert "preempted" in {alert.code for alert in status.alerts}
    assert states(directory) == ["queued", "running", "queued", "running", "succeeded"]
    assert ["requeue", "1"] in cluster.calls("scontrol")


def test_a_job_that_lost_its_node_and_waits_again_is_queued_and_not_lost(placed, cluster, start, until, finished):
    run_id = start(steps=150)
    directory = placed.workspace.run(run_id)
    until(placed, run_id, lambda status: status.phase == "sft")
    cluster.hold()
    cluster.change(1, requeue=True)
    os.killpg(cluster.job(1)["pid"], signal.SIGKILL)
    until(placed, run_id, lambda status: status.waits_for is not None)
    assert placed.status(run_id).state == "queued"
    assert newest_attempt(directory) == 2
    cluster.let_go()
    assert finished(placed, run_id).state == "succeeded"
    assert states(directory) == ["queued", "running", "queued", "running", "succeeded"]


def test_a_job_that_ends_without_a_word_is_lost_with_what_slurm_says(placed, cluster, start, until, finished):
    run_id = start(steps=150)
    until(placed, run_id, lambda status: status.phase == "sft")
    cluster.change(1, ends="NODE_FAIL", reason="node n1 down")
    os.killpg(cluster.job(1)["pid"], signal.SIGKILL)
    status = finished(placed, run_id)
    assert (status.state, status.error.code) == ("lost", "worker_lost")
    assert status.error.cause == "Slurm's job 1 ended: NODE_FAIL, node n1 down, exit code 0:0."
    resumed = placed.resume(run_id)
    assert (resumed.state in ("queued", "running"), resumed.reused) == (True, False)
    assert finished(placed, run_id).state == "succeeded"
    assert cluster.job(2)["state"] in ("RUNNING", "COMPLETED")


def test_a_cluster_that_takes_no_job_is_named_and_the_run_can_go_on_later(placed, start, finished, monkeypatch):
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match="sbatch is not installed here") as refused:
        start()
    assert refused.value.code == "launch_failed"
    monkeypatch.setenv("PATH", path)
    run_id = str(refused.value.value)
    assert placed.status(run_id).state == "lost"
    placed.resume(run_id)
    assert finished(placed, run_id).state == "succeeded"


def test_the_script_knows_the_worker_s_exit_status():
    from opd_mcp.supervisor.executors.slurm import REQUEUE_STATUS

    assert REQUEUE_STATUS == STATUS_OF_WORKER

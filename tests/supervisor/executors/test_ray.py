"""Runs on a Ray cluster: a small stand-in for its dashboard, real workers, the files of the run between them."""

import json
import os
import sys
import time

import pytest

from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.executors import Claim, Placing, RayExecutor, Submission
from opd_mcp.server.render.workspace import setup_text
from opd_mcp.store.claims import newest_attempt, read_beginning, read_submission
from opd_mcp.store.workspace import named_executor
from opd_mcp.supervisor.executors import ray
from opd_mcp.supervisor.executors.interface import Work
from tests.stand_ins.fake_ray import FakeRay

CLAIM = Claim(attempt=1, placing=Placing(executor="rays", kind="ray", lease_seconds=10), ticket="t")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "LOOK_SECONDS", 0.0)  # each look asks
    # What the cluster's nodes have, not what the server has.
    with FakeRay({"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": "/of/ray"}) as running:
        yield running


@pytest.fixture
def placed(world, cluster, monkeypatch, tmp_path):
    """A service whose settings name the cluster."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    setup = json.dumps([f"export TEST_LEASES={world.settings.lease_folder} TMPDIR={tmp_path}"])
    (world.service().workspace.root / "settings.toml").write_text(
        f'[executors.rays]\nkind = "ray"\naddress = "{cluster.address}/"\nmemory_gb = 64\nlease_seconds = 3\n'
        f"resources = {{ 'accelerator_type:H100' = 0.001 }}\nsetup = {setup}\n"
    )
    return world.service()


@pytest.fixture
def start(world, placed):
    """`start(steps)`: the id of a run on the cluster."""

    def begin(steps: int = 1) -> str:
        arguments = world.sft_arguments(**{"sft.steps": steps})
        return placed.start_sft(arguments.model_copy(update={"executor": "rays"})).run_id

    return begin


def job_of(service, run_id: str) -> str:
    directory = service.workspace.run(run_id)
    return read_submission(directory, newest_attempt(directory)).job


def ended(executor: ray.Ray, job: str) -> str:
    """What Ray says of a job's end."""
    while (found := executor.look(CLAIM, Submission(job=job))).state in ("queued", "running"):
        time.sleep(0.02)
    return found.text


def test_a_run_waits_in_the_queue_and_is_computed_there_once(placed, cluster, start, finished, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    cluster.held = True
    run_id = start()
    status = placed.status(run_id)
    lacks = "no node of the cluster has 1 CPU and 0.001 accelerator_type:H100"
    assert (status.state, status.waits_for) == ("queued", f"queued on rays ({lacks})")
    cluster.let_go()
    assert finished(placed, run_id).state == "succeeded"
    job = cluster.jobs[job_of(placed, run_id)]
    assert (job["entrypoint_num_cpus"], job["entrypoint_num_gpus"]) == (1, 0)
    assert job["entrypoint_resources"] == {"accelerator_type:H100": 0.001}
    assert job["metadata"] == {"opd_run": run_id}
    assert "hf_abc" not in job["entrypoint"]
    assert "executor rays (ray): Ray 2.60.0: 1 node, 2 CPUs, 0 GPUs" in setup_text(placed.setup())
    directory = placed.workspace.run(run_id)
    journal, begun = (directory / "journal.jsonl").read_bytes(), read_beginning(directory, 1)
    executor = ray.Ray("rays", named_executor(placed.workspace, "rays"))
    executor._submitted("again", {"entrypoint": job["entrypoint"], "entrypoint_num_cpus": 1})
    assert "exit code 1" in ended(executor, "again")
    assert "run_locked" in (directory / "worker.log").read_text()
    assert ((directory / "journal.jsonl").read_bytes(), read_beginning(directory, 1)) == (journal, begun)


def test_a_run_that_is_cancelled_while_it_waits_leaves_nothing_in_the_queue(placed, cluster, start):
    cluster.held = True
    run_id = start()
    job = job_of(placed, run_id)
    assert placed.cancel(run_id).state == "cancelled"
    assert ("POST", f"/api/jobs/{job}/stop") in cluster.calls
    assert cluster.jobs[job]["status"] == "FAILED"  # taken out of the queue by a job on the head node
    assert cluster.jobs[f"withdraw-{job}"]["status"] == "SUCCEEDED"
    assert placed.status(run_id).state == "cancelled"


def test_a_working_run_hears_its_cancel_request_by_file(placed, cluster, start, until, finished):
    run_id = start(100_000)
    until(placed, run_id, lambda status: status.phase == "sft")
    placed.cancel(run_id)
    assert finished(placed, run_id).state == "cancelled"
    assert not [path for _, path in cluster.calls if path.endswith("/stop")]


def test_a_run_whose_node_dies_is_lost_with_the_cause_and_resumes_in_a_new_job(placed, cluster, start, until, finished):
    run_id = start(150)
    until(placed, run_id, lambda status: status.phase == "sft")
    job = job_of(placed, run_id)
    cluster.lose_node_of(job)
    status = finished(placed, run_id)
    assert (status.state, status.error.code) == ("lost", "worker_lost")
    assert status.error.cause == (
        f"Ray's job {job} ended: FAILED (Job supervisor actor died: The actor died unexpectedly before finishing this "
        "task. The actor died because its node has died. Node Id: da8c491e)"
    )
    placed.resume(run_id)
    assert finished(placed, run_id).state == "succeeded"
    assert job_of(placed, run_id) != job


def test_a_job_that_ray_lets_wait_no_longer_is_handed_over_again(placed, cluster, start, finished):
    cluster.held = True
    run_id = start()
    first = job_of(placed, run_id)
    for turn in (2, 3):
        cluster.expire(job_of(placed, run_id))
        assert placed.status(run_id).state == "queued"
        assert job_of(placed, run_id) == f"{first}-{turn}"
    cluster.let_go()
    assert finished(placed, run_id).state == "succeeded"
    assert sorted(cluster.jobs) == [first, f"{first}-2", f"{first}-3"]
    assert newest_attempt(placed.workspace.run(run_id)) == 1


def test_a_dashboard_that_does_not_answer_is_named_and_changes_no_run(placed, cluster, start, until, finished):
    run_id = start(150)
    until(placed, run_id, lambda status: status.phase == "sft")
    cluster.stop_listening()
    [report] = placed.setup().executors
    assert report.state.startswith(f"does not answer: {cluster.address}")
    with pytest.raises(RunError, match="The executor 'rays' did not take the run") as refused:
        start(2)
    assert refused.value.code == "launch_failed"
    assert finished(placed, run_id).state == "succeeded"


def test_a_job_whose_answer_was_lost_or_that_another_server_submits_is_there_once(cluster, tmp_path):
    cluster.held = cluster.mute = True
    executor = ray.Ray("rays", RayExecutor(kind="ray", memory_gb=1, address=cluster.address))
    work = Work(tmp_path, CLAIM, ["true"])
    with pytest.raises(RunError, match="did not take the run"):
        executor.submit(work)
    cluster.mute = False
    assert executor.submit(work) == Submission(job="opd-t")
    assert list(cluster.jobs) == ["opd-t"]
    again = Work(tmp_path, CLAIM, ["true"], Submission(job="opd-t"))
    assert [executor.submit(again).job for _ in range(2)] == ["opd-t-2", "opd-t-2"]
    assert list(cluster.jobs) == ["opd-t", "opd-t-2"]


def test_a_cluster_that_was_restarted_knows_the_job_no_more(cluster):
    executor = ray.Ray("rays", RayExecutor(kind="ray", memory_gb=1, address=cluster.address))
    found = executor.look(CLAIM, Submission(job="opd-t"))
    assert (found.state, found.text.partition(";")[0]) == ("gone", "Ray does not list job opd-t any more")
    wrong = ray.Ray("rays", RayExecutor(kind="ray", memory_gb=1, address=f"{cluster.address}/elsewhere"))
    assert wrong.look(CLAIM, Submission(job="opd-t")).state == "unknown"


def test_a_cluster_that_asks_for_a_token_gets_that_of_the_file(cluster, tmp_path):
    cluster.token = "secret"
    file = tmp_path / "token"
    settings = RayExecutor(kind="ray", memory_gb=1, address=cluster.address)
    assert ray.Ray("rays", settings).report() == "does not answer: HTTP status 401: Unauthorized: no token"
    known = ray.Ray("rays", settings.model_copy(update={"token_file": str(file)}))
    assert "No such file" in known.report()
    file.write_text("secret\n")
    assert ray.Ray("rays", known._settings).report() == "Ray 2.60.0: 1 node, 2 CPUs, 0 GPUs"


def test_what_the_node_says_before_the_worker_goes_to_the_log_or_into_the_cause(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/a b;c")
    directory = tmp_path / "it's $(here)"
    settings = RayExecutor(kind="ray", memory_gb=1, address=cluster.address, setup=["echo no such module; false"])
    executor = ray.Ray("rays", settings)
    nowhere = executor.submit(Work(directory, CLAIM, ["true"]))
    cause = ended(executor, nowhere.job)
    assert cause.startswith("Ray's job opd-t ended: FAILED, exit code 2 (")
    assert "it's $(here)" in cause
    directory.mkdir()
    failing = Work(directory, CLAIM.model_copy(update={"ticket": "u"}), ["true"])
    assert ended(executor, executor.submit(failing).job) == "Ray's job opd-u ended: FAILED, exit code 1."
    assert (directory / "worker.log").read_text() == "no such module\n"
    shows = "import json, os; print(json.dumps([os.getcwd(), *map(os.getenv, ('PYTHONPATH', 'CUDA_VISIBLE_DEVICES'))]))"
    work = Work(directory, CLAIM.model_copy(update={"ticket": "v"}), [sys.executable, "-c", shows])
    working = ray.Ray("rays", settings.model_copy(update={"setup": []}))
    assert ended(working, working.submit(work).job) == "Ray's job opd-v ended: SUCCEEDED, exit code 0."
    said = (directory / "worker.log").read_text().splitlines()[-1]
    assert json.loads(said) == [str(directory), "/a b;c", ""]


def test_the_gpus_that_ray_gives_stay_visible(tmp_path):
    settings = RayExecutor(kind="ray", memory_gb=80, gpus=2, address="http://head:8265")
    assert "CUDA_VISIBLE_DEVICES" not in ray.Ray("rays", settings).script(Work(tmp_path, CLAIM, ["true"]))

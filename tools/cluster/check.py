"""Runs on a real Slurm and a real Ray with two nodes each and over a real sshd, on loopback: whole flows, and losses.

Run: `python tools/cluster/check.py [--json FILE] [--only NAME]`, or `make test-cluster`, as root on Debian with
slurm-wlm, munge and openssh-server, and with `ray` on PATH; what needs a missing one is not checked, it says so and
exits with 0. Workers are real ones with the engine, on the embedded arithmetic task with few steps: this checks the
way, not the result.

1. A whole distillation with its report on each executor, and the queue position of one that waits.
2. A lost node, a preemption and a time limit: the run goes on from its checkpoint, on another node or in its next turn.
   On Ray, nothing is left on the cluster after that.
3. A cancel request while it waits and while it works; a server killed right after its start; two servers that start
   the same at the same moment; a worker over ssh that is killed.

It prints one line per check and exits with 1 where one failed. What it started, it ends by process id.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.requests import StartDistillation, StartSft
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.service import JobService
from opd_mcp.store.claims import newest_attempt, read_beginning, read_submission
from opd_mcp.store.journal import read_journal
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace
from tools import EXAMPLE
from tools.cluster.ray_nodes import RayNodes, ray_nodes, ray_program
from tools.cluster.services import Services, missing_programs, services, until

ROWS = 12
RANK = "opd_mcp.worker.teams.rank_process"
RUN_SECONDS = 400.0
SHORT = {
    "sft.steps": 4,
    "distill.steps": 4,
    "sft.on_truncated": "keep",
    "sft.batch_size": 4,
    "rollout.sampling.max_new_tokens": 24,
    "responses.sampling.max_new_tokens": 24,
}
LONG = {"sft.steps": 100_000, "sft.batch_size": 2, "checkpoint.steps": 10, "sft.on_truncated": "keep"}
MODELS = {"student": str(EXAMPLE / "student"), "teacher": str(EXAMPLE / "teacher")}
START_AND_WAIT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tools.cluster.check import Cluster, long_sft
print("ready", flush=True)
sys.stdin.readline()
print(long_sft(Cluster(Path(sys.argv[2])), sys.argv[4], int(sys.argv[3])), flush=True)
time.sleep(600)
"""


@dataclass
class Cluster:
    """A workspace with executors, and the programs behind them; only the process that started those has them."""

    root: Path
    running: Services | None = None
    ray_running: RayNodes | None = None

    def service(self) -> JobService:
        """A new service, as another server has it."""
        return JobService(Workspace(self.root / "home"), AllowedRoots([self.root / "data"]), JobSettings())

    @property
    def services(self) -> Services:
        """Slurm and sshd."""
        assert self.running is not None, "another process started them"
        return self.running

    @property
    def ray(self) -> RayNodes:
        """Ray's nodes."""
        assert self.ray_running is not None, "another process started them"
        return self.ray_running

    def prepare(self) -> None:
        """Write the settings and a few rows of each prompt set."""
        here = f"export PYTHONPATH={json.dumps(str(Path(__file__).resolve().parents[2]))} XDG_RUNTIME_DIR={self.root}"
        for folder in ("home", "data"):
            (self.root / folder).mkdir(mode=0o700)
        for name in ("sft", "opd", "eval"):
            rows = (EXAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
            (self.root / "data" / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        answers = [{"prompt": f"1+{i}=?", "response": str(1 + i)} for i in range(8)]
        lines = "".join(json.dumps(row) + "\n" for row in answers)
        (self.root / "data" / "responses.jsonl").write_text(lines, encoding="utf-8")
        common = f"memory_gb = 4\nlease_seconds = 60\nsetup = {json.dumps([here])}\n"
        slurm = f'kind = "slurm"\npartition = "main"\nsignal_seconds = 20\n{common}'
        tables = ""
        if self.running is not None:
            tables += (
                f"[executors.slurm]\n{slurm}\n"
                f'[executors.short]\ntime_limit = "2:00"\n{slurm}\n'
                f"[executors.wide]\nnodes = 2\n{slurm}\n"
                f'[executors.ssh]\nkind = "ssh"\nhosts = ["127.0.0.1"]\n'
                f"options = {json.dumps(self.running.ssh_options)}\n{common}\n"
            )
        if self.ray_running is not None:
            tables += f'[executors.ray]\nkind = "ray"\naddress = "{self.ray_running.dashboard}"\n{common}'
        (self.root / "home" / "settings.toml").write_text(tables, encoding="utf-8")


def long_sft(cluster: Cluster, executor: str = "slurm", steps: int = 100_000) -> str:
    """The id of a fine-tuning that takes minutes."""
    return cluster.service().start_sft(sft_of(cluster, executor, **{"sft.steps": steps})).run_id


def sft_of(cluster: Cluster, executor: str | None, **overrides: object) -> StartSft:
    """A fine-tuning that writes checkpoints often."""
    data = str(cluster.root / "data" / "responses.jsonl")
    given = {"student": MODELS["student"], "responses": data, "declared_teacher": MODELS["teacher"]}
    return StartSft(**given, preset="demo", overrides=LONG | overrides, executor=executor)


def distillation(cluster: Cluster, executor: str, seed: int) -> str:
    """The id of a short distillation with its report."""
    data = cluster.root / "data"
    start = StartDistillation(
        **MODELS,
        prompts=str(data / "opd.jsonl"),
        sft_prompts=str(data / "sft.jsonl"),
        eval_prompts=str(data / "eval.jsonl"),
        preset="demo",
        overrides={**SHORT, "runtime.seed": seed},
        executor=executor,
    )
    return cluster.service().start_distillation(start).run_id


def ended(service: JobService, run_id: str) -> RunStatus:
    """The status once the run has ended; raises RuntimeError where it does not."""
    return reached(service, run_id, lambda status: status.state not in ACTIVE_STATES)


def reached(service: JobService, run_id: str, condition: Callable[[RunStatus], bool]) -> RunStatus:
    """The first status that satisfies the condition."""
    found: list[RunStatus] = []

    def look() -> bool:
        found[:] = [service.status(run_id)]
        return condition(found[0])

    until(look, f"{run_id}: {service.status(run_id)}", RUN_SECONDS)
    return found[0]


def require(condition: object, what: object) -> None:
    """Raise RuntimeError with what is wrong."""
    if not condition:
        raise RuntimeError(str(what))


def trained_a_little(status: RunStatus) -> bool:
    """Whether a checkpoint must be there."""
    return status.progress is not None and status.progress.unit == "steps" and status.progress.done > 25


def steps_of_attempts(service: JobService, run_id: str) -> dict[int, list[int]]:
    """By attempt, the steps whose metrics it recorded."""
    steps: dict[int, list[int]] = {}
    for record in read_journal(service.workspace.run(run_id) / "journal.jsonl"):
        if record.type == "metric":
            steps.setdefault(record.attempt, []).append(int(record.data["step"]))
    return steps


def goes_on(service: JobService, run_id: str) -> dict[str, Any]:
    """Check that the newest attempt continues from a checkpoint, then cancel it."""
    status = reached(service, run_id, lambda status: max(steps_of_attempts(service, run_id), default=0) >= 2)
    service.cancel(run_id)
    require(ended(service, run_id).state == "cancelled", status)
    steps = steps_of_attempts(service, run_id)
    last = max(steps)
    require(min(steps[last]) > 1, f"attempt {last} began at step {min(steps[last])}: no checkpoint was used")
    return {"attempts": last, "first_step_of_the_last": min(steps[last]), "steps_before": max(steps[last - 1])}


def whole_flow(executor: str, seed: int) -> Callable[[Cluster], dict[str, Any]]:
    """A check of a distillation with its report."""

    def check(cluster: Cluster) -> dict[str, Any]:
        service = cluster.service()
        run_id = distillation(cluster, executor, seed)
        status = ended(service, run_id)
        require(status.state == "succeeded", status)
        require(service.run_document(run_id, "report"), "a report")
        return {"phases": status.phases_done}

    return check


def queue_and_cancel(cluster: Cluster) -> dict[str, Any]:
    """A run that waits says where; its cancel ends it at once, and that of a working one by its file."""
    service = cluster.service()
    blocker = cluster.services.asks("sbatch", "--parsable", "-N2", "--exclusive", "--wrap=sleep 600").strip()
    until(lambda: "RUNNING" in cluster.services.asks("squeue", "-h", "-j", blocker, "-o", "%T"), "the blocker")
    first, second = long_sft(cluster), long_sft(cluster, steps=99_999)
    status = reached(service, second, lambda status: status.queue_position == 2)
    require(service.cancel(second).state == "cancelled", second)
    cluster.services.asks("scancel", blocker)
    reached(service, first, trained_a_little)
    service.cancel(first)
    require(ended(service, first).state == "cancelled", first)
    return {"said": status.waits_for}


def lost_node(cluster: Cluster) -> dict[str, Any]:
    """A node dies with its worker: Slurm requeues the job, which goes on on the other one."""
    service, run_id = cluster.service(), long_sft(cluster)
    reached(service, run_id, trained_a_little)
    job = job_of(service, run_id)
    node = cluster.services.asks("squeue", "-h", "-j", job, "-o", "%N").strip()
    before = time.monotonic()
    cluster.services.kill_node(node)
    found = goes_on(service, run_id)
    cluster.services.start_node(node)
    until(lambda: "2 idle" in cluster.services.asks("sinfo", "-h", "-p", "main", "-o", "%D %T"), "the node's return")
    return {"seconds": round(time.monotonic() - before, 1), **found}


def preemption(cluster: Cluster) -> dict[str, Any]:
    """A job of a higher partition takes both nodes: the run writes a checkpoint, waits and goes on."""
    service, run_id = cluster.service(), long_sft(cluster)
    reached(service, run_id, trained_a_little)
    cluster.services.asks("sbatch", "--partition=urgent", "-N2", "--exclusive", "--wrap=sleep 5")
    waiting = reached(service, run_id, lambda status: status.state == "queued")
    return {"said": waiting.waits_for, **goes_on(service, run_id)}


def time_limit(cluster: Cluster) -> dict[str, Any]:
    """Twenty seconds before its time limit the run writes a checkpoint, and its job is requeued."""
    service, run_id = cluster.service(), long_sft(cluster, "short")
    found = goes_on(service, run_id)
    alerts = [
        r.data["code"] for r in read_journal(service.workspace.run(run_id) / "journal.jsonl") if r.type == "alert"
    ]
    require("preempted" in alerts, alerts)
    return found


def two_nodes(cluster: Cluster) -> dict[str, Any]:
    """Ranks on two nodes: a run whose rank over there is killed goes on; another equals two ranks on one machine."""
    service, both = cluster.service(), {"runtime.devices": 2}
    run_id = service.start_sft(sft_of(cluster, "wide", **both)).run_id
    reached(service, run_id, trained_a_little)
    listed = cluster.services.asks("squeue", "-h", "-s", "-j", job_of(service, run_id), "-o", "%i %N").split("\n")
    step = next((line for line in listed if ".0 " in line), None)
    begun = read_beginning(service.workspace.run(run_id), 1)
    require(step is not None and begun is not None, f"a step on another node: {listed}")
    near = {child.pid for child in psutil.Process(begun.pid).children()}  # type: ignore[union-attr]
    far = [rank for rank in ranks_of(job_of(service, run_id)) if rank.pid not in near]
    require(len(far) == 1, f"a rank that the worker has not started itself: {far}")
    far[0].kill()
    lost = ended(service, run_id)
    require(lost.error is not None and lost.error.code == "rank_lost", lost)
    service.resume(run_id)
    found = goes_on(service, run_id)
    short = {**both, "sft.steps": 30}
    there = ended(service, service.start_sft(sft_of(cluster, "wide", **short)).run_id)
    roots, settings = AllowedRoots([cluster.root / "data"]), JobSettings(cluster.root / "leases", 2)
    here = JobService(Workspace(cluster.root / "here"), roots, settings)
    alone = ended(here, here.start_sft(sft_of(cluster, None, **{**short, "runtime.replicas": 2})).run_id)
    require(there.result is not None and alone.result is not None, (there, alone))
    files = [Path(str((status.result or {})["paths"]["sft"])) / "model.safetensors" for status in (there, alone)]
    held = [json.loads((path.parent / "training.json").read_bytes()).get("replicas") for path in files]
    require(held == [2, 2], f"a replica on each node by itself, and on each device here where asked for: {held}")
    require(files[0].read_bytes() == files[1].read_bytes(), "the same student as of two ranks here")
    return {"step": step, "cause": lost.error.cause if lost.error else None, **found}


def ranks_of(job: str) -> list[psutil.Process]:
    """The ranks of a Slurm job, without the `srun` that started some."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        with contextlib.suppress(psutil.Error):
            if command[-1] == RANK and "python" in command[0] and process.environ().get("SLURM_JOB_ID") == job:
                found.append(process)
    return found


def server_restart(cluster: Cluster) -> dict[str, Any]:
    """A server is killed right after it has started a run; another one follows it to its end."""
    return follows_a_killed_server(cluster, "slurm")


def follows_a_killed_server(cluster: Cluster, executor: str) -> dict[str, Any]:
    """The same on any executor."""
    [run_id] = starts(cluster, 1, 40, executor)
    service = cluster.service()
    status = ended(service, run_id)
    require(status.state == "succeeded", status)
    return {"state": status.state}


def two_servers(cluster: Cluster) -> dict[str, Any]:
    """Two servers start the same request at the same moment: one run, one job."""
    found = starts(cluster, 2, 41)
    require(len(set(found)) == 1, found)
    service = cluster.service()
    require(ended(service, found[0]).state == "succeeded", found)
    require(newest_attempt(service.workspace.run(found[0])) == 1, "one attempt")
    return {"runs": len(set(found))}


def starts(cluster: Cluster, count: int, steps: int, executor: str = "slurm") -> list[str]:
    """The run that each of some servers starts at the same moment, which are then killed."""
    checkout = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", START_AND_WAIT, checkout, str(cluster.root), str(steps), executor]
    servers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for server in servers:
        require(_line(server) == "ready", "a server that begins")
    for server in servers:
        assert server.stdin is not None, "it is a pipe"
        server.stdin.write("go\n")
        server.stdin.flush()
    found = [_line(server) for server in servers]
    for server in servers:
        server.kill()
        server.wait()
    return found


def _line(server: "subprocess.Popen[str]") -> str:
    assert server.stdout is not None, "it is a pipe"
    return server.stdout.readline().strip()


def killed_over_ssh(cluster: Cluster) -> dict[str, Any]:
    """A worker on an ssh host is killed: the run is lost with the cause, and a resume continues it."""
    service, run_id = cluster.service(), long_sft(cluster, "ssh")
    reached(service, run_id, trained_a_little)
    begun = read_beginning(service.workspace.run(run_id), 1)
    require(begun is not None, "a worker that has begun")
    os.kill(begun.pid, signal.SIGKILL)  # type: ignore[union-attr]
    lost = ended(service, run_id)
    require(lost.state == "lost" and lost.error is not None, lost)
    service.resume(run_id)
    return {"cause": lost.error.cause if lost.error else None, **goes_on(service, run_id)}


def ray_queue_and_cancel(cluster: Cluster) -> dict[str, Any]:
    """A run waits beyond Ray's limit and works then; its cancel ends it by its file, that of one that waits at once."""
    service, ray = cluster.service(), cluster.ray
    blockers = [f"blocker-{number}" for number in range(2)]
    for blocker in blockers:
        ray.asks("/api/jobs/", "POST", {"entrypoint": "sleep 600", "submission_id": blocker, "entrypoint_num_cpus": 1})
    until(lambda: all(ray.asks(f"/api/jobs/{job}")["status"] == "RUNNING" for job in blockers), "the blockers", 120)
    first, second = long_sft(cluster, "ray"), long_sft(cluster, "ray", 99_999)
    said = reached(service, second, lambda status: status.waits_for is not None).waits_for
    require(service.cancel(second).state == "cancelled", second)
    job = job_of(service, first)
    reached(service, first, lambda status: job_of(service, first) != job)
    until(lambda: ray.left() <= {*blockers, job_of(service, first)}, f"nothing of {second}", 120)
    for blocker in blockers:
        ray.asks(f"/api/jobs/{blocker}/stop", "POST")
    reached(service, first, trained_a_little)
    service.cancel(first)
    require(ended(service, first).state == "cancelled", first)
    until(lambda: not ray.left(), "nothing left")
    return {"said": said, "first_job": job, "last_job": job_of(service, first)}


def job_of(service: JobService, run_id: str) -> str:
    """The job of a run's newest attempt."""
    directory = service.workspace.run(run_id)
    submission = read_submission(directory, newest_attempt(directory))
    assert submission is not None, "it was handed over"
    return submission.job


def ray_lost_node(cluster: Cluster) -> dict[str, Any]:
    """A node dies with its worker: the run is lost with the cause, and a resume continues it on the other node."""
    service, run_id = cluster.service(), long_sft(cluster, "ray")
    directory, ray = service.workspace.run(run_id), cluster.ray
    reached(service, run_id, trained_a_little)
    node = ray.node_of(job_of(service, run_id))
    before = time.monotonic()
    ray.kill(node)
    lost = ended(service, run_id)
    seconds = round(time.monotonic() - before, 1)
    require(lost.state == "lost" and lost.error is not None, lost)
    service.resume(run_id)
    reached(service, run_id, lambda status: read_beginning(directory, 2) is not None)
    other = ray.node_of(job_of(service, run_id))
    require(other != node, f"{node}, then {other}")
    found = goes_on(service, run_id)
    until(lambda: not ray.left(), "nothing left")
    ray.start(node)
    return {"lost_after_seconds": seconds, "cause": lost.error.cause if lost.error else None, **found}


def ray_server_restart(cluster: Cluster) -> dict[str, Any]:
    """A server is killed right after it has started a run on Ray; another one follows it to its end."""
    found = follows_a_killed_server(cluster, "ray")
    until(lambda: not cluster.ray.left(), "nothing left")
    return {**found, "setup": next(report.state for report in cluster.service().setup().executors or [])}


CHECKS: dict[str, Callable[[Cluster], dict[str, Any]]] = {
    "slurm: a whole distillation": whole_flow("slurm", 1),
    "ssh: a whole distillation": whole_flow("ssh", 2),
    "slurm: queue position, cancel while waiting and while working": queue_and_cancel,
    "slurm: a node is lost": lost_node,
    "slurm: a preemption": preemption,
    "slurm: ranks on two nodes": two_nodes,
    "slurm: the time limit": time_limit,
    "slurm: the server is killed after its start": server_restart,
    "slurm: two servers start the same": two_servers,
    "ssh: the worker is killed": killed_over_ssh,
    "ray: a whole distillation": whole_flow("ray", 3),
    "ray: waiting beyond its limit, cancel while waiting and while working": ray_queue_and_cancel,
    "ray: a node is lost": ray_lost_node,
    "ray: the server is killed after its start": ray_server_restart,
}


def main() -> int:
    """0 where every check passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--only", default="", help="checks whose name has this part")
    parser.add_argument("--keep", action="store_true", help="keep the folder, for a look at its logs")
    given = parser.parse_args()
    wanted = {name: check for name, check in CHECKS.items() if given.only in name}
    ray_wanted = any(name.startswith("ray: ") for name in wanted)
    others_wanted = any(not name.startswith("ray: ") for name in wanted)
    if others_wanted and (missing := missing_programs()):
        print(f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge, openssh-server); checked without them")
        others_wanted = False
    if ray_wanted and ray_program() is None:
        print("not installed: ray (pip install 'opd-mcp[ray]', or any environment's on PATH); checked without it")
        ray_wanted = False
    root = Path(tempfile.mkdtemp(prefix="opd-cluster-"))
    results: dict[str, dict[str, Any]] = {}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # what was started is ended then, too
    try:
        with contextlib.ExitStack() as stack:
            running = stack.enter_context(services(root / "services")) if others_wanted else None
            nodes = stack.enter_context(ray_nodes(root / "ray")) if ray_wanted else None
            cluster = Cluster(root, running, nodes)
            cluster.prepare()
            versions = {
                **({"slurm": running.asks("sinfo", "--version").strip()} if running else {}),
                **({"ray": nodes.asks("/api/version")["ray_version"]} if nodes else {}),
            }
            for name, check in wanted.items():
                if ray_wanted if name.startswith("ray: ") else others_wanted:
                    results[name] = _checked(name, check, cluster)
                    if given.json is not None:
                        report = {"date": datetime.now(UTC).date().isoformat(), **versions, "checks": results}
                        write_atomic(given.json, json.dumps(report, indent=1) + "\n", mode=0o644)
    finally:
        if given.keep:
            print(root)
        else:
            shutil.rmtree(root, ignore_errors=True)
    return int(any(result["outcome"] != "passed" for result in results.values()))


def _checked(name: str, check: Callable[[Cluster], dict[str, Any]], cluster: Cluster) -> dict[str, Any]:
    before = time.monotonic()
    try:
        result = {"outcome": "passed", **check(cluster)}
    except Exception as error:  # every check is to be seen
        traceback.print_exc()
        result = {"outcome": "failed", "why": str(error)[:500]}
    result["seconds"] = round(time.monotonic() - before, 1)
    print(json.dumps({name: result}), flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())

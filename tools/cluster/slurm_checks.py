"""Checks of the executors `slurm` and `ssh`: queue, cancel, lost nodes, preemption, time limits, ranks on two nodes."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from opd_mcp.devices.settings import JobSettings
from opd_mcp.service import JobService
from opd_mcp.store.claims import newest_attempt, read_beginning
from opd_mcp.store.journal import read_journal
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace
from tools.cluster.runs import (
    Cluster,
    ended,
    follows_a_killed_server,
    goes_on,
    job_of,
    long_sft,
    reached,
    require,
    sft_of,
    starts,
    trained_a_little,
)
from tools.cluster.services import until

RANK = "opd_mcp.worker.teams.rank_process"


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


def two_servers(cluster: Cluster) -> dict[str, Any]:
    """Two servers start the same request at the same moment: one run, one job."""
    found = starts(cluster, 2, 41)
    require(len(set(found)) == 1, found)
    service = cluster.service()
    require(ended(service, found[0]).state == "succeeded", found)
    require(newest_attempt(service.workspace.run(found[0])) == 1, "one attempt")
    return {"runs": len(set(found))}


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

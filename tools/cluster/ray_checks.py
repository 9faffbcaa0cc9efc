"""Checks of the executor `ray`: waiting beyond its limit, cancel, a lost node, a killed server; nothing is left."""

import time
from typing import Any

from opd_mcp.store.claims import read_beginning
from tools.cluster.runs import (
    Cluster,
    ended,
    follows_a_killed_server,
    goes_on,
    job_of,
    long_sft,
    reached,
    require,
    trained_a_little,
)
from tools.cluster.services import until


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

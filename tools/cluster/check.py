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
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.identity.files import write_atomic
from tools.cluster.ray_checks import ray_lost_node, ray_queue_and_cancel, ray_server_restart
from tools.cluster.ray_nodes import ray_nodes, ray_program
from tools.cluster.runs import Cluster, whole_flow
from tools.cluster.services import missing_programs, services
from tools.cluster.slurm_checks import (
    killed_over_ssh,
    lost_node,
    preemption,
    queue_and_cancel,
    server_restart,
    time_limit,
    two_nodes,
    two_servers,
)

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

"""A Ray cluster on loopback: a head node without cores and two nodes with one each; all end with this process.

`ray` is that of this Python or of PATH (`pip install 'opd-mcp[ray]'`, also in an environment of its own).
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tools.cluster.services import free_ports, until

# Each node has an address of its own on loopback.
ADDRESSES = {"head": "127.0.0.2", "r1": "127.0.0.3", "r2": "127.0.0.4"}
START_SECONDS = 300.0
# Of a job that waits; Ray's own is 900.
START_LIMIT_SECONDS = 45


def ray_program() -> str | None:
    """The path of `ray`; None where it is not installed."""
    return shutil.which("ray", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@dataclass
class RayNodes:
    """The running nodes, and what their dashboard says."""

    root: Path
    dashboard: str
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start a node and wait until the cluster knows it, for longer than the 30 s of Ray itself."""
        self.processes[name] = self._started(name)

        def known() -> bool:
            if self.processes[name].poll() is not None:
                self.processes[name] = self._started(name)
            return ADDRESSES[name] in self.alive().values()

        until(known, f"Ray's node {name}", START_SECONDS)

    def _started(self, name: str) -> subprocess.Popen[bytes]:
        program = ray_program()
        assert program is not None, "it was looked for before"
        head = ["--head", f"--port={self.port}", f"--temp-dir={self.root}", "--dashboard-host=127.0.0.1"]
        head += [f"--dashboard-port={self.dashboard.rpartition(':')[2]}", "--num-cpus=0"]
        joins = [f"--address={ADDRESSES['head']}:{self.port}", "--num-cpus=1"]
        common = [f"--node-ip-address={ADDRESSES[name]}", "--num-gpus=0", "--object-store-memory=80000000", "--block"]
        python = f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"  # jobs call `python`, with ray in it
        with (self.root.parent / f"{name}.out").open("ab") as log:
            return subprocess.Popen(
                [program, "start", *(head if name == "head" else joins), *common, "--dashboard-agent-listen-port=0"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PATH": python,
                    "RAY_USAGE_STATS_ENABLED": "0",
                    "RAY_JOB_START_TIMEOUT_SECONDS": str(START_LIMIT_SECONDS),
                },
                start_new_session=True,
            )

    def asks(self, path: str, method: str = "GET", content: object = None) -> Any:
        """What the dashboard answers; None where it does not."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.dashboard}{path}", data, {"Content-Type": "application/json"})
        request.method = method
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())
        except OSError:
            return None

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """The nodes, actors or placement groups of the cluster; raises RuntimeError without an answer."""
        answer = self.asks(f"/api/v0/{kind}?detail=true")
        if answer is None:
            raise RuntimeError(f"Ray does not list its {kind}")
        return answer["data"]["result"]["result"]

    def alive(self) -> dict[str, str]:
        """The address of each node that is alive, by its id; none while the dashboard starts."""
        with contextlib.suppress(RuntimeError):
            return self._alive()
        return {}

    def _alive(self) -> dict[str, str]:
        return {node["node_id"]: node["node_ip"] for node in self.listed("nodes") if node["state"] == "ALIVE"}

    def node_of(self, job: str) -> str:
        """The name of the node on which a job works."""
        address = self.alive()[self.asks(f"/api/jobs/{job}")["driver_node_id"]]
        return next(name for name, other in ADDRESSES.items() if other == address)

    def left(self) -> set[str]:
        """The jobs whose actors wait or work, and the placement groups that are still there."""
        actors = [actor["name"] for actor in self.listed("actors") if actor["state"] != "DEAD"]
        groups = [group["name"] for group in self.listed("placement_groups") if group["state"] != "REMOVED"]
        return {name.removeprefix("_ray_internal_job_actor_") for name in actors} | set(groups)

    def kill(self, name: str) -> None:
        """End a node as a power cut would: every process that is below its own."""
        process = self.processes.pop(name)
        for one in _tree(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def end(self) -> None:
        """End all nodes, the head last."""
        for name in reversed(list(self.processes)):
            self.kill(name)


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all below it, topmost first, so that none starts another one anew."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


@contextlib.contextmanager
def ray_nodes(root: Path) -> Iterator[RayNodes]:
    """The cluster, ready."""
    root.mkdir(mode=0o700, parents=True)
    port, dashboard = free_ports(2)
    nodes = RayNodes(root / "r", f"http://127.0.0.1:{dashboard}", port)
    try:
        for name in ADDRESSES:  # two at the same moment take each other's ports
            nodes.start(name)
        yield nodes
    finally:
        nodes.end()

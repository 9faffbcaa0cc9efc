"""A workspace with executors, its runs there, and what the checks of every executor ask of them."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.requests import StartDistillation, StartSft
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.service import JobService
from opd_mcp.store.claims import newest_attempt, read_submission
from opd_mcp.store.journal import read_journal
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace
from tools import EXAMPLE
from tools.cluster.ray_nodes import RayNodes
from tools.cluster.services import Services, until

ROWS = 12
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
from tools.cluster.runs import Cluster, long_sft
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


def job_of(service: JobService, run_id: str) -> str:
    """The job of a run's newest attempt."""
    directory = service.workspace.run(run_id)
    submission = read_submission(directory, newest_attempt(directory))
    assert submission is not None, "it was handed over"
    return submission.job


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


def follows_a_killed_server(cluster: Cluster, executor: str) -> dict[str, Any]:
    """The same on any executor."""
    [run_id] = starts(cluster, 1, 40, executor)
    service = cluster.service()
    status = ended(service, run_id)
    require(status.state == "succeeded", status)
    return {"state": status.state}

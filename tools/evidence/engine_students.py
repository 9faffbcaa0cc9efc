"""Students that a managed engine makes next to those that this program makes, and what their plans expected."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_mcp.schemas.reports import BenchmarkReport
from opd_mcp.schemas.requests import CompareRuns, StartDistillation
from opd_mcp.schemas.runs import RunStatus
from opd_mcp.store.runs import read_record
from opd_mcp.worker.engines import marked
from tools.evidence.engine_place import Place, Runs

PHASES = ("responses", "rollout", "score", "benchmark")
FLOW: dict[str, dict[str, Any]] = {
    "arithmetic": {"rollout.count": 3200, "rollout.shard_rows": 800, "rollout.batch_size": 128, "distill.steps": 200},
    "chain_sum": {"rollout.count": 6400, "rollout.shard_rows": 1600, "sft.steps": 800, "distill.steps": 150},
}
# sizes of micro-batch by which the same scores are computed with other rounding
ROUNDINGS = (2048, 6000, 3000, 1500)
# 97.5 % quantiles of Student's t with n − 1 degrees of freedom
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def distilled(place: Place, runs: Runs, settings: dict[str, Any]) -> tuple[dict[str, Any], RunStatus]:
    """A whole distillation with these settings: its state, seconds and processes left, and its status."""
    begun = time.perf_counter()
    arguments = StartDistillation(
        teacher=str(place.model("teacher")),
        student=str(place.model("student")),
        prompts=place.prompts("opd"),
        sft_prompts=place.prompts("sft"),
        eval_prompts=place.prompts("eval"),
        overrides=place.settings(FLOW[place.task]) | settings,
        **place.task_of().distillation,
        preset=place.task_of().arguments["preset"],
    )
    status = runs.ended(runs.service.start_distillation(arguments).run_id)
    answer = {"state": status.state, "seconds": round(time.perf_counter() - begun, 1), "phases": phase_seconds(status)}
    answer |= {"planned": read_record(runs.run_of(status.run_id)).expected_phase_seconds}
    return answer | {"left_over": len(marked(runs.run_of(status.run_id)))}, status


def students(place: Place, count: int) -> dict[str, Any]:
    """The engine's students and those made here with the same seeds, and students of the first one's own rollouts."""
    runs, engine = Runs(place, "flow"), place.known()["flow"]["run_id"]
    again = [
        distilled(place, runs, place.on_engine("responses", "rollout") | {"score.micro_batch_tokens": size})
        for size in ROUNDINGS
    ]
    here = [distilled(place, runs, {"runtime.seed": seed}) for seed in range(count)]
    there = [distilled(place, runs, place.on_engine(*PHASES) | {"runtime.seed": seed}) for seed in range(1, count)]
    left = sum(answer["left_over"] for answer, _ in (*again, *here, *there))
    if any(status.result is None for _, status in (*again, *here, *there)):
        return {"error": "a run did not succeed", "left_over": left}
    rounded = [accuracy(runs, status.run_id) for _, status in again]
    ours = [accuracy(runs, status.run_id) for _, status in here]
    theirs = [accuracy(runs, engine), *(accuracy(runs, status.run_id) for _, status in there)]
    return {
        "same_rollouts": compared(runs, [engine, again[0][1].run_id]),
        "rounded": rounded,
        "expected": interval(rounded, of_another=True),
        "engine": theirs,
        "here": ours,
        "paired": interval([first - second for first, second in zip(theirs, ours, strict=True)]),
        "seconds": {"engine": [answer["seconds"] for answer, _ in there], "here": [a["seconds"] for a, _ in here]},
        "plans": {"engine": [shares(answer) for answer, _ in there], "here": [shares(answer) for answer, _ in here]},
        "left_over": left,
    }


def interval(values: Sequence[float], *, of_another: bool = False) -> list[float]:
    """The 95 % interval of the mean, after that mean; or where another value is expected, without it."""
    mean, spread = statistics.mean(values), statistics.stdev(values)
    far = STUDENT_T[len(values)] * spread * (1 / len(values) + of_another) ** 0.5
    ends = [round(mean - far, 4), round(mean + far, 4)]
    return ends if of_another else [round(mean, 4), *ends]


def shares(answer: dict[str, Any]) -> dict[str, float]:
    """What each phase took, as a share of what the plan expected of it."""
    planned = answer["planned"]
    return {name: round(took / planned[name], 2) for name, took in answer["phases"].items() if planned.get(name)}


def phase_seconds(status: RunStatus) -> dict[str, float]:
    """What each phase took."""
    return {cost["stage"]: round(cost["seconds"], 1) for cost in (status.result or {}).get("costs", [])}


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

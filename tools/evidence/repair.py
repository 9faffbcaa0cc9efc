"""Does a repair of the cached scores make up for a teacher that is not the SFT teacher? Measured on the embedded task.

    python tools/evidence/repair.py --work DIR --seeds 1 2 3 4 5 --json FILE

Per seed three students are distilled with the same recipe: `consistent` (SFT on the teacher's own responses),
`mismatched` (SFT on the responses of a teacher of another style) and `repaired` (the same with distill.repair), each
from its own rollouts. Printed: greedy accuracy and reverse KL to the teacher on eval.jsonl, of the SFT students too,
and the share of the loss by mismatch that the repair recovers, with a t-interval over seeds.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.demo import SHORT_STEPS
from opd_mcp.engine import stages
from opd_mcp.engine.context import (
    BenchmarkInputs,
    Context,
    DistillInputs,
    ResponsesInputs,
    RolloutInputs,
    ScoreInputs,
    SftInputs,
)
from opd_mcp.schemas.reports import BenchmarkReport
from opd_mcp.schemas.resolve import resolve_recipe
from tools import EXAMPLE

TEACHER, OTHER_STYLE, STUDENT = (EXAMPLE / name for name in ("teacher", "teacher_other_style", "student"))
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # two-sided 95 % quantiles of t, by seeds


def students_of_seed(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy and reverse KL of every student of one seed."""
    recipe = resolve_recipe("demo", {"runtime.seed": seed, "benchmark.samples_per_prompt": 0} | SHORT_STEPS)
    context = Context(recipe.runtime, recipe.prompting)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    models: dict[str, Path] = {}
    for name, sft_teacher in (("sft", TEACHER), ("sft_other_style", OTHER_STYLE)):
        base = folder / name
        asked = ResponsesInputs(teacher=sft_teacher, prompts=EXAMPLE / "sft.jsonl")
        stages.generate_responses(recipe.responses, asked, base / "responses", context)
        given = SftInputs(student=STUDENT, responses=base / "responses")
        stages.sft(recipe.sft, given, base / "sft", context)
        models[name] = base / "sft"
        prompts = RolloutInputs(student=base / "sft", prompts=EXAMPLE / "opd.jsonl", tokenizer=TEACHER)
        stages.rollout(recipe.rollout, prompts, base / "rollouts", context)
        scored = ScoreInputs(
            student=base / "sft", rollouts=base / "rollouts", teacher=TEACHER, allow_teacher_mismatch=True
        )
        stages.score(recipe.score, scored, base / "cache", context)
    for name, source, repair in (
        ("consistent", "sft", "none"),
        ("mismatched", "sft_other_style", "none"),
        ("repaired", "sft_other_style", "residual"),
    ):
        cached = DistillInputs(student=models[source], cache=folder / source / "cache", allow_teacher_mismatch=True)
        section = recipe.distill.model_copy(update={"repair": repair})
        stages.distill(section, cached, folder / name, context)
        models[name] = folder / name
    measured = BenchmarkInputs(
        models=models, prompts=EXAMPLE / "eval.jsonl", recipe_hash=recipe.content_hash(), teacher=TEACHER
    )
    report: BenchmarkReport = stages.benchmark(recipe.benchmark, measured, folder / "report", context)
    return {
        score.name: {"accuracy": score.greedy_accuracy.value, "reverse_kl": score.reverse_kl.value}
        for score in report.models
        if score.greedy_accuracy and score.reverse_kl
    }


def recovered(seeds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The mean loss by mismatch, what the repair makes good of it, and 95 % t-intervals over seeds."""
    lost = [seed["consistent"]["accuracy"] - seed["mismatched"]["accuracy"] for seed in seeds]
    won = [seed["repaired"]["accuracy"] - seed["mismatched"]["accuracy"] for seed in seeds]
    return {
        "lost": t_interval(lost),
        "won_back": t_interval(won),
        "share": mean(won) / mean(lost) if mean(lost) else None,
    }


def t_interval(values: list[float]) -> list[float]:
    """Mean, and the ends of its 95 % t-interval; NaN for one value."""
    half = T95[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) in T95 else float("nan")
    return [mean(values), mean(values) - half, mean(values) + half]


def main() -> None:
    """Measure every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="models and caches go below this folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    seeds = []
    for seed in options.seeds:
        seeds.append(students_of_seed(seed, options.work / f"seed-{seed}"))
        row = ", ".join(
            f"{name} {value['accuracy']:.3f} / {value['reverse_kl']:.3f}" for name, value in seeds[-1].items()
        )
        print(f"seed {seed}: accuracy / reverse KL: {row}", flush=True)
    figures = {"seeds": dict(zip(map(str, options.seeds), seeds, strict=True)), "accuracy": recovered(seeds)}
    print(json.dumps(figures["accuracy"]))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

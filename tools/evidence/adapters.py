"""Does a LoRA adapter learn what full training learns? Measured on the embedded tasks, paired by run seed.

    python tools/evidence/adapters.py --work DIR --tasks arithmetic chain_sum --seeds 61 62 63 64 65 --json FILE

Per task the learning rate of each way is chosen on tune.jsonl with TUNING_SEEDS, from RATES. Then, per seed, both ways
distill the same SFT student from the same teacher cache, and eval.jsonl measures them: greedy accuracy, reverse KL to
the teacher, seconds of the loop, and how far the process grew. What was measured is kept in FILE after each training,
and an interrupted call goes on from there.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.demo import TaskName
from opd_mcp.engine import stages
from opd_mcp.engine.context import BenchmarkInputs, DistillInputs
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.reports import BenchmarkReport
from tools import EXAMPLE
from tools.demo.tune import Place, SeedFolder
from tools.evidence.repair import t_interval

Way = Literal["full", "lora"]
WAYS: tuple[Way, ...] = ("full", "lora")
TUNING_SEEDS: dict[TaskName, tuple[int, ...]] = {"arithmetic": (100, 101), "chain_sum": (100,)}
RANK = 8
# of the recipe's own rate, which was tuned for full training, and of larger ones, which an adapter takes
RATES: dict[TaskName, dict[Way, tuple[float, ...]]] = {
    "arithmetic": {"full": (1.5e-3, 3e-3, 6e-3, 1.2e-2), "lora": (5e-3, 1e-2, 2e-2, 4e-2)},
    "chain_sum": {"full": (2e-3, 4e-3, 8e-3), "lora": (5e-3, 1e-2, 2e-2)},
}
ESTIMATOR: dict[TaskName, str] = {"arithmetic": "sampled", "chain_sum": "topk_reverse_kl"}


def recipe_of(place: Place, seed: int, way: Way, rate: float) -> Recipe:
    """The task's recipe, trained this way at this rate; no key before the distillation depends on the way."""
    adapter = {"distill.adapter.rank": RANK} if way == "lora" else {}
    changes = {"runtime.seed": seed, "benchmark.samples_per_prompt": 0, "distill.estimator": ESTIMATOR[place.task]}
    return place.recipe(changes | {"distill.optimizer.learning_rate": rate} | adapter)


def tuning_accuracy(place: Place, seed: int, way: Way, rate: float) -> float:
    """Greedy accuracy on tune.jsonl."""
    recipe = recipe_of(place, seed, way, rate)
    return SeedFolder(place, recipe).distilled(f"{way}-{rate:g}", recipe).accuracy


def distilled(place: Place, seed: int, way: Way, rate: float) -> dict[str, float]:
    """Distill one student, in a process of its own, and say what it took: seconds, bytes, parameters."""
    recipe = recipe_of(place, seed, way, rate)
    folder = SeedFolder(place, recipe)
    given = DistillInputs(student=folder.sft(), cache=folder.cache())
    shutil.rmtree(folder.folder / way, ignore_errors=True)
    before = psutil.Process().memory_info().rss
    summary = stages.distill(recipe.distill, given, folder.folder / way, folder.context)
    assert summary.throughput is not None, "a training is timed"
    return {
        "seconds": summary.seconds,
        "grown_bytes": summary.throughput.peak_memory_bytes - before,
        "trained_parameters": summary.trained_parameters or summary.parameters,
    }


def evaluated(place: Place, seed: int, rates: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Accuracy and reverse KL of the SFT student and of both distilled ones on eval.jsonl."""
    recipe = recipe_of(place, seed, "full", rates["full"])
    folder = SeedFolder(place, recipe)
    measured = BenchmarkInputs(
        models={"sft": folder.sft(), **{way: folder.folder / way for way in WAYS}},
        prompts=folder.prompts / "eval.jsonl",
        recipe_hash=recipe.content_hash(),
        teacher=folder.teacher,
    )
    report: BenchmarkReport = stages.benchmark(recipe.benchmark, measured, folder.folder / "report", folder.context)
    return {
        score.name: {"accuracy": score.greedy_accuracy.value, "reverse_kl": score.reverse_kl.value}
        for score in report.models
        if score.greedy_accuracy and score.reverse_kl
    }


class Figures:
    """What was measured so far, as the JSON file holds it: per task the tried rates, the chosen ones, the seeds."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tasks: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def of(self, task: str) -> dict[str, Any]:
        """Those of one task."""
        return self.tasks.setdefault(task, {"tuning": {way: {} for way in WAYS}, "seeds": {}})

    def keep(self) -> None:
        """Write the file."""
        write_atomic(self.file, json.dumps(self.tasks, indent=2) + "\n")


def chosen_rates(tuning: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Of each way the rate with the highest mean accuracy on tune.jsonl; the first of equals."""
    return {way: float(max(tried, key=lambda rate: mean(tried[rate].values()))) for way, tried in tuning.items()}


def measure(place: Place, seeds: Iterable[int], figures: Figures) -> None:
    """Tune both ways, then train and evaluate every seed, except for what the figures have already."""
    found = figures.of(place.task)
    for seed, way in product(TUNING_SEEDS[place.task], WAYS):
        for rate in RATES[place.task][way]:
            by_seed = found["tuning"][way].setdefault(f"{rate:g}", {})
            if str(seed) not in by_seed:
                by_seed[str(seed)] = accuracy = tuning_accuracy(place, seed, way, rate)
                figures.keep()
                print(f"{place.task}, tune.jsonl, seed {seed}, {way} at {rate:g}: {accuracy:.3f}", flush=True)
    rates = chosen_rates(found["tuning"])
    for seed in seeds:
        row = found["seeds"].setdefault(str(seed), {})
        for way in WAYS:
            if way not in row:
                recipe = recipe_of(place, seed, way, rates[way])
                SeedFolder(place, recipe).cache()  # made here: the child's memory is that of the training
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    row[way] = pool.submit(distilled, place, seed, way, rates[way]).result()
                figures.keep()
        if "sft" not in row:
            for name, scores in evaluated(place, seed, rates).items():
                row[name] = row.get(name, {}) | scores
            figures.keep()
            print(f"{place.task}, seed {seed}: {json.dumps(row)}", flush=True)


def complete(found: Mapping[str, Any]) -> dict[str, Any]:
    """The seeds whose students were all evaluated."""
    return {seed: row for seed, row in found["seeds"].items() if "sft" in row}


def table(found: Mapping[str, Any]) -> list[str]:
    """A task's rows in Markdown, and the paired differences with 95 % t-intervals over seeds."""
    rates, seeds = chosen_rates(found["tuning"]), complete(found)
    lines = ["| seed | SFT | full | LoRA | LoRA − full | seconds, LoRA / full |", "|---|---|---|---|---|---|"]
    for seed, row in seeds.items():
        cells = [f"{row[name]['accuracy']:.3f}; {row[name]['reverse_kl']:.3f}" for name in ("sft", *WAYS)]
        gap = row["lora"]["accuracy"] - row["full"]["accuracy"]
        ratio = row["lora"]["seconds"] / row["full"]["seconds"]
        lines.append(f"| {seed} | {' | '.join(cells)} | {gap:+.3f} | {ratio:.2f} |")
    lines.append("")
    for measure_of, digits in (("accuracy", 3), ("reverse_kl", 4)):
        gaps = [row["lora"][measure_of] - row["full"][measure_of] for row in seeds.values()]
        if len(gaps) > 1:
            value, low, high = t_interval(gaps)
            lines.append(
                f"LoRA − full, {measure_of.replace('_', ' ')}: "
                f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] over {len(gaps)} seeds."
            )
    for way in WAYS if seeds else ():
        rows = [row[way] for row in seeds.values()]
        trained = int(rows[0]["trained_parameters"])
        tried = ", ".join(f"{rate}: {mean(each.values()):.3f}" for rate, each in found["tuning"][way].items())
        lines.append(
            f"{way}: rate {rates[way]:g} (on tune.jsonl {tried}), {trained:,} trained parameters, "
            f"{12 * trained / 1e6:.2f} MB of gradients and moments, the process grew by "
            f"{mean(row['grown_bytes'] for row in rows) / 2**20:.0f} MiB, {mean(row['seconds'] for row in rows):.1f} s."
        )
    return lines


def main() -> None:
    """Measure every task and seed and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="models and caches go below this folder")
    parser.add_argument("--tasks", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[61, 62, 63, 64, 65])
    parser.add_argument("--json", type=Path, required=True, help="the figures; what it has is not measured again")
    options = parser.parse_args()
    figures = Figures(options.json)
    for task in options.tasks:
        measure(Place(task, EXAMPLE.with_name(task) / "student", options.work), options.seeds, figures)
        print("\n".join([f"\n{task}\n", *table(figures.of(task))]), flush=True)


if __name__ == "__main__":
    main()

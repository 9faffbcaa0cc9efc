"""Choose the demo's student and its settings: the demo's arms through the engine's stages, measured on tune.jsonl.

    python tools/demo/tune.py --work DIR --initialisations 0 1 2 3 4 5 6 7 8 --seeds 100 101 102
    python tools/demo/tune.py --work DIR --arms sft lightning_sampled lightning_topk --seeds 100 101 102 103 104 105
    python tools/demo/tune.py --work DIR --arms lightning_topk --set distill.batch_size=256 --set distill.steps=200
    python tools/demo/tune.py --work DIR --task chain_sum --arms sft lightning_sampled --seeds 100 101

With `--initialisations` it compares the student's initial weights by SFT alone. The rule chooses, among those with
every seed between 0.25 and 0.60, the one whose mean accuracy is nearest to the middle. Without, it runs the arms with
the demo's settings and `--set` on top. Each seed's SFT student and teacher cache stay below `--work`, so that a
candidate repeats the distillation alone. It never opens the final evaluation set.
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.demo import TOPK_STEPS, TaskName, embedded_task
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
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.reports import BenchmarkReport, TrainingSummary
from opd_mcp.schemas.resolve import resolve_recipe
from tools import EXAMPLE
from tools.demo.data import write_student

WANTED_SFT = (0.25, 0.60)
SHARED_SECTIONS = ("runtime", "prompting", "responses", "sft", "rollout", "score", "benchmark")
ARMS: dict[str, dict[str, Any]] = {
    "sft": {},
    "lightning_sampled": {},
    "lightning_topk": {"distill.estimator": "topk_reverse_kl"} | TOPK_STEPS,
}


@dataclass(frozen=True)
class Outcome:
    """Greedy accuracy on tune.jsonl, and the seconds of the training loop."""

    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Place:
    """The task, the student of its candidates, and the folder for what they share."""

    task: TaskName
    student: Path
    work: Path

    @property
    def folder(self) -> Path:
        """The task's files."""
        return EXAMPLE.with_name(self.task)

    def recipe(self, overrides: Mapping[str, Any]) -> Recipe:
        """The recipe of the task's demo with the overrides."""
        arguments = embedded_task(self.task, {"student": str(EXAMPLE / "student")}).arguments
        return resolve_recipe(arguments["preset"], {**arguments.get("overrides", {}), **overrides})


def arms_of_seed(seed: int, *, place: Place, arms: list[str], overrides: Mapping[str, Any]) -> dict[str, Outcome]:
    """Outcomes of the arms with this run seed; SFT always, the others from its teacher cache."""
    shared = SeedFolder(place, place.recipe({"runtime.seed": seed} | _before_distill(overrides)))
    found = {"sft": shared.sft_outcome()}
    for arm in arms:
        if arm != "sft":
            recipe = place.recipe({"runtime.seed": seed} | ARMS[arm] | dict(overrides))
            found[arm] = shared.distilled(arm, recipe)
    return found


class SeedFolder:
    """What all candidates of one seed share: responses, SFT student, rollouts and teacher cache, each made once."""

    def __init__(self, place: Place, recipe: Recipe) -> None:
        self.prompts, self.teacher = place.folder, place.folder / "teacher"
        models = (place.student, self.teacher)
        weights = [hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() for path in models]
        sections = {name: getattr(recipe, name).to_dict() for name in SHARED_SECTIONS}
        self.folder = place.work / f"seed-{recipe.runtime.seed}-{content_hash([weights, sections])[:12]}"
        self.student, self.recipe = place.student, recipe
        self.context = Context(recipe.runtime, recipe.prompting)

    def sft(self) -> Path:
        """The SFT student."""
        recipe = self.recipe
        responses_of = ResponsesInputs(teacher=self.teacher, prompts=self.prompts / "sft.jsonl")
        responses = self._made(
            "responses",
            partial(stages.generate_responses, recipe.responses, responses_of),
        )
        return self._made("sft", partial(stages.sft, recipe.sft, SftInputs(student=self.student, responses=responses)))

    def sft_outcome(self) -> Outcome:
        """The SFT student's outcome."""
        return self._outcome("sft", self.sft())

    def cache(self) -> Path:
        """The teacher cache of the SFT student's rollouts."""
        recipe, student, prompts = self.recipe, self.sft(), self.prompts / "opd.jsonl"
        drawn = RolloutInputs(student=student, prompts=prompts, tokenizer=self.teacher)
        rollouts = self._made("rollouts", partial(stages.rollout, recipe.rollout, drawn))
        scored = ScoreInputs(student=student, rollouts=rollouts, teacher=self.teacher)
        return self._made("cache", partial(stages.score, recipe.score, scored))

    def distilled(self, arm: str, recipe: Recipe) -> Outcome:
        """The outcome of distilling from the shared cache with this recipe; replaces the arm's previous model."""
        student, cache = self.sft(), self.cache()
        for name in (arm, f"{arm}-report"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        model = self._made(arm, partial(stages.distill, recipe.distill, DistillInputs(student=student, cache=cache)))
        return self._outcome(arm, model)

    def _outcome(self, arm: str, model: Path) -> Outcome:
        recipe = self.recipe.benchmark.model_copy(update={"samples_per_prompt": 0})
        measure = partial(
            stages.benchmark,
            recipe,
            BenchmarkInputs(
                models={arm: model},
                prompts=self.prompts / "tune.jsonl",
                recipe_hash=self.recipe.content_hash(),
            ),
        )
        report = BenchmarkReport.from_json((self._made(f"{arm}-report", measure) / "report.json").read_text("utf-8"))
        summary = TrainingSummary.from_json((model / "training.json").read_text(encoding="utf-8"))
        accuracy = report.models[0].greedy_accuracy
        assert accuracy is not None, "the tuning prompts have answers"
        return Outcome(accuracy.value, summary.seconds)

    def _made(self, name: str, stage: Callable[..., object]) -> Path:
        output, building = self.folder / name, self.folder / f"{name}.building"
        if not output.is_dir():
            shutil.rmtree(building, ignore_errors=True)
            building.parent.mkdir(parents=True, exist_ok=True)
            stage(output=building, context=self.context)
            building.rename(output)
        return output


def outcome_table(seeds: list[int], rows: Mapping[str, list[Outcome]], title: str) -> list[str]:
    """One row per name: accuracy at each seed, the lowest, the mean, and the mean seconds of training."""
    heading = [title, *(f"seed {seed}" for seed in seeds), "least", "mean", "training, s"]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for name, outcomes in rows.items():
        accuracies = [outcome.accuracy for outcome in outcomes]
        numbers = [*accuracies, min(accuracies), float(np.mean(accuracies))]
        seconds = float(np.mean([outcome.seconds for outcome in outcomes]))
        lines.append(f"| {name} | {' | '.join(f'{number:.3f}' for number in numbers)} | {seconds:.1f} |")
    return lines


def chosen_initialisation(rows: Mapping[str, list[Outcome]]) -> str | None:
    """The initialisation with every seed inside WANTED_SFT and its mean nearest to the middle, or None."""
    low, high = WANTED_SFT
    inside = {name: row for name, row in rows.items() if all(low <= outcome.accuracy <= high for outcome in row)}
    middle = (low + high) / 2
    means = {name: float(np.mean([outcome.accuracy for outcome in row])) for name, row in inside.items()}
    return min(means, key=lambda name: abs(means[name] - middle), default=None)


def compare_initialisations(
    pool: ProcessPoolExecutor, place: Place, numbers: list[int], seeds: list[int], overrides: dict[str, Any]
) -> None:
    """Print the SFT accuracy of each initialisation, and which one the rule chooses."""
    pending = {}
    for number in numbers:
        student = place.work / "students" / str(number)
        if not student.is_dir():
            _WRITE_STUDENT[place.task](number, student)
        candidate = replace(place, student=student)
        task = partial(arms_of_seed, place=candidate, arms=["sft"], overrides=overrides)
        pending[str(number)] = [pool.submit(task, seed) for seed in seeds]
    rows = {name: [future.result()["sft"] for future in futures] for name, futures in pending.items()}
    print("\n".join(outcome_table(seeds, rows, "initialisation")))
    print(f"\nThe rule names initialisation {chosen_initialisation(rows) or '–: none is always inside'}.")


def compare_arms(
    pool: ProcessPoolExecutor, place: Place, arms: list[str], seeds: list[int], overrides: dict[str, Any]
) -> None:
    """Print the arms with the demo's settings and the overrides."""
    task = partial(arms_of_seed, place=place, arms=arms, overrides=overrides)
    results = list(pool.map(task, seeds))
    rows = {arm: [result[arm] for result in results] for arm in arms}
    print(
        "\n".join(
            outcome_table(
                seeds,
                rows,
                " ".join(f"{key}={json.dumps(value)}" for key, value in overrides.items()) or "the demo's settings",
            )
        )
    )


def override(text: str) -> tuple[str, Any]:
    """`key=value`, the value as JSON where it is JSON."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _before_distill(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if not key.startswith("distill.")}


def _chain_sum_student(number: int, student: Path) -> None:
    from tools.demo.chain_sum import write_student as write  # needs the extra `tasks`

    write(number, student)


_WRITE_STUDENT: dict[TaskName, Callable[[int, Path], None]] = {
    "arithmetic": write_student,
    "chain_sum": _chain_sum_student,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(_WRITE_STUDENT), default="arithmetic")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the candidates share")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104, 105], help="run seeds")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--set", dest="overrides", type=override, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--initialisations", type=int, nargs="+", help="compare these by SFT only")
    parser.add_argument("--jobs", type=int, default=2, help="seeds to run at a time, one thread each")
    arguments = parser.parse_args()
    print("`" + " ".join(["python", "tools/demo/tune.py", *sys.argv[1:]]) + "`\n", flush=True)
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        overrides = dict(arguments.overrides)
        place = Place(arguments.task, EXAMPLE.with_name(arguments.task) / "student", arguments.work)
        if arguments.initialisations:
            compare_initialisations(pool, place, arguments.initialisations, arguments.seeds, overrides)
        else:
            compare_arms(pool, place, arguments.arms, arguments.seeds, overrides)


if __name__ == "__main__":
    main()

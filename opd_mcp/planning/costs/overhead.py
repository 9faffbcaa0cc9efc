"""What an assessment's speeds say of a recipe: live against lightning, and the costs that later plans estimate by.

Lightning pays for rollouts and scores once, live at every step: C + S·t against S·(t + g), with the cache's cost C, S
steps, t seconds of training per step, and g of generating and scoring. Live is dearer from S = C/g steps on, or from
C/(S·g) students that share one cache.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.planning.costs.estimates import PhaseCost, models_token, work_name
from opd_mcp.planning.costs.run_workload import workload_of
from opd_mcp.planning.costs.workload import PROCESS_BYTES, Room, Workload
from opd_mcp.schemas.plans import MethodOverhead, Overhead
from opd_mcp.schemas.reports import Assessment, StageCost
from opd_mcp.schemas.runs import PhaseName, RunRequest
from opd_mcp.schemas.texts import byte_size

ASSESSMENT_FILE = "assessment.json"
MEASURED: Mapping[PhaseName, str] = {
    "generate_responses": "answer",
    "rollout": "generate",
    "score": "score",
    "sft": "sft",
    "distill": "distill",
}
"""The kind of work that an assessment measured of each phase."""
ONCE: tuple[PhaseName, ...] = ("rollout", "score", "distill")
"""What lightning takes beyond the SFT."""
HOUR = 3600.0


@dataclass(frozen=True)
class MeasuredWork:
    """A recipe's work, and the operations per second with which each kind of it was done."""

    workload: Workload
    assessment: Assessment

    def rate(self, name: PhaseName, work: str | None = None) -> float:
        """Operations per second, as a plan counts them, of a phase's work, or of another kind of the same work."""
        small = self.workload.of_assessment(self.assessment.rows)
        return small.work(name).flops / self.assessment.speed(work or MEASURED[name]).seconds

    def seconds(self, name: PhaseName) -> float:
        """What a phase of the recipe takes."""
        return self.workload.work(name).flops / self.rate(name)

    @property
    def overhead_per_step(self) -> float:
        """Seconds that a live step takes besides its training: a batch of rollouts and their scores."""
        recipe, rows = self.workload.recipe, self.workload.recipe.distill.batch_size
        one = recipe.model_copy(
            update={
                "rollout": recipe.rollout.model_copy(update={"count": rows}),
                "distill": recipe.distill.model_copy(update={"rounds": 1}),
            }
        )
        step = Workload(one, self.workload.student, self.workload.teacher, self.workload.data)
        drawn = step.work("rollout").flops / self.rate("rollout", "generate_live")
        return drawn + step.work("score").flops / self.rate("score")


def assessed(request: RunRequest, directory: Path, device: str) -> tuple[list[PhaseCost], Overhead]:
    """The costs by which plans of these models estimate, and what the asked recipe takes by either method."""
    assessment = Assessment.from_json((directory / ASSESSMENT_FILE).read_bytes())
    workload = workload_of(request.recipe, request.inputs, Room(device))
    assert workload is not None, "what was measured is here"
    found = MeasuredWork(workload, assessment)
    return _costs(found, device, models_token(request.recipe, request.inputs)), overhead_of(found)


def overhead_of(found: MeasuredWork) -> Overhead:
    """Live against lightning for the recipe that was assessed."""
    workload, assessment = found.workload, found.assessment
    steps = workload.recipe.distill.steps
    cache, training = found.seconds("rollout") + found.seconds("score"), found.seconds("distill")
    per_step = found.overhead_per_step
    once, live = cache + training, training + steps * per_step
    memory = {name: workload.work(name).memory for name in ONCE}
    heaviest = max(memory, key=lambda name: memory[name])
    measured_peak = max(speed.peak_memory_bytes for speed in assessment.speeds)
    return Overhead(
        methods=[
            MethodOverhead(
                method="lightning",
                seconds=round(once, 3),
                device_hours=once / HOUR,
                teacher_seconds=round(found.seconds("score"), 3),
                peak_memory_bytes=memory[heaviest] + PROCESS_BYTES,
            ),
            MethodOverhead(
                method="live",
                seconds=round(live, 3),
                device_hours=live / HOUR,
                teacher_seconds=round(live, 3),
                peak_memory_bytes=workload.live().work("distill").memory + PROCESS_BYTES,
            ),
        ],
        break_even_steps=math.ceil(cache / per_step),
        students_per_cache=max(1, math.ceil(cache / (steps * per_step))),
        start_seconds={name: round(seconds, 3) for name, seconds in assessment.load_seconds.items()},
        measured_peak_bytes=measured_peak,
        basis={
            "seconds": f"measured on {assessment.hardware}: {assessment.rows} rows, "
            f"{workload.recipe.assess.steps} steps of training; times the rows and steps of the recipe, every response "
            "at its full length; without the SFT, which both methods share",
            "peak_memory_bytes": f"computed, lightning's for phase {heaviest}; this run, which holds both models, "
            f"reached {byte_size(measured_peak)}",
            "devices": "a run holds one device for all of its phases; a teacher on a server holds one besides",
            "break_even_steps": f"the cache takes {cache:.3g} s once, fresh rollouts {per_step:.3g} s per step",
            "students_per_cache": f"the same, at {steps} steps",
        },
        assessment=assessment,
    )


def _costs(found: MeasuredWork, device: str, models: str | None) -> list[PhaseCost]:
    """By phase; without a token of the models nothing could tell whom the speeds are of."""
    if models is None:
        return []
    small = found.workload.of_assessment(found.assessment.rows)
    costs = [
        _cost(work_name(name, "lightning"), small.work(name).flops, found.assessment.speed(work).seconds)
        for name, work in MEASURED.items()
    ]
    steps = found.workload.recipe.distill.steps
    live = found.seconds("distill") + steps * found.overhead_per_step
    costs.append(_cost(work_name("distill", "live"), found.workload.live().work("distill").flops, live))
    return [cost.model_copy(update={"device": device, "models": models}) for cost in costs]


def _cost(work: str, flops: float, seconds: float) -> PhaseCost:
    cost = StageCost(stage=work.partition(":")[0], seconds=seconds)
    return PhaseCost(work=work, device="", expected_flops=flops, cost=cost)

"""What a method costs: time, memory and disk, each with its basis.

Time is what runs of this workspace have measured on the same kind of device, where there is such a run; otherwise it
follows from the stated assumptions below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from opd_mcp.devices.hardware import Target
from opd_mcp.planning.measured_speeds import PROCESS_START, PhaseCost, assumed_speed, work_name
from opd_mcp.planning.memory import memory_shortage
from opd_mcp.planning.workload import (
    PROCESS_BYTES,
    DataSize,
    Room,
    Work,
    checkpoint_disk,
    phase_disk,
    phase_work,
)
from opd_mcp.schemas.memory import ModelShape
from opd_mcp.schemas.plans import Finding, MethodEstimate, PhaseEstimate
from opd_mcp.schemas.recipes import Method, Recipe
from opd_mcp.schemas.runs import PhaseName, RunPhase
from opd_mcp.schemas.texts import byte_size

MEASUREMENTS_USED = 5
# Runs of models within this factor of the planned work's size tell something about it.
COMPARABLE_FACTOR = 30.0
ASSUMED_START_SECONDS = 8.0


@dataclass(frozen=True)
class Estimator:
    """Estimates for one pair of models and one set of prompts on one device."""

    recipe: Recipe
    student: ModelShape
    teacher: ModelShape
    data: DataSize
    target: Target
    measured: Sequence[PhaseCost] = ()

    def method(self, method: Method, phases: Sequence[RunPhase]) -> MethodEstimate:
        """The cost of those phases that no artifact satisfies."""
        pending = [phase for phase in phases if phase.satisfied_by is None]
        works = {phase.name: self.work(phase.name, method) for phase in pending}
        estimates = [self._phase(name, work, method) for name, work in works.items()]
        if estimates:
            estimates.insert(0, self._start())
        heaviest = max(works, key=lambda name: works[name].memory, default=None)
        peak = (works[heaviest].memory if heaviest else 0) + PROCESS_BYTES
        recipe = self.recipe
        products = sum(phase_disk(name, recipe, self.student, self.data) for name in works)
        checkpoints = max((checkpoint_disk(name, recipe, self.student) for name in works), default=0)
        return MethodEstimate(
            method=method,
            flops=sum(estimate.flops for estimate in estimates),
            seconds=sum(estimate.seconds for estimate in estimates),
            peak_memory_bytes=peak,
            disk_bytes=products + checkpoints,
            memory_basis=f"computed for phase {heaviest}: weights, optimizer, activations and logits of its largest "
            f"batch, plus {byte_size(PROCESS_BYTES)} for the process{_recomputed(works[heaviest])}"
            if heaviest
            else "nothing is left to compute",
            disk_basis="computed: models, token ids and log-probs of every response at full length, uncompressed, and "
            f"{byte_size(checkpoints)} for a training phase's checkpoints, which go when it ends",
            phases=estimates,
        )

    def work(self, name: PhaseName, method: Method) -> Work:
        """The work of one phase."""
        room = Room(self.target.kind, max(self.target.memory - PROCESS_BYTES, 0))
        return phase_work(name, self.recipe, self.student, self.teacher, self.data, method, room)

    def _start(self) -> PhaseEstimate:
        known = [cost.cost.seconds for cost in self.measured if cost.work == PROCESS_START]
        known = known[:MEASUREMENTS_USED]
        return PhaseEstimate(
            phase=PROCESS_START,
            flops=0.0,
            seconds=round(median(known), 3) if known else ASSUMED_START_SECONDS,
            basis=f"measured in {len(known)} earlier run(s): from the worker's launch until its engine was imported"
            if known
            else f"assumed: {ASSUMED_START_SECONDS:g} s to start Python and import torch and transformers",
        )

    def _phase(self, name: PhaseName, work: Work, method: Method) -> PhaseEstimate:
        if name == "fetch":
            return PhaseEstimate(phase=name, flops=0.0, seconds=0.0, basis="the download is not estimated")
        rates = self._measured_rates(work_name(name, method), work)
        if rates:
            seconds, source = (
                work.flops / median(rates),
                f"measured in {len(rates)} earlier run(s) on {self.target.kind}",
            )
        else:
            seconds, source = self._assumed_seconds(name, work, method)
        return PhaseEstimate(
            phase=name,
            flops=work.flops,
            seconds=round(seconds, 3),
            basis=f"{source}; every response counted at its full length, so an upper bound for the tokens",
        )

    def _measured_rates(self, name: str, work: Work) -> list[float]:
        comparable = [
            cost.expected_flops / cost.cost.seconds
            for cost in self.measured
            if cost.work == name
            and cost.device == self.target.kind
            and cost.cost.seconds > 0
            and work.flops / COMPARABLE_FACTOR < cost.expected_flops < work.flops * COMPARABLE_FACTOR
        ]
        return comparable[:MEASUREMENTS_USED]

    def _assumed_seconds(self, name: PhaseName, work: Work, method: Method) -> tuple[float, str]:
        speed = assumed_speed(self.target, self.recipe)
        generates = name in ("generate_responses", "rollout", "benchmark") or (name == "distill" and method == "live")
        rate = speed.generation if generates else speed.scoring if name == "score" else speed.training
        layers = self.teacher.layers if name in ("generate_responses", "score") else self.student.layers
        seconds = max(work.flops / rate, work.passes * layers * speed.layer_seconds)
        return seconds, f"assumed: {speed.label}, and {speed.layer_seconds * 1e6:.0f} µs a layer and pass at least"


def resource_findings(estimate: MethodEstimate, target: Target, disk_free: int) -> list[Finding]:
    """What the device or the disk is too small for."""
    shortage = memory_shortage(estimate.peak_memory_bytes, target)
    findings = [shortage] if shortage else []
    if estimate.disk_bytes > disk_free:
        findings.append(
            Finding(
                code="not_enough_disk",
                message=f"It writes up to {byte_size(estimate.disk_bytes)}; the workspace's disk has "
                f"{byte_size(disk_free)} free.",
                fix="Free disk space, move the workspace (OPD_HOME), or lower rollout.count or score.topk.",
            )
        )
    return findings


def _recomputed(work: Work) -> str:
    if work.checkpointing in (None, "none"):
        return ""
    return f"; {work.checkpointing} activation checkpointing, since it would not fit without or the recipe asks for it"

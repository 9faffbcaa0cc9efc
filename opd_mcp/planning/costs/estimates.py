"""What a method costs: time, memory and disk, each with its basis.

Time is what runs of this workspace have measured on the same kind of device, where there is such a run; otherwise it
follows from the stated assumptions below.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

from pydantic import Field, ValidationError

from opd_mcp.devices.hardware import Target
from opd_mcp.identity.models import ModelFacts
from opd_mcp.planning.costs.run_workload import workload_of
from opd_mcp.planning.costs.workload import PROCESS_BYTES, Room, Work, Workload, with_fitting_batches
from opd_mcp.planning.phases import HELPED, RANKED
from opd_mcp.schemas.base import Schema, content_hash
from opd_mcp.schemas.plans import FitOption, MethodEstimate, PhaseEstimate, WayToTrain
from opd_mcp.schemas.recipes import MANAGED_ENGINES, Method, Recipe, is_url
from opd_mcp.schemas.reports import StageCost
from opd_mcp.schemas.resolve import changed_recipe
from opd_mcp.schemas.runs import PhaseName, RunInputs, RunPhase, RunRequest
from opd_mcp.schemas.texts import byte_size

MEASUREMENTS_USED = 5
# Runs of models within this factor of the planned work's size tell something about it.
COMPARABLE_FACTOR = 30.0
ASSUMED_START_SECONDS = 8.0
# vLLM on loaded cores took 2 to 5 minutes; on a GPU it compiles and records graphs.
ASSUMED_ENGINE_START = 180.0
# of what as many devices would do alone: what they gather and add up costs time
ASSUMED_SCALING = 0.8


class PhaseCost(Schema):
    """One phase as it was estimated and as it went; `cost.json` of an artifact holds those that made it."""

    work: str
    device: str
    expected_flops: float
    cost: StageCost
    models: str | None = Field(None, description="of an assessment, whose speed holds for more rows: what it measured")
    engine_starts: list[float] | None = Field(None, description="seconds until its engine answered, at each start")


class ArtifactCosts(Schema):
    """`cost.json`: what the phases that made an artifact took."""

    phases: list[PhaseCost]


@dataclass(frozen=True)
class CostModel:
    """What the phases of a workload cost on one device, by what was measured there or is assumed."""

    workload: Workload
    target: Target
    measured: Sequence[PhaseCost] = ()
    models: str | None = None
    """As `models_token`."""

    def estimate(self, method: Method, phases: Sequence[RunPhase]) -> MethodEstimate:
        """The cost of those phases that no artifact satisfies."""
        workload = self.workload
        named, pending = (
            Counter(phase.name for phase in phases if all_of_them or phase.satisfied_by is None)
            for all_of_them in (True, False)
        )
        works = {name: self._everywhere(name, pending[name] / named[name]) for name in pending}
        estimates = [self._phase(name, work, pending[name]) for name, work in works.items()]
        if estimates:
            estimates.insert(0, self._start())
        heaviest = max(works, key=lambda name: works[name].memory, default=None)
        shares = heaviest in RANKED | HELPED and self.target.kind == "cpu"
        processes = PROCESS_BYTES * (self.target.devices_per_node if shares else 1)
        peak = (works[heaviest].memory if heaviest else 0) + processes
        checkpoints = max(map(workload.checkpoint_disk, works), default=0)
        return MethodEstimate(
            method=method,
            flops=sum(estimate.flops for estimate in estimates),
            seconds=sum(estimate.seconds for estimate in estimates),
            peak_memory_bytes=peak,
            disk_bytes=sum(map(workload.disk, works)) + checkpoints,
            memory_basis=f"computed for phase {heaviest}: weights, optimizer, activations and logits of its largest "
            f"batch, plus {byte_size(processes)} for the process{_recomputed(works[heaviest])}"
            if heaviest
            else "nothing is left to compute",
            disk_basis="computed: models, token ids and log-probs of every response at full length, uncompressed, and "
            f"{byte_size(checkpoints)} for a training phase's checkpoints, which go when it ends",
            phases=estimates,
        )

    def _everywhere(self, name: PhaseName, share: float) -> Work:
        """A share of a phase's work, with the memory of every process where they share the host's."""
        work = _share(self.workload.work(name), share)
        copies = self.target.devices_per_node if name in HELPED and is_divided(self.workload.recipe, name) else 1
        return replace(work, memory=copies * work.memory) if self.target.kind == "cpu" else work

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

    def _phase(self, name: PhaseName, work: Work, rounds: int) -> PhaseEstimate:
        if name == "fetch":
            size = self.workload.download_bytes
            basis = f"{byte_size(size)} to download" if size else "the download"
            return PhaseEstimate(
                phase=name,
                flops=0.0,
                seconds=0.0,
                basis=f"{basis}; how long that takes is not estimated",
                download_bytes=size or None,
            )
        engine = engine_of(self.workload.recipe, name)
        rates = self._measured_rates(work_of(self.workload.recipe, name), work)
        if rates:
            seconds, source = (
                work.flops / median(rates),
                f"measured in {len(rates)} earlier run(s) on {self.target.kind}",
            )
        else:
            seconds, source = self._assumed_seconds(name, work)
        starts = rounds * engine_starts(self.workload, name) if engine in MANAGED_ENGINES else 0
        each = self._engine_start(engine) if engine is not None and starts > 0 else 0.0
        if each > 0:
            seconds += each * starts
            of_what = "its engine's start" if starts == 1 else f"each of its engine's {starts} starts"
            source += f", and {each:.3g} s for {of_what}"
        if engine is not None:
            source = f"on {engine_name(engine)}, {source}"
        return PhaseEstimate(
            phase=name,
            flops=work.flops,
            seconds=round(seconds, 3),
            basis=f"{source}; every response counted at its full length, so an upper bound for the tokens",
            memory_bytes=work.memory + PROCESS_BYTES,
            batch_size=work.batch,
            kv_cache_bytes=work.kv_bytes,
            start_seconds=round(each * starts, 3) or None,
        )

    def _engine_start(self, engine: str) -> float:
        """Seconds until a managed engine answers, whatever the phase."""
        known = [
            start
            for cost in self.measured
            if engine in cost.work and cost.device == self.target.kind
            for start in cost.engine_starts or ()
        ]
        return median(known[:MEASUREMENTS_USED]) if known else ASSUMED_ENGINE_START

    def _measured_rates(self, name: str, work: Work) -> list[float]:
        comparable = [
            cost.expected_flops / seconds
            for cost in self.measured
            if cost.work == name
            and cost.device == self.target.kind
            and (seconds := cost.cost.seconds - sum(cost.engine_starts or ())) > 0
            and (
                work.flops / COMPARABLE_FACTOR < cost.expected_flops < work.flops * COMPARABLE_FACTOR
                if cost.models is None
                else cost.models == self.models
            )
        ]
        return comparable[:MEASUREMENTS_USED]

    def _assumed_seconds(self, name: PhaseName, work: Work) -> tuple[float, str]:
        workload = self.workload
        speed = assumed_speed(self.target, workload.recipe)
        live = name == "distill" and workload.recipe.distill.method == "live"
        generates = live or name in ("generate_responses", "rollout", "benchmark")
        rate = speed.generation if generates else speed.scoring if name == "score" else speed.training
        model = workload.teacher if name in ("generate_responses", "score") else workload.student
        label, devices = speed.label, self.target.devices if is_divided(workload.recipe, name) else 1
        if devices > 1:
            rate *= ASSUMED_SCALING * devices
            label = f"{label}, {devices} devices at {ASSUMED_SCALING:.0%} of that each"
        seconds = max(work.flops / rate, work.passes * model.layers * speed.layer_seconds)
        return seconds, f"assumed: {label}, and {speed.layer_seconds * 1e6:.0f} µs a layer and pass at least"


def estimate_of(
    request: RunRequest, target: Target, measured: Sequence[PhaseCost], inspect: Callable[[Path], ModelFacts]
) -> MethodEstimate | None:
    """What a run takes on the target, by earlier measured costs; None where `workload_of` knows no workload."""
    workload = workload_of(request.recipe, request.inputs, room_of(target), inspect)
    if workload is None:
        return None
    method: Method = "sft" if request.kind == "sft" else request.recipe.distill.method
    models = models_token(request.recipe, request.inputs)
    estimate = CostModel(workload, target, measured, models).estimate(method, request.phases)
    given = (request.inputs.student, request.inputs.teacher, request.inputs.model)
    by_hub = [model.reference for model in given if model is not None and model.path is None]
    if not by_hub:
        return estimate
    basis = f"{estimate.memory_basis}; sizes of {' and '.join(by_hub)} as the Hub gives them, before their download"
    return estimate.model_copy(update={"memory_basis": basis})


def models_token(recipe: Recipe, inputs: RunInputs) -> str | None:
    """What an assessed speed holds for: the two models' configurations and sizes, whatever their weights, and dtype.

    None while a model is still to be fetched, or where its configuration is not known.
    """
    models = [inputs.student or inputs.model, inputs.teacher]
    parts = [[m.identity.configuration, m.parameters] for m in models if m and m.identity and m.identity.configuration]
    runtime = recipe.runtime
    return content_hash([parts, runtime.dtype, runtime.threads]) if len(parts) == len(models) else None


LEAST_MICRO_BATCH_TOKENS = 1024
FACTORS = (1, 2, 4, 8, 16, 32)
BATCHES = ("rollout", "responses", "benchmark")


def fit_options(request: RunRequest, target: Target, inspect: Callable[[Path], ModelFacts]) -> list[FitOption]:
    """All weights trained, adapters, and adapters on a 4-bit base: each with the largest batches with which it fits.

    Empty where nothing is trained, or a model is still to be fetched.
    """
    pending = {phase.name for phase in request.phases if phase.satisfied_by is None}
    ways: tuple[WayToTrain, ...] = get_args(WayToTrain) if pending & {"sft", "distill"} else ()
    if request.recipe.runtime.devices != 1:
        ways = tuple(way for way in ways if way != "lora_4bit")
    found: list[FitOption] = []
    for way in ways:
        option: FitOption | None = None
        for factor in FACTORS:
            changes = _trained_so(way, request.recipe) | (_smaller(request.recipe, factor) if factor > 1 else {})
            option = _fit_option(way, request, changes, target, inspect)
            if option is None or option.fits:
                break
        if option is not None:
            found.append(option)
    return found


def _trained_so(way: WayToTrain, recipe: Recipe) -> dict[str, Any]:
    """The changes that turn adapters and 4-bit bases on or off where they are not so already."""
    changes: dict[str, Any] = {}
    quantization = "nf4" if way == "lora_4bit" else None
    for name, section in (("sft", recipe.sft), ("distill", recipe.distill)):
        if way == "full":
            changes |= {f"{name}.adapter": None} if section.adapter is not None else {}
            continue
        if section.adapter is None:
            changes[f"{name}.adapter"] = {"quantization": quantization} if quantization else {}
        elif section.adapter.quantization != quantization:
            changes[f"{name}.adapter.quantization"] = quantization
        if name == "sft" and section.adapter is not None and quantization and section.adapter.save is not None:
            changes["sft.adapter.save"] = "adapter"  # a merged student is not rounded to 4 bits again
        if section.optimizer.precision != "fp32_master":
            changes[f"{name}.optimizer.precision"] = "fp32_master"
    return changes


def _smaller(recipe: Recipe, factor: int) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name in ("sft", "distill", "score"):
        tokens = getattr(recipe, name).micro_batch_tokens
        changes[f"{name}.micro_batch_tokens"] = min(tokens, max(tokens // factor, LEAST_MICRO_BATCH_TOKENS))
    for name in BATCHES:
        changes[f"{name}.batch_size"] = max(getattr(recipe, name).batch_size // factor, 1)
    return changes


def _fit_option(
    way: WayToTrain,
    request: RunRequest,
    changes: dict[str, Any],
    target: Target,
    inspect: Callable[[Path], ModelFacts],
) -> FitOption | None:
    recipe = changed_recipe(request.recipe, changes)
    workload = workload_of(recipe, request.inputs, room_of(target), inspect)
    if workload is None:
        return None
    works = {phase.name: workload.work(phase.name) for phase in request.phases if phase.satisfied_by is None}
    training = max((works[name] for name in works if works[name].checkpointing), key=lambda work: work.memory)
    peak = max(work.memory for work in works.values()) + PROCESS_BYTES
    micro = max(getattr(recipe, name).micro_batch_tokens for name in works if works[name].checkpointing)
    sections = {"responses" if name == "generate_responses" else name for name in works}
    assert training.checkpointing is not None, "a training phase has a policy"
    return FitOption(
        name=way,
        fits=peak <= target.memory - target.claimed,
        peak_memory_bytes=peak,
        checkpointing=training.checkpointing,
        micro_batch_tokens=micro,
        overrides={key: value for key, value in changes.items() if key.split(".")[0] in sections},
    )


def recipe_for_device(
    recipe: Recipe,
    inputs: RunInputs,
    target: Target,
    phases: Iterable[PhaseName],
    named: Collection[str],
    inspect: Callable[[Path], ModelFacts],
) -> Recipe:
    """The recipe with batches for these phases that the device's whole memory holds, whatever of it is free now.

    Keys that were `named` stay; all do while a model is still to be fetched. A teacher on a server takes no room here.
    """
    if inputs.teacher is not None and inputs.teacher.url is not None:
        inputs = inputs.model_copy(update={"teacher": None})
    room = Room(target.kind, max((target.capacity or target.memory) - PROCESS_BYTES, 0))
    workload = workload_of(recipe, inputs, room, inspect)
    return recipe if workload is None else with_fitting_batches(workload, phases, named)


def room_of(target: Target) -> Room:
    """What of a target is there for a run's tensors."""
    processes = target.devices_per_node if target.kind == "cpu" else 1
    return Room(target.kind, max(target.memory - processes * PROCESS_BYTES, 0), target.devices, target.nodes)


def _share(work: Work, share: float) -> Work:
    """The work of those rounds of a phase that are still to be done."""
    return work if share == 1 else replace(work, flops=work.flops * share, passes=work.passes * share)


def _recomputed(work: Work) -> str:
    held = (
        f"; {work.replicas} groups of devices each hold the student, since it fits a node or the recipe asks for it"
        if work.replicas > 1
        else ""
    )
    if work.checkpointing in (None, "none"):
        return held
    why = "since it would not fit without or the recipe asks for it"
    return f"{held}; {work.checkpointing} activation checkpointing, {why}"


COST_FILE = "cost.json"
MEASUREMENTS_READ = 60
PROCESS_START = "process_start"


def work_name(phase: str, method: str, engine: str | None = None) -> str:
    """What measured costs are compared by: the phase, for `distill` its method as well, and an engine's name."""
    name = f"{phase}:{method}" if phase == "distill" else phase
    return name if engine is None else f"{name}@{engine_name(engine)}"


def engine_name(engine: str) -> str:
    """What an engine is called in estimates."""
    return "a server" if is_url(engine) else engine


def work_of(recipe: Recipe, phase: PhaseName) -> str:
    """The name of a phase's work under this recipe; on several devices another one than on one."""
    engine = engine_of(recipe, phase)
    name = work_name(phase, recipe.distill.method, engine)
    devices = recipe.runtime.devices if is_divided(recipe, phase) or engine in MANAGED_ENGINES else 1
    return name if devices == 1 else f"{name}*{devices}"


def is_divided(recipe: Recipe, phase: PhaseName) -> bool:
    """Whether several devices compute the phase where the run has them: an engine has one."""
    return phase in RANKED or (phase in HELPED and engine_of(recipe, phase) is None)


def engine_of(recipe: Recipe, phase: str) -> str | None:
    """The engine of a phase; None for this program's own."""
    engines = {
        "generate_responses": recipe.responses.engine,
        "rollout": recipe.rollout.engine,
        "score": recipe.score.engine,
        "benchmark": recipe.benchmark.engine,
        "distill": recipe.rollout.engine if recipe.distill.method == "live" else None,
    }
    return engines.get(phase)


def engine_starts(workload: Workload, phase: str) -> int:
    """How often a phase starts its engine: for each model of a report, and not for the scores of a student that is its
    own teacher.

    The engine of the rollouts stays for them. One whose student is trained meanwhile takes new weights in place.
    """
    recipe = workload.recipe
    if phase == "benchmark":
        return workload.reported_models
    shared = phase == "score" and recipe.sft.skip and recipe.rollout.engine == recipe.score.engine
    return 0 if shared else 1


@dataclass(frozen=True)
class Speed:
    """Assumed operations a second by kind of work, and the seconds that one layer's forward pass takes at least."""

    generation: float
    training: float
    scoring: float
    layer_seconds: float
    label: str


def assumed_speed(target: Target, recipe: Recipe) -> Speed:
    """What is assumed of a device on which nothing was measured yet."""
    if target.kind == "cpu":
        each = recipe.runtime.threads * 1e9
        label = f"{target.name} at 20 GFLOP/s a thread (generating 8, scoring 40)"
        return Speed(8 * each, 20 * each, 40 * each, 2.5e-4, label)
    if recipe.runtime.dtype == "bfloat16":
        # about half of the operations a second that an H200 did (docs/performance.md), and its time a layer when steps
        # are replayed: which GPU it will be is not known
        return Speed(1e13, 2e14, 3e14, 1.5e-4, f"{target.name} at 200 TFLOP/s (generating 10, scoring 300)")
    return Speed(2e12, 2e13, 3e13, 1.5e-4, f"{target.name} at 20 TFLOP/s (generating 2, scoring 30)")


def measured_costs(artifacts: Path) -> list[PhaseCost]:
    """The newest phase costs recorded with the artifacts `<kind>/<id>/cost.json` below the folder."""
    found = [(path.stat().st_mtime, path) for path in artifacts.glob(f"*/*/{COST_FILE}")]
    costs: list[PhaseCost] = []
    for _, path in sorted(found, reverse=True)[:MEASUREMENTS_READ]:
        try:
            costs += ArtifactCosts.from_json(path.read_bytes()).phases
        except (OSError, ValidationError):
            continue  # a hint for estimates only: another version's file is as good as none
    return costs


def recorded_cost(artifact: Path, name: PhaseName) -> StageCost | None:
    """What a phase took when it made this artifact; None when its cost.json does not say."""
    try:
        costs = ArtifactCosts.from_json((artifact / COST_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return next((known.cost for known in costs.phases if known.cost.stage == name), None)

"""The phases of a run in order: each is reused, or computed and published as an artifact."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_mcp.devices.hardware import free_disk
from opd_mcp.identity.files import write_atomic
from opd_mcp.planning.costs.estimates import (
    COST_FILE,
    PROCESS_START,
    ArtifactCosts,
    PhaseCost,
    engine_of,
    recorded_cost,
    work_of,
)
from opd_mcp.planning.costs.overhead import assessed
from opd_mcp.planning.phases import KEY_DIGITS, PUBLISHED, RESUMABLE, Product, product
from opd_mcp.schemas.errors import ResourceError, RunError
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.reports import BenchmarkReport, StageCost, summed_costs
from opd_mcp.schemas.runs import PhaseName, RunPhase, RunRecord
from opd_mcp.schemas.texts import byte_size
from opd_mcp.store.artifacts import ArtifactStore, require_intact
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.journal import JournalWriter
from opd_mcp.worker.exporting import Exporting
from opd_mcp.worker.held_engine import HeldEngine
from opd_mcp.worker.journal_reporter import JournalReporter
from opd_mcp.worker.results import report_figures, rounded, sampled
from opd_mcp.worker.stage_calls import TRAINING_FILE, StageCalls, checkpoints_of

if TYPE_CHECKING:
    from opd_mcp.worker.hub_upload import HubExport

REPORT_FILE = "report.json"
REPORT_PAGE = "report.html"
ROLLOUTS = "rollouts"


@dataclass
class Pipeline:
    """Takes one run through its phases; `flops` and `disk` say what a phase is expected to compute and to write.

    `launch_seconds` is the time from the process's launch until its place in the queue.
    """

    record: RunRecord
    directory: Path
    artifacts: ArtifactStore
    journal: JournalWriter
    reporter: JournalReporter
    calls: StageCalls
    device: str
    flops: Callable[[PhaseName], float]
    disk: Callable[[PhaseName], int]
    engine: HeldEngine
    launch_seconds: float = 0.0
    hub_token: str | None = field(default=None, repr=False)
    engine_starts: list[float] = field(default_factory=list)
    """Seconds that each start of an engine took in the phase that is computed; whoever starts them adds to it."""
    pending: list[PhaseCost] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=lambda: {"artifacts": {}, "paths": {}})
    held: ExitStack = field(default_factory=ExitStack)

    def run(self) -> dict[str, Any]:
        """The run's result after all phases except `fetch`; raises the stages' errors."""
        phases = [phase for phase in self.record.request.phases if phase.name != "fetch"]
        kinds = [engine_of(self.record.request.recipe, phase.name) for phase in phases]
        with ExitStack() as self.held:
            self.held.callback(self.engine.release)
            for position, phase in enumerate(phases):
                self.engine.begin(kinds[position:])
                if self.reporter.should_stop():
                    raise run_cancelled()
                if phase.name == "export" and self._exporting.is_done():
                    self.reporter.begin(phase.name)
                    self.result |= self._exporting.result()
                    self.journal.append("phase", {"phase": phase.name, "event": "finished"})
                    continue
                if self._is_over(phase):
                    self._skipped(phase)
                    continue
                # Rollouts are only an intermediate of the cache that comes next.
                holder = phases[position + 1] if phase.name == "rollout" else phase
                if self._reused(phase, holder):
                    continue
                building = self._building(phase)
                # Another run may have made it while this one waited for the directory.
                if not self._reused(phase, holder):
                    self._computed(phase, building)
        self.result["costs"] = [cost.to_dict() for cost in summed_costs(self.calls.costs)]
        return rounded(self.result)

    def _is_over(self, phase: RunPhase) -> bool:
        """Whether the rounds before this phase's have taken all steps, as those that end by staleness may."""
        distill = self.record.request.recipe.distill
        if phase.round is None or phase.round == 1 or distill.round_trigger != "stale":
            return False
        return self.calls.steps_taken() >= distill.steps

    def _skipped(self, phase: RunPhase) -> None:
        self.reporter.begin(phase.name, phase.round)
        self.journal.append("phase", {**_of(phase), "event": "finished", "skipped": True})

    def _reused(self, phase: RunPhase, holder: RunPhase) -> bool:
        made = self._product(holder)
        found = self.artifacts.find_made(made.kind, made.artifact_id, holder.key) if made else None
        if found is None:
            return False
        require_intact(found)
        self.pending = []  # rollouts whose cache another run has finished meanwhile
        self.reporter.begin(phase.name, phase.round)
        event: dict[str, Any] = {**_of(phase), "event": "reused", "artifact_id": found.artifact_id}
        cost = recorded_cost(found.path, phase.name)
        if cost is not None:
            # The work of an earlier attempt counts as this run's.
            reused = found.record.run_id != self.record.run_id
            cost = cost.model_copy(update={"reused": reused, "round": phase.round})
            self.calls.costs.append(cost)
            event["cost"] = cost.to_dict()
        if phase is holder:
            self._take(phase.name, found.artifact_id, found.path)
        self.journal.append("phase", event)
        return True

    def _computed(self, phase: RunPhase, building: Path) -> None:
        self.reporter.begin(phase.name, phase.round)
        made = self._product(phase)
        event: dict[str, Any] = {**_of(phase), "event": "finished"}
        written = tree_bytes(checkpoints_of(self.directory, phase.label))
        require_disk(self.directory, self.disk(phase.name) // self._rounds(phase) - written, phase.name)
        first = self.calls.loading_seconds is None
        self.engine_starts.clear()
        spent = time.process_time()
        cost = self.calls.compute(phase.name, building, phase.round)
        cost = cost.model_copy(update={"processor_seconds": time.process_time() - spent})
        if first and self.calls.loading_seconds is not None:
            self.pending.append(self._start_cost(self.calls.loading_seconds))
        self.pending.append(self._phase_cost(phase, cost))
        if phase.name == "assess":
            self.pending += assessed(self.record.request, building, self.device)[0]
        if made is None:
            if phase.name == "sample":
                self.result |= sampled(building)
            elif phase.name == "export":
                self._exporting.published(building)
                self.result |= self._exporting.result()
            else:
                self.calls.paths[ROLLOUTS] = building
        else:
            write_atomic(building / COST_FILE, ArtifactCosts(phases=self.pending).to_json(indent=2) + "\n")
            artifact = self.artifacts.publish(
                made.kind,
                building,
                artifact_id=made.artifact_id,
                key=phase.key,
                run_id=self.record.run_id,
                check_fence=self.journal.check_fence,
            )
            self.pending = []
            self._take(phase.name, artifact.artifact_id, artifact.path)
            event["artifact_id"] = artifact.artifact_id
            if phase.name == "score":
                shutil.rmtree(self.calls.paths.pop(ROLLOUTS), ignore_errors=True)
        self.calls.costs.append(cost)
        self.journal.append("phase", {**event, "cost": cost.to_dict()})
        shutil.rmtree(checkpoints_of(self.directory, phase.label), ignore_errors=True)

    def _building(self, phase: RunPhase) -> Path:
        """Where the phase builds; rollouts and scores in directories that the next run with the same key resumes."""
        if phase.name in RESUMABLE:
            name = f"{phase.name}-{phase.key[:KEY_DIGITS]}"
            held = self.artifacts.resumable_directory("cache", name, self.reporter.should_stop)
            building = self.held.enter_context(held)
            if building is None:
                raise run_cancelled()
            return building
        if phase.name == "export":
            self.held.callback(self._exporting.remove_building)
            return self._exporting.building()
        made = self._product(phase)
        if made is None:  # in the run's own directory, which a suspended earlier attempt may still write to
            return self.directory / f"{phase.name}-{self.journal.attempt}"
        building = self.artifacts.new_building_directory(made.kind)
        self.held.callback(shutil.rmtree, building, ignore_errors=True)
        # A model's lineage names its directory, so it is built under its final name.
        named = building / made.artifact_id
        named.mkdir(mode=0o700)
        return named

    @property
    def _exporting(self) -> "Exporting | HubExport":
        inputs = self.record.request.inputs
        if inputs.export is None or inputs.export.hub_id is None:
            return Exporting(inputs, self.directory, self.artifacts, self.journal)
        from opd_mcp.worker.hub_upload import HubExport  # with the packages that only an upload needs

        return HubExport(inputs, self.directory, self.artifacts, self.journal, self.hub_token)

    def _product(self, phase: RunPhase) -> Product | None:
        return product(phase.name, phase.key, self.record.request.recipe.distill.method)

    def _start_cost(self, loading_seconds: float) -> PhaseCost:
        cost = StageCost(stage=PROCESS_START, seconds=self.launch_seconds + loading_seconds)
        return PhaseCost(work=PROCESS_START, device=self.device, expected_flops=0.0, cost=cost)

    def _phase_cost(self, phase: RunPhase, cost: StageCost) -> PhaseCost:
        recipe, name = self.record.request.recipe, phase.name
        expected = self.flops(name) / self._rounds(phase)
        starts = [round(seconds, 3) for seconds in self.engine_starts] or None
        work = work_of(recipe, name)
        return PhaseCost(work=work, device=self.device, expected_flops=expected, cost=cost, engine_starts=starts)

    def _rounds(self, phase: RunPhase) -> int:
        """How many phases share what is expected of all with this name."""
        return self.record.request.recipe.distill.rounds if phase.round is not None else 1

    def _take(self, name: PhaseName, artifact_id: str, path: Path) -> None:
        """Make a phase's artifact an input of later phases and part of the result."""
        role, paths = PUBLISHED[name].role, self.calls.paths
        if name == "sft":
            paths["base"], paths["student"] = paths["student"], path
        paths[role] = path
        self.result["artifacts"][role] = artifact_id
        self.result["paths"][role] = str(path)
        if name in ("sft", "distill") and (path / TRAINING_FILE).is_file():
            training = json.loads((path / TRAINING_FILE).read_bytes())
            self.result.setdefault("training", {})[name] = training
            if "round" in training:
                self.result.setdefault("rounds", []).append({**training["round"], "model": artifact_id})
        if name == "assess":
            self.result["overhead"] = assessed(self.record.request, path, self.device)[1].to_dict()
        if name == "benchmark":
            self.result.update(report_figures(BenchmarkReport.from_json((path / REPORT_FILE).read_bytes())))
            if (path / REPORT_PAGE).is_file():
                self.result["paths"]["report_page"] = str(path / REPORT_PAGE)


def _of(phase: RunPhase) -> dict[str, Any]:
    """How the journal's lines name a phase."""
    return {"phase": phase.name} | ({} if phase.round is None else {"round": phase.round})


def require_disk(directory: Path, needed: int, phase: PhaseName) -> None:
    """Raise ResourceError `not_enough_disk` if a phase is expected to write more than the disk has free."""
    free = free_disk(directory)
    if needed > free:
        raise ResourceError(
            "not_enough_disk",
            f"Phase {phase} writes up to {byte_size(needed)}; the disk has {byte_size(free)} free.",
            value=directory,
            fix="Free disk space (opd-mcp gc shows what is unused), then resume the run.",
            call=resume_call(),
        )


def run_cancelled() -> RunError:
    """The error of a run that was asked to stop."""
    return RunError("run_cancelled", "The run was asked to stop.", fix="Resume the run to go on.", call=resume_call())

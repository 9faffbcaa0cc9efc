"""The phases of a run, one after the other: each is reused, or computed and published as an artifact."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from opd_mcp.identity.data import PromptRow, read_prompts
from opd_mcp.identity.files import write_atomic
from opd_mcp.jobs.estimates import COST_FILE, ArtifactCosts, PhaseCost, work_name
from opd_mcp.jobs.phases import Product, product
from opd_mcp.jobs.reporting import JournalReporter
from opd_mcp.jobs.results import report_figures, rounded
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.identity import TeacherClaim
from opd_mcp.schemas.reports import BenchmarkReport, StageCost, TrainingSummary
from opd_mcp.schemas.runs import ModelInput, PhaseName, RunPhase, RunRecord
from opd_mcp.store.artifacts import ArtifactStore
from opd_mcp.store.journal import JournalWriter

REPORT_FILE = "report.json"
TRAINING_FILE = "training.json"
TOKENIZER_FOLDER = "tokenizer"


class Stages(Protocol):
    """The engine's stages, or a stand-in for them."""

    generate_responses: Callable[..., StageCost]
    sft: Callable[..., TrainingSummary]
    rollout: Callable[..., StageCost]
    score: Callable[..., StageCost]
    distill: Callable[..., TrainingSummary]
    benchmark: Callable[..., BenchmarkReport]


@dataclass
class Pipeline:
    """One run's way through its phases; stages are given `context`, and `flops` says how much work a phase is."""

    record: RunRecord
    directory: Path
    artifacts: ArtifactStore
    journal: JournalWriter
    reporter: JournalReporter
    load_stages: Callable[[], Stages]
    context: Any
    device: str
    flops: Callable[[PhaseName], float]
    paths: dict[str, Path] = field(default_factory=dict)
    costs: list[StageCost] = field(default_factory=list)
    pending: list[PhaseCost] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = self.record.request.inputs
        for role, model in (("student", inputs.student), ("teacher", inputs.teacher), ("model", inputs.model)):
            self._know(role, model.path if model else None)
        for role in ("prompts", "sft_prompts", "eval_prompts", "responses", "cache"):
            data = getattr(inputs, role)
            self._know(role, data.path if data else None)
        self.result = {"artifacts": {}, "paths": {}}

    def run(self) -> dict[str, Any]:
        """The run's result, after all phases that are not `fetch`; raises what the stages raise."""
        phases = [phase for phase in self.record.request.phases if phase.name != "fetch"]
        for position, phase in enumerate(phases):
            if self.reporter.should_stop():
                raise run_cancelled()
            # Rollouts are only an intermediate of the cache that comes next.
            holder = phases[position + 1] if phase.name == "rollout" else phase
            if not self._reused(phase, holder):
                self._computed(phase)
        self.result["costs"] = [cost.to_dict() for cost in self.costs]
        return rounded(self.result)

    @cached_property
    def stages(self) -> Stages:
        """The stages, loaded when the first phase has to be computed: a run that reuses everything needs none."""
        return self.load_stages()

    def _know(self, role: str, path: str | Path | None) -> None:
        if path is not None:
            self.paths[role] = Path(path)

    def _reused(self, phase: RunPhase, holder: RunPhase) -> bool:
        made = self._product(holder)
        found = self.artifacts.find_by_key(made.kind, holder.key) if made else None
        if found is None:
            return False
        self.journal.append("phase", {"phase": phase.name, "event": "started"})
        cost = recorded_cost(found.path, phase.name)
        if cost is not None:
            cost = cost.model_copy(update={"reused": True})
            self.costs.append(cost)
        event = {"phase": phase.name, "event": "reused", "artifact_id": found.artifact_id}
        if phase is holder:
            self._take(phase.name, found.artifact_id, found.path)
        self.journal.append("phase", event if cost is None else {**event, "cost": cost.to_dict()})
        return True

    def _computed(self, phase: RunPhase) -> None:
        self.journal.append("phase", {"phase": phase.name, "event": "started"})
        made = self._product(phase)
        if made is None:
            output = self.directory / phase.name
            shutil.rmtree(output, ignore_errors=True)
            cost = self._stage(phase.name, output)
            self._know("rollouts", output)
            self.pending.append(self._phase_cost(phase.name, cost))
            event: dict[str, Any] = {}
        else:
            with self._building(made) as building:
                cost = self._stage(phase.name, building)
                self.pending.append(self._phase_cost(phase.name, cost))
                write_atomic(building / COST_FILE, ArtifactCosts(phases=self.pending).to_json(indent=2) + "\n")
                artifact = self.artifacts.publish(
                    made.kind, building, artifact_id=made.artifact_id, key=phase.key, run_id=self.record.run_id
                )
            self.pending = []
            self._take(phase.name, artifact.artifact_id, artifact.path)
            event = {"artifact_id": artifact.artifact_id}
            if phase.name == "score":
                shutil.rmtree(self.paths.pop("rollouts"), ignore_errors=True)
        self.costs.append(cost)
        self.journal.append("phase", {"phase": phase.name, "event": "finished", "cost": cost.to_dict(), **event})

    @contextmanager
    def _building(self, made: Product) -> Iterator[Path]:
        building = self.artifacts.new_building_directory(made.kind)
        try:
            yield building
        finally:
            shutil.rmtree(building, ignore_errors=True)  # gone already when it was published

    def _product(self, phase: RunPhase) -> Product | None:
        return product(phase.name, phase.key, self.record.request.recipe.distill.method)

    def _phase_cost(self, name: PhaseName, cost: StageCost) -> PhaseCost:
        method = self.record.request.recipe.distill.method
        return PhaseCost(work=work_name(name, method), device=self.device, expected_flops=self.flops(name), cost=cost)

    def _take(self, name: PhaseName, artifact_id: str, path: Path) -> None:
        """Make a phase's artifact the input of the next ones, and a part of the result."""
        match name:
            case "generate_responses":
                role = "responses"
            case "sft":
                self._know("base", self.paths.get("student"))
                self.paths["student"], role = path, "sft"
            case "score":
                role = "cache"
            case "distill":
                role = "model"
            case _:
                role = "report"
        self._know(role, path)
        self.result["artifacts"][role] = artifact_id
        self.result["paths"][role] = str(path)
        if name in ("sft", "distill") and (path / TRAINING_FILE).is_file():
            self.result.setdefault("training", {})[name] = json.loads((path / TRAINING_FILE).read_bytes())
        if name == "benchmark":
            self.result.update(report_figures(BenchmarkReport.from_json((path / REPORT_FILE).read_bytes())))

    def _stage(self, name: PhaseName, output: Path) -> StageCost:
        recipe, paths, common = self.record.request.recipe, self.paths, {"output": output, "context": self.context}
        match name:
            case "generate_responses":
                prompts = paths.get("sft_prompts") or paths["prompts"]
                return self.stages.generate_responses(
                    recipe.responses, teacher=paths["teacher"], prompts=prompts, **common
                )
            case "sft":
                return training_cost(name, self._sft(common))
            case "rollout":
                return self.stages.rollout(
                    recipe.rollout,
                    student=paths["student"],
                    prompts=paths["prompts"],
                    tokenizer=paths["teacher"],
                    **common,
                )
            case "score":
                return self.stages.score(
                    recipe.score,
                    teacher=paths["teacher"],
                    student=paths["student"],
                    rollouts=paths["rollouts"],
                    **self._claims(),
                    **common,
                )
            case "distill":
                return training_cost(name, self._distill(common))
            case _:
                return self._benchmark(common)

    def _sft(self, common: Mapping[str, Any]) -> TrainingSummary:
        paths, responses = self.paths, self.record.request.inputs.responses
        own = paths["responses"] / TOKENIZER_FOLDER
        return self.stages.sft(
            self.record.request.recipe.sft,
            student=paths["student"],
            responses=paths["responses"],
            sft_teacher=responses.sft_teacher if responses else None,
            tokenizer=own if own.is_dir() else paths.get("teacher"),
            **common,
        )

    def _distill(self, common: Mapping[str, Any]) -> TrainingSummary:
        recipe, paths = self.record.request.recipe, self.paths
        claims = self._claims()
        if recipe.distill.method == "lightning":
            return self.stages.distill(
                recipe.distill, student=paths["student"], cache=paths["cache"], **claims, **common
            )
        return self.stages.distill(
            recipe.distill,
            student=paths["student"],
            teacher=paths["teacher"],
            prompts=paths["prompts"],
            rollout=recipe.rollout,
            **claims,
            **common,
        )

    def _benchmark(self, common: Mapping[str, Any]) -> StageCost:
        request = self.record.request
        report = self.stages.benchmark(
            request.recipe.benchmark,
            models=self._benchmarked(),
            prompts=self._benchmark_prompts(),
            teacher=self.paths.get("teacher"),
            costs=self.costs,
            recipe_hash=request.recipe.content_hash(),
            **common,
        )
        return StageCost(
            stage="benchmark",
            seconds=sum(model.seconds for model in report.models),
            tokens=sum(model.tokens for model in report.models),
            device=report.hardware,
        )

    def _benchmarked(self) -> dict[str, Path]:
        paths, inputs = self.paths, self.record.request.inputs
        if inputs.model is not None:
            models = [inputs.model, *inputs.baselines]
            return dict(zip(model_names(models), [Path(str(model.path)) for model in models], strict=True))
        if "model" in paths:
            return {"distilled": paths["model"], "sft": paths["student"]}
        return {"sft": paths["student"], "base": paths["base"]}

    def _benchmark_prompts(self) -> Path:
        inputs = self.record.request.inputs
        if inputs.eval_prompts is not None or inputs.model is not None:
            return self.paths.get("eval_prompts") or self.paths["prompts"]
        # Training prompts prove no accuracy: without their answers only the reverse KL is measured on them.
        rows = read_prompts(self.paths["prompts"])[: self.record.request.recipe.benchmark.kl_prompts]
        file = self.directory / "reverse_kl_prompts.jsonl"
        write_atomic(file, "".join(_without_answer(row) for row in rows))
        return file

    def _claims(self) -> dict[str, Any]:
        inputs = self.record.request.inputs
        claim: TeacherClaim | None = None
        if "base" not in self.paths:  # after an SFT phase the lineage of the student itself says it
            claim = inputs.student.sft_teacher if inputs.student else None
        return {"sft_teacher": claim, "allow_teacher_mismatch": inputs.allow_teacher_mismatch}


def run_cancelled() -> RunError:
    """The error of a run that was asked to stop."""
    return RunError("run_cancelled", "The run was asked to stop.", fix="Start it again; finished phases are reused.")


def training_cost(name: PhaseName, summary: TrainingSummary) -> StageCost:
    """A training stage's summary in the form that all stages' costs have."""
    return StageCost(
        stage=name,
        seconds=summary.seconds,
        tokens=summary.trained_tokens,
        steps=summary.steps,
        tokens_per_second=summary.trained_tokens / summary.seconds if summary.seconds > 0 else None,
        device=summary.device,
    )


def recorded_cost(artifact: Path, name: PhaseName) -> StageCost | None:
    """What a phase took when it made this artifact; None when its cost.json does not say."""
    try:
        costs = ArtifactCosts.from_json((artifact / COST_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return next((known.cost for known in costs.phases if known.cost.stage == name), None)


def model_names(models: list[ModelInput]) -> list[str]:
    """A name for each model, of its artifact or its directory, made unique by a number."""
    names: list[str] = []
    for model in models:
        base = model.artifact_id or model.hub_id or Path(str(model.path)).name
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _without_answer(row: PromptRow) -> str:
    content = {"prompt": row.prompt} if row.prompt is not None else {"messages": list(row.messages or ())}
    return json.dumps({"id": row.id, **content}, ensure_ascii=False) + "\n"

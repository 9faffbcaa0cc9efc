"""How each phase calls its stage: which of the run's inputs and earlier results it is given."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.identity import RemoteTeacher, TeacherClaim
from opd_mcp.schemas.reports import BenchmarkReport, StageCost, TrainingSummary
from opd_mcp.schemas.runs import ModelInput, PhaseName, RunRecord
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import CHECKPOINTS

TOKENIZER_FOLDER = "tokenizer"


class Stages(Protocol):
    """The engine's stages, or a stand-in for them."""

    generate_responses: Callable[..., StageCost]
    sft: Callable[..., TrainingSummary]
    rollout: Callable[..., StageCost]
    check_teacher: Callable[..., None]
    score: Callable[..., StageCost]
    distill: Callable[..., TrainingSummary]
    benchmark: Callable[..., BenchmarkReport]
    sample: Callable[..., StageCost]


@dataclass
class StageCalls:
    """Calls stages for one run; `paths` holds what is known so far by role, `costs` what earlier phases took."""

    record: RunRecord
    directory: Path
    context: Any
    load_stages: Callable[[], Stages]
    paths: dict[str, Path] = field(default_factory=dict)
    costs: list[StageCost] = field(default_factory=list)
    loading_seconds: float | None = None
    """What loading the stages took; None until a phase had to be computed."""

    def __post_init__(self) -> None:
        inputs = self.record.request.inputs
        for role in ("student", "teacher", "model", "prompts", "sft_prompts", "eval_prompts", "responses", "cache"):
            given = getattr(inputs, role)
            if given is not None and given.path is not None:
                self.paths[role] = Path(given.path)

    @cached_property
    def stages(self) -> Stages:
        """The stages, loaded when the first phase has to be computed: a run that reuses everything needs none."""
        begun = time.perf_counter()
        stages = self.load_stages()
        self.loading_seconds = time.perf_counter() - begun
        return stages

    def compute(self, name: PhaseName, output: Path) -> StageCost:
        """Run the stage of a phase into an empty or new directory; raises what the stage raises."""
        context = replace(self.context, checkpoints=checkpoints_of(self.directory, name))
        recipe, paths, common = self.record.request.recipe, self.paths, {"output": output, "context": context}
        match name:
            case "generate_responses":
                prompts = paths.get("sft_prompts") or paths["prompts"]
                return self.stages.generate_responses(
                    recipe.responses, teacher=paths["teacher"], prompts=prompts, **common
                )
            case "sft":
                return training_cost(name, self._sft(common))
            case "rollout":
                if self._remote() is not None:  # who it is, is asked before the work, not after it
                    self.stages.check_teacher(recipe.score, context=context, **self._scorer(), **self._claims())
                return self.stages.rollout(
                    recipe.rollout,
                    student=paths["student"],
                    prompts=paths["prompts"],
                    tokenizer=paths.get("teacher"),
                    **common,
                    **({"eval_prompts": paths["eval_prompts"]} if "eval_prompts" in paths else {}),
                )
            case "score":
                return self.stages.score(
                    recipe.score, rollouts=paths["rollouts"], **self._scorer(), **self._claims(), **common
                )
            case "distill":
                return training_cost(name, self._distill(common))
            case _:
                return self._sample(common) if name == "sample" else self._benchmark(common)

    def _sample(self, common: Mapping[str, Any]) -> StageCost:
        recipe, paths = self.record.request.recipe.sample, self.paths
        return self.stages.sample(recipe, model=paths["model"], prompts=paths["prompts"], **common)

    def _scorer(self) -> dict[str, Any]:
        """Student and teacher, and where they apply the server and the SFT teacher's own directory."""
        scorer: dict[str, Any] = {"student": self.paths["student"], "teacher": self.paths.get("teacher")}
        if (remote := self._remote()) is not None:
            scorer["remote"] = remote
        if (path := self._sft_teacher_path()) is not None:
            scorer["sft_teacher_path"] = path
        return scorer

    def _remote(self) -> RemoteTeacher | None:
        teacher = self.record.request.inputs.teacher
        return RemoteTeacher(name=teacher.reference, url=teacher.url) if teacher and teacher.url else None

    def _sft_teacher_path(self) -> Path | None:
        if "base" in self.paths:  # fine-tuned in this run, on this teacher's responses
            return self.paths.get("teacher")
        known = self.record.request.inputs.sft_teacher_path
        return Path(known) if known else None

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
            alerts=RunView(self.directory).refresh().alerts,
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
        self.context.check_fence()
        write_atomic(file, "".join(_without_answer(row) for row in rows))
        return file

    def _claims(self) -> dict[str, Any]:
        inputs = self.record.request.inputs
        claim: TeacherClaim | None = None
        if "base" not in self.paths:  # after an SFT phase the lineage of the student itself says it
            claim = inputs.student.sft_teacher if inputs.student else None
        return {"sft_teacher": claim, "allow_teacher_mismatch": inputs.allow_teacher_mismatch}


def checkpoints_of(run: Path, phase: str) -> Path:
    """Where a phase of a run keeps its checkpoints."""
    return run / CHECKPOINTS / phase


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

"""How each phase calls its stage, with which of the run's inputs and earlier results."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from opd_mcp.engine.context import (
    AssessInputs,
    BenchmarkInputs,
    Context,
    DistillInputs,
    ExportInputs,
    Helpers,
    ResponsesInputs,
    RolloutInputs,
    RoundInputs,
    SampleInputs,
    ScoreInputs,
    SftInputs,
    TaskInputs,
    TeacherInputs,
)
from opd_mcp.identity.consistency import inherited
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.lineage import read_lineage
from opd_mcp.planning.phases import HELPED
from opd_mcp.planning.suites import suite_changes
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.identity import BaseForm, RemoteTeacher, TeacherClaim
from opd_mcp.schemas.recipes import (
    BenchmarkRecipe,
    DistillRecipe,
    ExportRecipe,
    Recipe,
    ResponsesRecipe,
    RolloutRecipe,
    RuntimeRecipe,
    SampleRecipe,
    ScoreRecipe,
    SftRecipe,
    base_form,
    is_url,
)
from opd_mcp.schemas.reports import (
    Assessment,
    BenchmarkReport,
    Curve,
    GradedResponses,
    StageCost,
    TrainingSummary,
    summed_costs,
)
from opd_mcp.schemas.resolve import far_rates, few_steps
from opd_mcp.schemas.runs import LM_EVAL, TOKENIZER_FOLDER, ModelInput, PhaseName, RunRecord, phase_label
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import CHECKPOINTS
from opd_mcp.store.series import Points, thinned

TRAINING: tuple[PhaseName, ...] = ("sft", "distill")
TRAINING_FILE = "training.json"
CURVE_METRICS = ("reverse_kl_k1", "loss", "mean_response_tokens", "effective_sample_share", "mean_logprob")
MAX_CURVES, CURVE_POINTS = 8, 80
TASK_FOLDER = "lm_eval"
"""Where a run keeps the data of a task of lm-eval."""


class Stages(Protocol):
    """The engine's stages (`opd_mcp.engine.stages` describes each), or a stand-in for them."""

    def generate_responses(
        self, section: ResponsesRecipe, inputs: ResponsesInputs, output: Path, context: Context
    ) -> StageCost: ...

    def sft(self, section: SftRecipe, inputs: SftInputs, output: Path, context: Context) -> TrainingSummary: ...

    def rollout(self, section: RolloutRecipe, inputs: RolloutInputs, output: Path, context: Context) -> StageCost: ...

    def check_teacher(self, section: ScoreRecipe, inputs: TeacherInputs, context: Context) -> int | None: ...

    def score(self, section: ScoreRecipe, inputs: ScoreInputs, output: Path, context: Context) -> StageCost: ...

    def distill(
        self, section: DistillRecipe, inputs: DistillInputs, output: Path, context: Context
    ) -> TrainingSummary: ...

    def benchmark(
        self, section: BenchmarkRecipe, inputs: BenchmarkInputs, output: Path, context: Context
    ) -> BenchmarkReport: ...

    def benchmark_task(
        self, section: BenchmarkRecipe, inputs: TaskInputs, output: Path, context: Context
    ) -> BenchmarkReport: ...

    def sample(self, section: SampleRecipe, inputs: SampleInputs, output: Path, context: Context) -> StageCost: ...

    def assess(self, recipe: Recipe, inputs: AssessInputs, output: Path, context: Context) -> Assessment: ...

    def export(self, section: ExportRecipe, inputs: ExportInputs, output: Path, context: Context) -> StageCost: ...


@dataclass
class StageCalls:
    """Calls stages for one run; `paths` has the known paths by role, `costs` the costs of earlier phases."""

    record: RunRecord
    directory: Path
    context: Context
    load_stages: Callable[[], Stages]
    paths: dict[str, Path] = field(default_factory=dict)
    costs: list[StageCost] = field(default_factory=list)
    loading_seconds: float | None = None
    """Seconds spent on loading the stages; None until a phase must be computed."""
    on_ranks: "Callable[[StageCalls, PhaseName, Path, int | None], TrainingSummary] | None" = None
    """Trains a phase, of a round's, in processes of its own, where the run has several devices."""
    helpers: Callable[[], AbstractContextManager[Helpers | None]] = nullcontext
    """Who helps with another phase, for the block's time, where the run has several devices."""

    def __post_init__(self) -> None:
        inputs = self.record.request.inputs
        for role in ("student", "teacher", "model", "prompts", "sft_prompts", "eval_prompts", "responses", "cache"):
            given = getattr(inputs, role)
            if given is not None and given.path is not None:
                self.paths[role] = Path(given.path)

    @cached_property
    def stages(self) -> Stages:
        """The stages, loaded when the first phase must be computed; a run that reuses everything never loads them."""
        begun = time.perf_counter()
        stages = self.load_stages()
        self.loading_seconds = time.perf_counter() - begun
        return stages

    def compute(self, name: PhaseName, output: Path, number: int | None = None) -> StageCost:
        """Run the stage of a phase, of a round's where `number` says it, into an empty directory; raises its errors."""
        context = replace(self.context, checkpoints=checkpoints_of(self.directory, phase_label(name, number)))
        if number in (None, 1):
            self._tell_unfit_settings(name)
        if name in TRAINING:
            cost = training_cost(name, (self.on_ranks or StageCalls.trained)(self, name, output, number))
        else:
            with self.helpers() if name in HELPED else nullcontext() as helpers:
                cost = self._computed(name, output, number, replace(context, helpers=helpers))
        return cost if number is None else cost.model_copy(update={"round": number})

    def _computed(self, name: PhaseName, output: Path, number: int | None, context: Context) -> StageCost:
        """The cost of a phase that trains nothing, once its stage has run."""
        recipe, paths, stages = self.record.request.recipe, self.paths, self.stages
        begun = time.perf_counter()
        match name:
            case "generate_responses":
                prompts = paths.get("sft_prompts") or paths["prompts"]
                learnt = any(phase.name == "sft" for phase in self.record.request.phases)
                grading = None if learnt and recipe.responses.keep == "all" else recipe.benchmark
                responses = ResponsesInputs(
                    teacher=paths["teacher"], teachers=self._teachers, prompts=prompts, grading=grading
                )
                cost = stages.generate_responses(recipe.responses, responses, output, context)
            case "rollout":
                longest = None
                if self._remote() is not None or is_url(recipe.score.engine):
                    # its identity is checked before the work, not after it
                    longest = stages.check_teacher(recipe.score, TeacherInputs(**self._scorer(number)), context)
                context = replace(context, runtime=runtime_of_round(context.runtime, number))
                rollouts = self._rollout(number, longest)
                cost = stages.rollout(recipe.rollout, rollouts, output, context)
            case "score":
                scored = ScoreInputs(rollouts=paths["rollouts"], **self._scorer(number))
                cost = stages.score(recipe.score, scored, output, context)
            case "assess":
                cost = self._assessed(output, context)
            case "sample":
                shown = SampleInputs(model=paths["model"], prompts=paths["prompts"])
                cost = stages.sample(recipe.sample, shown, output, context)
            case "export":
                target = self.record.request.inputs.export
                assert target is not None, "an export has a destination"
                report = Path(target.report) if target.report else None
                made = ExportInputs(model=paths["model"], report=report, models=target.models, data=target.data)
                cost = stages.export(ExportRecipe(format=target.format), made, output, context)
            case _ if (task := self._task()) is not None:
                cost = report_cost(stages.benchmark_task(recipe.benchmark, task, output, context), begun)
            case _:
                cost = report_cost(stages.benchmark(recipe.benchmark, self._benchmark(), output, context), begun)
        return cost

    def trained(self, name: PhaseName, output: Path, number: int | None = None) -> TrainingSummary:
        """Run the stage of a training phase, of a round's where `number` says it; raises the stage's errors."""
        context = replace(self.context, checkpoints=checkpoints_of(self.directory, phase_label(name, number)))
        recipe, stages = self.record.request.recipe, self.stages
        if name == "sft":
            return stages.sft(recipe.sft, self._sft(), output, context)
        return stages.distill(recipe.distill, self._distill(number), output, context)

    def _tell_unfit_settings(self, name: PhaseName) -> None:
        recipe, student = self.record.request.recipe, self.record.request.inputs.student
        stages = [name] if name in TRAINING else []
        for rate in far_rates(recipe, stages, student.parameters if student else None):
            self.context.reporter.alert(rate.code, f"{rate.message} {rate.fix}")
        few = few_steps(recipe, student.parameters if student else None) if name == "distill" else None
        if few is not None:
            self.context.reporter.alert(few.code, f"{few.message} {few.fix}")

    def steps_taken(self) -> int:
        """Of a distillation in rounds, the steps that those taken so far did."""
        summary = TrainingSummary.from_json((self.paths["model"] / TRAINING_FILE).read_bytes())
        return summary.round.last_step if summary.round else summary.steps

    def _assessed(self, output: Path, context: Context) -> StageCost:
        paths, started = self.paths, time.perf_counter()
        pair = AssessInputs(student=paths["student"], teacher=paths["teacher"], prompts=paths["prompts"])
        found = self.stages.assess(self.record.request.recipe, pair, output, context)
        seconds, tokens = time.perf_counter() - started, sum(speed.tokens for speed in found.speeds)
        return StageCost(stage="assess", seconds=seconds, tokens=tokens, device=found.hardware)

    def _student(self, number: int | None) -> Path:
        """What a round draws its rollouts from and begins with."""
        return self.paths["model" if number is not None and number > 1 else "student"]

    def _round(self, number: int) -> RoundInputs:
        distill = self.record.request.recipe.distill
        final, until_stale = number == distill.rounds, distill.round_trigger == "stale"
        return RoundInputs(
            number=number,
            first=self.steps_taken() if number > 1 else 0,
            last=distill.steps if final or until_stale else distill.steps_before(number + 1),
            final=final,
            origin=self.paths["student"],
            before=self.paths["model"] if number > 1 else None,
            until_stale=until_stale and not final,
        )

    def _rollout(self, number: int | None, longest: int | None) -> RolloutInputs:
        paths, distill = self.paths, self.record.request.recipe.distill
        return RolloutInputs(
            student=self._student(number),
            prompts=paths["prompts"],
            tokenizer=paths.get("teacher"),
            eval_prompts=paths.get("eval_prompts"),
            form=base_form(distill.adapter),
            longest=longest,
            most=distill.rows_of_round(number) if number else None,
            skipped=distill.batch_size * distill.steps_before(number) if number else 0,
        )

    def _scorer(self, number: int | None = None) -> dict[str, Any]:
        """The fields of TeacherInputs."""
        return {
            "student": self._student(number),
            "prompts": self.paths.get("prompts"),
            "teacher": self.paths.get("teacher"),
            "teachers": self._teachers,
            "remote": self._remote(),
            "sft_teacher": self._claim(),
            "sft_teacher_path": self._sft_teacher_path(),
            "allow_teacher_mismatch": self.record.request.inputs.allow_teacher_mismatch,
            "form": base_form(self.record.request.recipe.distill.adapter),
        }

    @property
    def _teachers(self) -> dict[str, Path]:
        """The directories of several teachers, by domain."""
        teacher = self.record.request.inputs.teacher
        members = teacher.members if teacher else None
        return {domain: Path(str(member.path)) for domain, member in (members or {}).items()}

    def _remote(self) -> RemoteTeacher | None:
        teacher = self.record.request.inputs.teacher
        return RemoteTeacher(name=teacher.reference, url=teacher.url) if teacher and teacher.url else None

    def _sft_teacher_path(self) -> Path | None:
        if "base" in self.paths:  # fine-tuned in this run, on this teacher's responses
            return self.paths.get("teacher")
        known = self.record.request.inputs.sft_teacher_path
        return Path(known) if known else None

    def _sft(self) -> SftInputs:
        paths, responses = self.paths, self.record.request.inputs.responses
        own = paths["responses"] / TOKENIZER_FOLDER
        return SftInputs(
            student=paths["student"],
            responses=paths["responses"],
            sft_teacher=responses.sft_teacher if responses else None,
            tokenizer=own if own.is_dir() else paths.get("teacher"),
            grading=self.record.request.recipe.benchmark,
        )

    def _distill(self, number: int | None) -> DistillInputs:
        request, paths = self.record.request, self.paths
        student, allowed = self._student(number), request.inputs.allow_teacher_mismatch
        if request.recipe.distill.method == "lightning":
            return DistillInputs(
                student=student,
                cache=paths["cache"],
                sft_teacher=self._claim(),
                allow_teacher_mismatch=allowed,
                round=None if number is None else self._round(number),
                judge=None if self._teachers else paths.get("teacher"),
                judges=self._teachers,
                **self._held_out(),
            )
        return DistillInputs(
            student=student,
            teacher=paths["teacher"],
            prompts=paths["prompts"],
            rollout=request.recipe.rollout,
            sft_teacher=self._claim(),
            allow_teacher_mismatch=allowed,
            **self._held_out(),
        )

    def _held_out(self) -> dict[str, Any]:
        """What judges a student in its training, where the recipe asks for it."""
        recipe = self.record.request.recipe
        if recipe.distill.evaluate_steps is None:
            return {}
        return {"held_out": self.paths.get("eval_prompts"), "grading": recipe.benchmark}

    def _task(self) -> TaskInputs | None:
        """The inputs of a benchmark that is a task of lm-eval; None for one with prompts."""
        suite = self.record.request.inputs.suite or ""
        if not suite.startswith(LM_EVAL):
            return None
        models = self._benchmarked()
        return TaskInputs(
            models={**models, **self._references(models)[0]},
            task=suite.removeprefix(LM_EVAL),
            data=self.directory / TASK_FOLDER,
            recipe_hash=self.record.request.recipe.content_hash(),
        )

    def _benchmark(self) -> BenchmarkInputs:
        models = self._benchmarked()
        references, absent = self._references(models)
        view = RunView(self.directory, keep_series=True).refresh()
        return BenchmarkInputs(
            models=models,
            references=references,
            not_measured=absent,
            teacher_responses=self._teacher_responses(),
            suite=self.record.request.inputs.suite,
            forms=self._forms(),
            suite_changes=suite_changes(self.record.request.inputs.suite, self.record.request.recipe),
            prompts=self._benchmark_prompts(),
            recipe_hash=self.record.request.recipe.content_hash(),
            teacher=None if self._teachers else self.paths.get("teacher"),
            teachers=self._teachers,
            costs=summed_costs(self.costs),
            alerts=view.alerts,
            skipped=self.record.request.skipped_prompts,
            planned_seconds=self.record.expected_phase_seconds,
            curves=told_curves(view.series),
            run=run_heading(self.record),
        )

    def _benchmarked(self) -> dict[str, Path]:
        paths, inputs = self.paths, self.record.request.inputs
        if inputs.model is not None:
            models = [inputs.model, *inputs.baselines]
            return dict(zip(model_names(models), [Path(str(model.path)) for model in models], strict=True))
        if "model" in paths:
            return {"distilled": paths["model"], self._student_name(): paths["student"]}
        return {"sft": paths["student"], "base": paths["base"]}

    def _student_name(self) -> str:
        return "base" if self.record.request.recipe.sft.skip else student_name(self.paths["student"])

    def _forms(self) -> dict[str, BaseForm]:
        """How the run's last training held the student that it began with."""
        recipe = self.record.request.recipe
        if self.record.request.inputs.model is not None:
            return {}
        if "model" in self.paths:
            return {self._student_name(): base_form(recipe.distill.adapter)}
        return {"base": base_form(recipe.sft.adapter)}

    def _references(self, models: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
        """The teacher and the student before its SFT, where the report is to have them, and why one is absent."""
        inputs, wanted = self.record.request.inputs, self.record.request.recipe.benchmark.references
        teacher, found, absent = self.paths.get("teacher"), {}, {}
        sees_more = inputs.teacher is not None and inputs.teacher.sees_more
        if "teacher" in wanted and self._teachers:
            absent["teacher"] = "there are several; benchmark_student measures each on the prompts of its domain"
        elif "teacher" in wanted and teacher is not None and (sees_more or teacher not in models.values()):
            found["teacher"] = teacher
        elif "teacher" in wanted and teacher is None and inputs.model is None:
            absent["teacher"] = "its files are not here, and its server scores tokens without generating any"
        base = self.paths.get("base")
        if "base" in wanted and base is not None and base not in models.values():
            found["base"] = base
        elif "base" in wanted and base is None and inputs.model is None and not self.record.request.recipe.sft.skip:
            absent["base"] = "the student came with its SFT done; name its base as a baseline of benchmark_student"
        return found, absent

    def _teacher_responses(self) -> GradedResponses | None:
        """How the responses were graded that this run's SFT learnt from."""
        if "base" not in self.paths:
            return None
        file = self.paths["student"] / TRAINING_FILE
        return TrainingSummary.from_json(file.read_bytes()).teacher_responses if file.is_file() else None

    def _benchmark_prompts(self) -> Path:
        inputs = self.record.request.inputs
        if inputs.eval_prompts is not None or inputs.model is not None:
            return self.paths.get("eval_prompts") or self.paths["prompts"]
        # Training prompts prove no accuracy: without answers only the reverse KL is measured on them.
        rows = read_prompts(self.paths["prompts"])[: self.record.request.recipe.benchmark.kl_prompts]
        file = self.directory / "reverse_kl_prompts.jsonl"
        self.context.check_fence()
        write_atomic(file, "".join(_without_answer(row) for row in rows))
        return file

    def _claim(self) -> TeacherClaim | None:
        """The teacher claimed for the student's SFT responses; after an SFT phase the student's lineage says it."""
        student = self.record.request.inputs.student
        claim = student.sft_teacher if student and "base" not in self.paths else None
        return inherited(claim) if "model" in self.paths else claim  # a later round's student is no longer its teacher


def run_heading(record: RunRecord) -> str:
    """A run's name and id; the id alone where it has no name."""
    name = " ".join((record.request.labels.name or "").split())
    return f"{name} ({record.run_id})" if name else record.run_id


def student_name(student: Path) -> str:
    """What a distillation began from: its SFT student, or the student of an earlier round."""
    lineage = read_lineage(student)
    return "earlier_round" if lineage is not None and lineage.stage == "distill" else "sft"


def told_curves(series: Mapping[str, Points]) -> list[Curve]:
    """The telling metrics of the training phases, the last phase's first, thinned out for a report's figures."""
    names = [f"{phase}.{key}" for phase in ("distill", "sft") for key in CURVE_METRICS if f"{phase}.{key}" in series]
    curves = []
    for name in names[:MAX_CURVES]:
        steps, values = thinned(*series[name].finite(), CURVE_POINTS)
        curves.append(Curve(key=name, steps=steps, values=[float(f"{value:.5g}") for value in values]))
    return [curve for curve in curves if curve.steps]


def checkpoints_of(run: Path, phase: str) -> Path:
    """Where a phase of a run keeps its checkpoints."""
    return run / CHECKPOINTS / phase


def runtime_of_round(runtime: RuntimeRecipe, number: int | None) -> RuntimeRecipe:
    """The runtime with the seed that a later round draws with: with the first round's its samples would be alike."""
    if number is None or number == 1:
        return runtime
    return runtime.model_copy(update={"seed": int(content_hash(["round", runtime.seed, number])[:7], 16)})


def training_cost(name: PhaseName, summary: TrainingSummary) -> StageCost:
    """A training stage's summary in the form of all stages' costs."""
    return StageCost(
        stage=name,
        seconds=summary.seconds,
        tokens=summary.trained_tokens,
        steps=summary.steps,
        tokens_per_second=summary.trained_tokens / summary.seconds if summary.seconds > 0 else None,
        device=summary.device,
    )


def report_cost(report: BenchmarkReport, begun: float) -> StageCost:
    """A benchmark's cost in the form of all stages' costs, with what its models and engines took to start."""
    return StageCost(
        stage="benchmark",
        seconds=time.perf_counter() - begun,
        tokens=sum(model.tokens for model in report.models),
        device=report.hardware,
    )


def model_names(models: list[ModelInput]) -> list[str]:
    """A name for each model, from its artifact or directory, made unique by a number."""
    names: list[str] = []
    for model in models:
        base = model.artifact_id or model.hub_id or Path(str(model.path)).name
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _without_answer(row: PromptRow) -> str:
    content: dict[str, Any] = (
        {"prompt": row.prompt} if row.prompt is not None else {"messages": list(row.messages or ())}
    )
    own = {"teacher_messages": row.teacher_messages, "teacher_domain": row.teacher_domain}
    content |= {name: value for name, value in own.items() if value is not None}
    return json.dumps({"id": row.id, **content}, ensure_ascii=False) + "\n"

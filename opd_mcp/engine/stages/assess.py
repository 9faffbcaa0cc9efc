"""Two models measured before a run: how fast each kind of work is here, and whether they fit each other.

The teacher answers and scores, the student answers, is fine-tuned for a few steps, answers again and is distilled for a
few steps: what a run does, by the functions that a run calls, on few rows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.context import AssessInputs, Context, QuietReporter, require_going
from opd_mcp.engine.data.batches import stored_batches
from opd_mcp.engine.data.encoding import EncodedPrompt, encode_prompts, ids_of
from opd_mcp.engine.data.sequences import TRUNCATED, Sequences
from opd_mcp.engine.evaluation.intervals import wilson
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import LocalGenerator
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE, distill_objective
from opd_mcp.engine.models.loading import AdoptedTokenizer, LoadedModel, adopt_tokenizer, load_model
from opd_mcp.engine.provenance import Provenance, full_identity, record_lineage
from opd_mcp.engine.runtime import Runtime, hardware_name, open_runtime, peak_memory
from opd_mcp.engine.scoring.local import TeacherScores, score_sequences
from opd_mcp.engine.training.loop import LoopSettings, TrainingTask, train
from opd_mcp.engine.training.step import distill_metrics, sft_metrics
from opd_mcp.grading.golds import recipe_grader
from opd_mcp.grading.graders import grader_for
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import prompts_hash
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.tokenizers import require_unused, special_differences
from opd_mcp.schemas.errors import OpdError, RunError
from opd_mcp.schemas.identity import Parent
from opd_mcp.schemas.recipes import BenchmarkRecipe, OptimizerRecipe, Recipe, Sampling
from opd_mcp.schemas.reports import Assessment, Estimate95, MeasuredSpeed, PairSide, TrainingSummary

ASSESSMENT_FILE = "assessment.json"
ROWS_ON_A_CPU = 32
# Rules of thumb, not measured here: the overlap of the top k predicts success (arXiv 2604.13016).
LEAST_OVERLAP, GOOD_OVERLAP = 0.2, 0.5
MOSTLY_TRUNCATED = 0.5
Work = Literal["answer", "generate", "generate_live", "score", "sft", "distill"]
Made = TypeVar("Made")


def assess(recipe: Recipe, inputs: AssessInputs, output: Path, context: Context) -> Assessment:
    """Speeds, memory and the diagnosis of a pair; writes `assessment.json` and its lineage.

    Raises ConsistencyError `tokenizer_mismatch`, and RunError `run_cancelled` between its parts.
    """
    runtime = open_runtime(context.runtime)
    adopted = adopt_tokenizer(inputs.teacher, context.prompting)
    rows = read_prompts(inputs.prompts)
    wanted = recipe.assess.rows or (
        ROWS_ON_A_CPU if runtime.device.type == "cpu" else min(recipe.rollout.batch_size, recipe.responses.batch_size)
    )
    encoded = encode_prompts(rows[:wanted], adopted.tokenizer, context)
    differing = special_differences(inputs.teacher, inputs.student)
    require_unused(differing, ids_of(encoded) if differing else (), context.prompting, inputs.student)
    topk = recipe.distill.topk
    measured = _Measured(recipe, adopted, encoded, runtime, context)

    teacher = measured.loaded("teacher", lambda: load_model(inputs.teacher, runtime, generates=True))
    answers = measured.drawn("answer", teacher, recipe.responses.sampling, recipe.responses.batch_size)
    given = measured.loaded("student", lambda: load_model(inputs.student, runtime, generates=True))
    first = measured.drawn("generate", given, recipe.rollout.sampling, recipe.rollout.batch_size)
    scores = measured.scored(teacher, first, topk)
    before = measured.side(given, first, scores)
    del given
    student = load_model(inputs.student, runtime, for_training=True, generates=True, adapter=recipe.sft.adapter)
    measured.fine_tuned(student, answers)
    drawn = measured.drawn("generate_live", student, recipe.rollout.sampling, recipe.rollout.batch_size)
    scores = measured.scored(teacher, drawn, topk, kept=False)
    after = measured.side(student, drawn, scores)
    measured.distilled(student, drawn.with_columns(**scores.columns()))
    judgement, why = judged(before, after, _truncated(answers), measured.accuracy(answers), topk)
    assessment = Assessment(
        hardware=hardware_name(runtime.device),
        rows=len(encoded),
        topk=topk,
        sft_steps=recipe.assess.sft_steps,
        load_seconds=measured.load_seconds,
        speeds=measured.speeds,
        before=before,
        after=after,
        teacher_truncated=_truncated(answers),
        teacher_accuracy=measured.accuracy(answers),
        judgement=judgement,
        diagnosis=why,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / ASSESSMENT_FILE, assessment.to_json(indent=2))
    parents = [Parent(role=role, identity=full_identity(getattr(inputs, role))) for role in ("teacher", "student")]
    parents.append(Parent(role="prompts", sha256=prompts_hash(rows)))
    record_lineage(output, Provenance("report", "assess", recipe.assess, parents, [ASSESSMENT_FILE]), context)
    return assessment


@dataclass
class _Measured:
    """Does each kind of work once and keeps what it took."""

    recipe: Recipe
    adopted: AdoptedTokenizer
    prompts: Sequence[EncodedPrompt]
    runtime: Runtime
    context: Context
    speeds: list[MeasuredSpeed] = field(default_factory=list)
    load_seconds: dict[str, float] = field(default_factory=dict)
    not_graded: str | None = None

    def loaded(self, name: str, load: Callable[[], LoadedModel]) -> LoadedModel:
        self._begin(f"loading the {name}")
        started = time.perf_counter()
        model = load()
        self.load_seconds[name] = time.perf_counter() - started
        return model

    def drawn(self, work: Work, model: LoadedModel, sampling: Sampling, batch_size: int) -> Sequences:
        """A response per prompt."""
        self._begin(f"measuring: {work}")
        eos, scope = self.adopted.eos_token_ids, f"assess/{work}"
        settings = GenerationSettings(sampling, eos, batch_size, self.runtime.seed, scope, model.facts.tokens)
        started = time.perf_counter()
        sequences = LocalGenerator(model).draw(self.prompts, settings)
        self._keep(work, len(sequences), len(sequences.response_ids), time.perf_counter() - started)
        return sequences

    def scored(self, teacher: LoadedModel, sequences: Sequences, topk: int, *, kept: bool = True) -> TeacherScores:
        """The teacher's log-probs of rollouts; `kept` counts their time."""
        self._begin("measuring: score")
        started = time.perf_counter()
        scores = self._scores(teacher, sequences, topk)
        if kept:
            self._keep("score", len(sequences), len(sequences.response_ids), time.perf_counter() - started)
        return scores

    def fine_tuned(self, student: LoadedModel, answers: Sequences) -> None:
        """A few steps of SFT on the teacher's responses."""
        section, steps = self.recipe.sft, self.recipe.assess.sft_steps
        settings = LoopSettings.of(
            section.model_copy(update={"steps": steps, "optimizer": short(section.optimizer, steps)}), "token"
        )
        batches = stored_batches(
            answers, steps=steps, batch_size=section.batch_size, seed=self.runtime.seed, scope="assess/sft"
        )
        self._train("sft", student, TrainingTask(settings, batches, SFT_OBJECTIVE, sft_metrics), section.batch_size)

    def distilled(self, student: LoadedModel, rows: Sequences) -> None:
        """A few steps of distillation on scored rollouts."""
        section, steps = self.recipe.distill, self.recipe.assess.steps
        settings = LoopSettings.of(section.model_copy(update={"steps": steps}), section.normalize)
        batches = stored_batches(
            rows, steps=steps, batch_size=section.batch_size, seed=self.runtime.seed, scope="assess/distill"
        )
        task = TrainingTask(
            settings, batches, distill_objective(section), lambda result: distill_metrics(result, section)
        )
        self._train("distill", student, task, section.batch_size)

    def side(self, student: LoadedModel, rollouts: Sequences, scores: TeacherScores) -> PairSide:
        """What teacher and student say of the student's own tokens."""
        was_training = student.model.training
        student.model.eval()
        own = self._scores(student, rollouts, scores.topk_ids.shape[1] if scores.topk_ids is not None else 0)
        student.model.train(was_training)
        assert scores.topk_ids is not None
        assert own.topk_ids is not None
        return PairSide(
            teacher_logprob=_mean(scores.logprobs),
            own_logprob=_mean(own.logprobs),
            topk_overlap=overlap(scores.topk_ids, own.topk_ids),
            truncated=_truncated(rollouts),
            accuracy=self.accuracy(rollouts),
        )

    def accuracy(self, rows: Sequences) -> Estimate95 | None:
        """Of the responses whose prompts have answers; None where there are none, or the grader cannot work here."""
        answered = [number for number, prompt in enumerate(self.prompts) if prompt.row.answer is not None]
        if not answered:
            return None
        golds = [self.prompts[number].row.answer or "" for number in answered]
        ids = [rows.response(row).tolist() for row in answered]
        texts = self.adopted.tokenizer.batch_decode(ids, skip_special_tokens=True)
        grading: BenchmarkRecipe = self.recipe.benchmark
        try:
            name, _ = recipe_grader(grading, golds)
            with grader_for(name, pattern=grading.answer_pattern, allow_code=grading.allow_code) as grader:
                right = sum(grade.correct for grade in grader.grades(texts, golds))
        except RunError:  # the user asked to stop
            raise
        except OpdError as error:  # the benchmark will say the same
            if self.not_graded is None:
                self.not_graded = error.message
                self.context.reporter.alert("responses_not_graded", f"Nothing is graded: {error.message}")
            return None
        return wilson(right, len(answered)).model_copy(update={"basis": "one response a prompt; Wilson interval"})

    def _train(self, work: Work, student: LoadedModel, task: TrainingTask, batch_size: int) -> None:
        self._begin(f"measuring: {work}")
        context = Context(self.context.runtime, self.context.prompting, reporter=QuietReporter(self.context.reporter))
        summary: TrainingSummary = train(student.model, task, self.runtime, context)
        rows = min(batch_size, len(self.prompts))
        self._keep(work, rows, summary.trained_tokens, summary.seconds, summary.steps)

    def _scores(self, model: LoadedModel, sequences: Sequences, topk: int) -> TeacherScores:
        return score_sequences(
            model,
            sequences,
            topk=topk,
            micro_batch_tokens=self.recipe.score.micro_batch_tokens,
            runtime=self.runtime,
            valid_vocab=model.facts.tokens,
        )

    def _begin(self, part: str) -> None:
        require_going(self.context)
        self.context.reporter.phase(part)
        self.context.reporter.progress(len(self.speeds), PARTS, "measurements")

    def _keep(self, work: Work, rows: int, tokens: int, seconds: float, steps: int = 0) -> None:
        self.speeds.append(
            MeasuredSpeed(
                work=work,
                rows=rows,
                steps=steps,
                tokens=tokens,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                peak_memory_bytes=peak_memory(self.runtime.device),
            )
        )


PARTS = 6


def short(optimizer: OptimizerRecipe, steps: int) -> OptimizerRecipe:
    """The optimizer of a training of a few steps, a tenth of them its warm-up."""
    return optimizer.model_copy(update={"warmup_steps": min(optimizer.warmup_steps, steps // 10)})


def overlap(teacher: NDArray[np.int32], student: NDArray[np.int32]) -> float:
    """The mean share of the teacher's top k ids [T, k] that is among the student's [T, k]; 0 for no token."""
    if len(teacher) == 0:
        return 0.0
    return float((teacher[:, :, None] == student[:, None, :]).any(axis=2).mean())


def judged(
    before: PairSide, after: PairSide, teacher_truncated: float, teacher: Estimate95 | None, topk: int
) -> tuple[Literal["works", "doubtful", "fails"], str]:
    """Whether a pair will work, and one sentence with the figures that say so."""
    figures = (
        f"on its own rollouts the teacher gives a token {after.teacher_logprob:.2f} nats after the short SFT "
        f"({before.teacher_logprob:.2f} before), and {after.topk_overlap:.0%} of the teacher's top {topk} are the "
        f"student's ({before.topk_overlap:.0%} before); {teacher_truncated:.0%} of the teacher's answers and "
        f"{after.truncated:.0%} of the student's are cut"
    )
    if teacher is not None and after.accuracy is not None:
        figures += f"; right are {teacher.value:.0%} of the teacher's and {after.accuracy.value:.0%} of the student's"
    if teacher is not None and after.accuracy is not None and teacher.high < after.accuracy.low:
        return "fails", f"This teacher has nothing to teach: the student is more often right: {figures}."
    if after.topk_overlap < LEAST_OVERLAP:
        return "fails", f"This pair will not work as it is, teacher and student hardly overlap: {figures}."
    if teacher_truncated > MOSTLY_TRUNCATED:
        return "doubtful", f"Raise 'responses.sampling.max_new_tokens', most answers do not end: {figures}."
    if after.topk_overlap < GOOD_OVERLAP or after.teacher_logprob < before.teacher_logprob:
        return "doubtful", f"This pair needs more SFT before it is distilled: {figures}."
    return "works", f"This pair should work: {figures}."


def _truncated(rows: Sequences) -> float:
    return float(np.mean([reason == TRUNCATED for reason in rows.finish_reasons])) if len(rows) else 0.0


def _mean(values: NDArray[np.float32]) -> float:
    return float(values.mean()) if len(values) else 0.0

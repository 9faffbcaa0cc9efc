"""Distillation: the SFT student trained towards the teacher, from a teacher cache or from a live teacher.

Both methods share loop, estimator, generator and settings (Lightning OPD, arXiv 2604.13010). What is learnt from is
opened and checked before any step.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from opd_mcp.engine.cache.flat import open_flat
from opd_mcp.engine.cache.repair import repaired
from opd_mcp.engine.context import Context, DistillInputs, QuietReporter, RoundInputs
from opd_mcp.engine.data.batches import (
    StepsFrom,
    shortened_steps,
    steps_by_domain,
    stored_batches,
)
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.evaluation.model_score import Measurement, asked
from opd_mcp.engine.generation.served import room_for
from opd_mcp.engine.losses.objectives import distill_objective
from opd_mcp.engine.models.loading import (
    AdoptedTokenizer,
    LoadedModel,
    adopt_tokenizer,
    load_model,
    model_warnings,
    stored_dtype,
)
from opd_mcp.engine.models.lora import renew_adapter
from opd_mcp.engine.models.saving import SavedForm, saved_files
from opd_mcp.engine.provenance import (
    Provenance,
    adapter_origin,
    claim_of,
    engines_of,
    frozen_hash,
    full_identity,
    record_lineage,
)
from opd_mcp.engine.runtime import Runtime, loading_runtime, open_runtime
from opd_mcp.engine.scoring.local import base_as_teacher, require_agreement
from opd_mcp.engine.stages.live import LiveSource, live_batches, open_live
from opd_mcp.engine.training.following import EngineFollower
from opd_mcp.engine.training.held_out import HeldOut
from opd_mcp.engine.training.loop import LoopSettings, Stretch, TrainingTask, train
from opd_mcp.engine.training.token_factors import reweigh_of
from opd_mcp.engine.training.watches import WATCHED_STEPS, DistillWatch, are_stale
from opd_mcp.grading.golds import recipe_grader
from opd_mcp.grading.graders import grader_for
from opd_mcp.identity.consistency import cache_claim, inherited, require_behaviour, require_consistent, vouched
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.lineage import read_manifest, verified_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError
from opd_mcp.schemas.identity import ModelIdentity, Parent, TeacherClaim
from opd_mcp.schemas.recipes import BenchmarkRecipe, DistillRecipe, base_form
from opd_mcp.schemas.reports import RepairSummary, RoundSummary, TrainingSummary

MOMENTS_FILE = "optimizer/moments.safetensors"
"""What a round leaves to the next one besides its student."""
OWN_SETTINGS = {"rank", "alpha", "targets", "init", "scaling"}
"""What adapters on one base may differ in."""


def distill(section: DistillRecipe, inputs: DistillInputs, output: Path, context: Context) -> TrainingSummary:
    """Train the SFT student towards the teacher: `lightning` from `cache`, `live` from `teacher`, `prompts`, `rollout`.

    Raises ConsistencyError for a cache of another teacher or behaviour policy, IntegrityError for a damaged one.
    """
    student, runtime = inputs.student, open_runtime(context.runtime)
    if inputs.round is not None:
        section = section_of_round(section, inputs.round)
    if section.method == "lightning":
        cached = open_cache(section, inputs, context)
        place = loading_runtime(runtime, context)
        model = load_model(student, place, for_training=True, adapter=section.adapter)
        model_warnings(context, model)
        steps = cached_steps(section, cached, runtime, inputs.round)
        return _trained(section, inputs, output, Opened(model, cached, steps), context)
    assert inputs.teacher is not None, "live distillation queries a teacher"
    assert inputs.rollout is not None, "live distillation draws rollouts by a recipe"
    source, divided = open_live(section, inputs, context), context.ranks is not None
    place = loading_runtime(runtime, context)
    model = load_model(student, place, for_training=True, generates=not divided, adapter=section.adapter)
    drawing = whole_copy(model, section, runtime) if divided else model
    teacher = base_as_teacher(drawing, inputs.teacher, runtime) or load_model(inputs.teacher, runtime)
    model_warnings(context, model, teacher)
    with ExitStack() as stack:
        if inputs.rollout.engine is not None:
            form = SavedForm.of(model, source.adopted, section.save_dtype)
            length = room_for(source.prompts, inputs.rollout.sampling)
            every = inputs.rollout.reload_steps
            follower = EngineFollower(model, form, inputs.rollout.engine, every, length, context)
            source = replace(source, follower=stack.enter_context(follower))
        steps = live_batches(drawing, teacher, source, section, inputs.rollout, runtime)
        opened = Opened(model, source, steps, teacher, drawing if divided else None)
        return _trained(section, inputs, output, opened, context)


def whole_copy(student: LoadedModel, section: DistillRecipe, runtime: Runtime) -> LoadedModel:
    """The student again, whole, for a rank that draws by it; it takes the trained weights from the ranks' parts."""
    adapter = section.adapter
    return load_model(student.path, runtime, for_training=True, generates=True, compiled=False, adapter=adapter)


def distill_adapters(
    sections: Sequence[DistillRecipe], inputs: DistillInputs, outputs: Sequence[Path], context: Context
) -> list[TrainingSummary]:
    """Train several adapters on one student from one cache, one after the other: the frozen base is loaded once.

    Each is what `distill` with its section alone makes, to the bit. Raises what `distill` raises, and ArgumentError
    `invalid_argument` for a section that does not leave the base as it is.
    """
    require_kept_base(sections)
    runtime, summaries = open_runtime(context.runtime), []
    model: LoadedModel | None = None
    for number, (section, output) in enumerate(zip(sections, outputs, strict=True)):
        assert section.adapter is not None, "every section trains an adapter"
        source = open_cache(section, inputs, context)
        if model is None:
            model = load_model(inputs.student, runtime, for_training=True, adapter=section.adapter)
            model_warnings(context, model)
        else:
            renew_adapter(model.model, section.adapter, runtime.seed)
        opened = Opened(model, source, cached_steps(section, source, runtime))
        own = context.checkpoints / f"{number:02d}" if context.checkpoints else None
        summaries.append(_trained(section, inputs, output, opened, replace(context, checkpoints=own)))
    return summaries


def require_kept_base(sections: Sequence[DistillRecipe]) -> None:
    """Raise ArgumentError `invalid_argument` for the first section that cannot share a frozen base with the others."""
    first = sections[0].adapter if sections else None
    for number, section in enumerate(sections):
        adapter = section.adapter
        if section.method != "lightning":
            why, fix = "it distills live", "Set method to 'lightning'."
        elif adapter is None or first is None:
            why, fix = "it trains all weights", "Give it an adapter, e.g. {}."
        elif adapter.continue_adapter:
            why, fix = "it continues the student's own adapter", "Set continue_adapter to false."
        elif adapter.save != "adapter":
            why, fix = "its student is merged, which changes the base", "Set save to 'adapter'."
        elif adapter.model_dump(exclude=OWN_SETTINGS) != first.model_dump(exclude=OWN_SETTINGS):
            why, fix = "it keeps the base in another form than the first one", "Give all the same base_dtype."
        else:
            continue
        raise ArgumentError(
            "invalid_argument", f"Section {number} cannot share one frozen base: {why}.", value=number, fix=fix
        )


def section_of_round(section: DistillRecipe, of: RoundInputs) -> DistillRecipe:
    """The settings of one round: between rounds the student stays as training kept it, and its adapter goes on."""
    update: dict[str, object] = {}
    if section.adapter is not None:
        kept = {} if of.final else {"save": "adapter"}
        going_on = {"continue_adapter": True} if of.number > 1 else {}
        update["adapter"] = section.adapter.model_copy(update={**kept, **going_on})
    if not of.final:
        update["save_dtype"] = "float32"
    return section.model_copy(update=update)


def stretch_of_round(of: RoundInputs, output: Path) -> Stretch:
    """The steps of a round: the optimizer comes from the round before and is left to the next one."""
    return Stretch(
        of.first,
        of.last,
        begins_with=None if of.before is None else of.before / MOMENTS_FILE,
        leaves=None if of.final else output / MOMENTS_FILE,
        ended=are_stale if of.until_stale else lambda recent: False,
        watched=WATCHED_STEPS if of.until_stale else 0,
    )


@dataclass(frozen=True)
class Opened:
    """What one distillation trains: the student, what it learns from, and the rows of its steps.

    `judge` is a live distillation's teacher, by which the student may be judged as well. `copy` is this rank's whole
    copy of a student that ranks divide, by which it draws.
    """

    student: LoadedModel
    source: "CacheSource | LiveSource"
    steps: StepsFrom
    judge: LoadedModel | None = None
    copy: LoadedModel | None = None


def _trained(
    section: DistillRecipe, inputs: DistillInputs, output: Path, opened: Opened, context: Context
) -> TrainingSummary:
    """Train, save the student with its lineage, and say what was done."""
    student, model, source = inputs.student, opened.student, opened.source
    origin = adapter_origin(model, section.adapter, context)
    form = SavedForm.of(model, source.adopted, section.save_dtype, origin.saved if origin else None)
    of_round = inputs.round
    if of_round is not None and of_round.final and section.save_dtype == "input" and origin is None:
        form = replace(form, dtype=stored_dtype(inspect_model(of_round.origin).weights_path))
    form.try_out(model.model)
    steps, domains = opened.steps, dict(source.domains)
    require_weighed(section, domains)
    if domains:
        steps = steps_by_domain(steps, domains, section.domain_weights or {})
    if section.horizon is not None:
        steps = shortened_steps(steps, section.horizon, section.horizon_growth_steps)
    task = TrainingTask(
        LoopSettings.of(section, section.normalize),
        steps,
        distill_objective(section),
        DistillWatch(
            section, context, of_round.number + 1 if of_round and of_round.until_stale else None, sorted(domains)
        ),
        frozen_hash(origin, student),
        reweigh_of(section),
        stretch_of_round(of_round, output) if of_round else None,
        held_out := held_out_of(section, inputs, opened, context),
        opened.copy,
    )
    summary = train(model.model, task, open_runtime(context.runtime), context)
    if not context.writes:
        return summary
    if isinstance(source, CacheSource):
        summary = summary.model_copy(update={"repair": source.repair})
    if held_out is not None:
        last = summary.steps + task.taken.first
        summary = summary.model_copy(update={"held_out": held_out.finish(model.model, last)})
    if of_round is not None:
        summary = summary.model_copy(update={"round": round_summary(of_round, summary.steps)})
    if (refused := form.save(model.model, output)) is not None:
        context.reporter.alert("lossy_merge", refused)
    write_atomic(output / "training.json", summary.to_json(indent=2))
    parents = [Parent(role="student", identity=full_identity(student)), *source.parents]
    parents += [Parent(role="base", identity=origin.base)] if origin else []
    follower = source.follower if isinstance(source, LiveSource) else None
    record_lineage(
        output,
        Provenance("model", "distill", section, parents, [*saved_files(output), *_left_files(output)]),
        context,
        sft_teacher=inherited(source.claim),
        distilled_from=source.teacher,
        adapter=origin,
        teacher_mismatch_allowed=inputs.allow_teacher_mismatch,
        rendered_at=source.rendered_at,
        engines=engines_of(rollout=follower.facts) if follower else None,
    )
    return summary


def held_out_of(section: DistillRecipe, inputs: DistillInputs, opened: Opened, context: Context) -> HeldOut | None:
    """What judges the student in its training, where the recipe asks for it."""
    if section.evaluate_steps is None or inputs.held_out is None:
        return None
    runtime, student, judge = open_runtime(context.runtime), opened.copy or opened.student, opened.judge
    if context.writes:  # of several ranks one judges, by a copy
        judge = judge or (load_model(inputs.judge, runtime) if inputs.judge else None)
        if context.ranks is not None and opened.copy is None:
            student = whole_copy(student, section, runtime)
        if judge is not None and judge.model is student.model:
            judge = load_model(judge.path, runtime)  # the module whose adapter is being trained
    grading = inputs.grading or BenchmarkRecipe()
    rows = [asked(row, grading.prompt_template) for row in read_prompts(inputs.held_out)[: section.evaluate_prompts]]
    name, _ = recipe_grader(grading, [row.answer for row in rows if row.answer is not None])
    grader = grader_for(name, pattern=grading.answer_pattern, allow_code=grading.allow_code)
    settings = grading.model_copy(update={"samples_per_prompt": 0, "kl_prompts": len(rows)})
    quiet = replace(context, reporter=QuietReporter(context.reporter))
    return HeldOut(
        settings=section,
        student=student,
        eos_token_ids=tuple(opened.source.adopted.eos_token_ids),
        task=Measurement(settings, rows, grader, judge, runtime, quiet, inputs.judges),
        context=context,
        folder=context.checkpoints,
        total=section.steps,
    )


def round_summary(of: RoundInputs, steps: int) -> RoundSummary:
    """What a round that took so many steps did."""
    last = of.first + steps
    return RoundSummary(
        number=of.number, first_step=of.first, last_step=last, ended_by="steps" if last == of.last else "stale"
    )


def _left_files(output: Path) -> list[str]:
    return [MOMENTS_FILE] if (output / MOMENTS_FILE).is_file() else []


@dataclass(frozen=True)
class CacheSource:
    """An opened teacher cache."""

    path: Path
    sequences: Sequences
    teacher: ModelIdentity
    adopted: AdoptedTokenizer
    parents: list[Parent]
    claim: TeacherClaim | None
    domains: Mapping[str, int]
    repair: RepairSummary | None = None
    rendered_at: str | None = None


def require_weighed(section: DistillRecipe, domains: Mapping[str, int]) -> None:
    """Raise ArgumentError `invalid_argument` for weights of domains that no row has, or that leave no row."""
    weights = section.domain_weights or {}
    unknown = sorted(weights.keys() - domains.keys())
    if unknown or (weights and not any(weights.get(name, 1.0) for name in domains)):
        known = ", ".join(sorted(domains)) or "no domain"
        raise ArgumentError(
            "invalid_argument",
            f"distill.domain_weights names {', '.join(unknown)}, and the rows are of {known}."
            if unknown
            else "distill.domain_weights gives every domain of the rows the weight 0.",
            value=unknown or weights,
            nearest=sorted(domains)[:3],
            fix="Name domains that the prompts have in `teacher_domain`, and give one of them a weight above 0.",
        )


def open_cache(section: DistillRecipe, inputs: DistillInputs, context: Context) -> CacheSource:
    """The cache's rows, proven to belong to this student and its SFT teacher.

    Raises ConsistencyError `behaviour_mismatch`, `teacher_mismatch`, `lineage_missing`, or `topk_missing` and
    `behaviour_missing` for a cache without the log-probs that the training reads; IntegrityError `damaged_file` or
    `lineage_mismatch`; RunError `engine_disagrees` for one whose behaviour log-probs are not its student's.
    """
    cache = inputs.cache
    assert cache is not None, "lightning distills from a teacher cache"
    verified_lineage(cache)
    manifest, claim = read_manifest(cache), claim_of(inputs.student, inputs.sft_teacher, context)
    require_agreement(manifest.engine_gap)
    require_behaviour(manifest.behaviour, full_identity(inputs.student, base_form(section.adapter)))
    claim = cache_claim(manifest, claim)
    require_consistent(manifest.teacher, claim or manifest.sft_teacher, allowed=inputs.allow_teacher_mismatch)
    if manifest.topk < section.teacher_tokens:
        raise ConsistencyError(
            "topk_missing",
            f"The training needs the teacher's top {section.teacher_tokens}, the cache holds its top {manifest.topk}.",
            value=manifest.topk,
            fix=f"Build the cache with topk={section.teacher_tokens}, or use estimator='sampled' on all tokens.",
        )
    if section.extrapolation != 1 and not manifest.has_behaviour:
        raise ConsistencyError(
            "behaviour_missing",
            "distill.extrapolation needs the behaviour policy's log-probs, which this cache does not hold.",
            value=section.extrapolation,
            fix="Set distill.extrapolation to 1, or build the cache here: it stores them.",
        )
    parents = [
        Parent(role="teacher", identity=manifest.teacher),
        Parent(role="cache", sha256=manifest.content_hash()),
    ]
    adopted = adopt_tokenizer(cache / "tokenizer", context.prompting)
    sequences, repair = open_flat(cache), None
    if section.repair == "residual":
        sequences, repair = repaired(sequences)
    # Whose log-probs these are is as little proven as the cache's own lineage.
    claim = vouched(claim, made_here=context.made_here(cache))
    known = adopted, parents, claim, manifest.domains or {}
    return CacheSource(cache, sequences, manifest.teacher, *known, repair, manifest.rendered_at)


def cached_steps(
    section: DistillRecipe, source: CacheSource, runtime: Runtime, of: RoundInputs | None = None
) -> StepsFrom:
    """The cache's rows in batches, in an order that follows from the seed; of a round, those of its own steps."""
    scope = "distill" if of is None or of.number == 1 else f"distill/round-{of.number}"
    first = of.first if of else 0
    steps = stored_batches(
        source.sequences,
        steps=section.steps - first,
        batch_size=section.batch_size,
        seed=runtime.seed,
        scope=scope,
    )
    return lambda step: steps(step - first)

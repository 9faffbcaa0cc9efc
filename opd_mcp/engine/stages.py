"""The stages in the order of the data, each a function of a typed recipe section, paths, and a context.

prompts ─► generate_responses ─► sft ─► rollout ─► score ─► [teacher cache] ─► distill ─► benchmark ─► report

Every stage fills `output`, an empty or new directory, and writes its lineage.json last; `rollout` and `score` also go
on in a directory that an earlier, interrupted call left. The caller decides where a finished directory lives. A stage
stops with RunError `run_cancelled` when its reporter asks for it.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from opd_mcp.engine.builds.rollouts import rollout
from opd_mcp.engine.builds.scores import check_teacher, score
from opd_mcp.engine.cache.shards import write_shard
from opd_mcp.engine.context import Context
from opd_mcp.engine.data.prompts import encode_prompts
from opd_mcp.engine.data.responses import response_sequences
from opd_mcp.engine.evaluation.answers import compiled_pattern
from opd_mcp.engine.evaluation.benchmark import Scored, score_model
from opd_mcp.engine.evaluation.intervals import paired_difference
from opd_mcp.engine.evaluation.report import report_markdown
from opd_mcp.engine.generation.rollouts import draw_rollouts
from opd_mcp.engine.generation.samples import sample
from opd_mcp.engine.models.loading import adopt_tokenizer, load_model, save_model
from opd_mcp.engine.progress import counter, model_warnings, stage_cost
from opd_mcp.engine.provenance import claim_of, full_identity, record_lineage, tokenizer_files
from opd_mcp.engine.runtime import hardware_name, open_runtime
from opd_mcp.engine.training.batches import live_batches, stored_batches
from opd_mcp.engine.training.loop import LoopSettings, train
from opd_mcp.engine.training.objectives import SFT_OBJECTIVE, distill_objective, sft_metrics
from opd_mcp.engine.training.sources import CacheSource, LiveSource, open_cache, open_live
from opd_mcp.engine.training.watches import DistillWatch
from opd_mcp.identity.consistency import proven_claim, vouched
from opd_mcp.identity.data import ResponseRow, prompts_hash, read_prompts, read_responses
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.lineage import verified_lineage
from opd_mcp.identity.tokenizers import require_same_tokens
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.identity import Parent, TeacherClaim
from opd_mcp.schemas.recipes import (
    BenchmarkRecipe,
    DistillRecipe,
    Normalize,
    ResponsesRecipe,
    RolloutRecipe,
    SftRecipe,
)
from opd_mcp.schemas.reports import BenchmarkReport, Comparison, StageCost, TrainingSummary
from opd_mcp.schemas.runs import Alert

__all__ = ["benchmark", "check_teacher", "distill", "generate_responses", "rollout", "sample", "score", "sft"]

RESPONSES_FILE = "responses.parquet"
# What a model computes beside its weights and tokenizer, which have hashes of their own.
MODEL_FILES = ("config.json", "generation_config.json")


def generate_responses(
    recipe: ResponsesRecipe, *, teacher: Path, prompts: Path, output: Path, context: Context
) -> StageCost:
    """The teacher's responses to the SFT prompts: `responses.parquet` with exact ids, and the tokenizer to adopt."""
    started = time.perf_counter()
    runtime = open_runtime(context.runtime)
    adopted = adopt_tokenizer(teacher, context.prompting)
    rows = read_prompts(prompts)
    encoded = encode_prompts(rows[: recipe.limit], adopted.tokenizer, context)
    model = load_model(teacher, runtime)
    drawn = draw_rollouts(
        model,
        encoded,
        recipe.sampling,
        eos_token_ids=adopted.eos_token_ids,
        batch_size=recipe.batch_size,
        seed=runtime.seed,
        scope="responses",
        valid_vocab=model.facts.tokens,
        on_batch=counter(context, len(encoded), "responses"),
    )
    output.mkdir(parents=True, exist_ok=True)
    texts = adopted.tokenizer.batch_decode(
        [drawn.response(row).tolist() for row in range(len(drawn))], skip_special_tokens=True
    )
    write_shard(
        output / RESPONSES_FILE,
        drawn,
        texts={
            "id": [prompt.row.id for prompt in encoded],
            "prompt": [prompt.row.text() for prompt in encoded],
            "response": texts,
            "answer": [prompt.row.answer for prompt in encoded],
        },
    )
    adopted.save(output / "tokenizer")
    identity = full_identity(teacher)
    record_lineage(
        output,
        kind="responses",
        stage="responses",
        section=recipe,
        context=context,
        parents=[Parent(role="teacher", identity=identity), Parent(role="prompts", sha256=prompts_hash(rows))],
        files=[RESPONSES_FILE, *tokenizer_files(output)],
        sft_teacher=proven_claim(identity),
    )
    return stage_cost("generate_responses", started, len(drawn.response_ids), model.device)


def sft(
    recipe: SftRecipe,
    *,
    student: Path,
    responses: Path,
    output: Path,
    context: Context,
    sft_teacher: TeacherClaim | None = None,
    tokenizer: Path | None = None,
) -> TrainingSummary:
    """Fine-tune the student on the teacher's response tokens; the model at `output` adopts the teacher's tokenizer.

    `sft_teacher` is used for responses without lineage; `tokenizer` overrides the one saved with the responses.
    """
    runtime = open_runtime(context.runtime)
    claim = claim_of(responses, sft_teacher, context) if responses.is_dir() else sft_teacher
    saved = responses / "tokenizer"
    adopted = adopt_tokenizer(tokenizer or (saved if saved.is_dir() else student), context.prompting)
    require_same_tokens(adopted.path, student)
    rows = read_responses(responses)
    sequences = response_sequences(
        rows, adopted.tokenizer, context, eos_token_id=adopted.eos_token_ids[0], max_length=recipe.max_length
    )
    model = load_model(student, runtime, for_training=True)
    model_warnings(context, model)
    summary = train(
        model.model,
        _settings(recipe, "token"),
        stored_batches(sequences, steps=recipe.steps, batch_size=recipe.batch_size, seed=runtime.seed, scope="sft"),
        SFT_OBJECTIVE,
        sft_metrics,
        runtime,
        context,
    )
    save_model(model.model, output, adopted)
    write_atomic(output / "training.json", summary.to_json(indent=2))
    record_lineage(
        output,
        kind="model",
        stage="sft",
        section=recipe,
        context=context,
        parents=[
            Parent(role="student", identity=full_identity(student)),
            Parent(role="responses", sha256=_responses_hash(rows)),
        ],
        files=MODEL_FILES,
        sft_teacher=claim,
    )
    return summary


def distill(
    recipe: DistillRecipe,
    *,
    student: Path,
    output: Path,
    context: Context,
    cache: Path | None = None,
    teacher: Path | None = None,
    prompts: Path | None = None,
    rollout: RolloutRecipe | None = None,
    sft_teacher: TeacherClaim | None = None,
    allow_teacher_mismatch: bool = False,
) -> TrainingSummary:
    """Train the SFT student towards the teacher: `lightning` from `cache`, `live` from `teacher`, `prompts`, `rollout`.

    Both methods share loop, estimator, generator and settings (Lightning OPD, arXiv 2604.13010). Raises
    ConsistencyError for a cache of another teacher or behaviour policy, IntegrityError for a damaged one.
    """
    runtime = open_runtime(context.runtime)
    claim = claim_of(student, sft_teacher, context)
    source: CacheSource | LiveSource
    if recipe.method == "lightning":
        assert cache is not None, "lightning distills from a teacher cache"
        source = open_cache(recipe, cache, student, claim, allowed=allow_teacher_mismatch, context=context)
        # Whose log-probs these are is as little proven as the cache's own lineage.
        claim = vouched(claim, made_here=context.made_here(cache))
        model, teacher_model = load_model(student, runtime, for_training=True), None
        steps = stored_batches(
            source.sequences,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            seed=runtime.seed,
            scope="distill",
        )
    else:
        assert teacher is not None, "live distillation queries a teacher"
        assert prompts is not None, "live distillation draws rollouts for prompts"
        assert rollout is not None, "live distillation draws rollouts by a recipe"
        source = open_live(teacher, prompts, student, claim, allowed=allow_teacher_mismatch, context=context)
        model = load_model(student, runtime, for_training=True)
        teacher_model = load_model(teacher, runtime)
        steps = live_batches(
            model,
            teacher_model,
            source.prompts,
            recipe=recipe,
            rollout=rollout,
            eos_token_ids=source.adopted.eos_token_ids,
            valid_vocab=min(model.facts.tokens, teacher_model.facts.tokens),
            runtime=runtime,
        )
    model_warnings(context, model, teacher_model)
    summary = train(
        model.model,
        _settings(recipe, recipe.normalize),
        steps,
        distill_objective(recipe),
        DistillWatch(recipe, context),
        runtime,
        context,
    )
    save_model(model.model, output, source.adopted)
    write_atomic(output / "training.json", summary.to_json(indent=2))
    record_lineage(
        output,
        kind="model",
        stage="distill",
        section=recipe,
        context=context,
        parents=[Parent(role="student", identity=full_identity(student)), *source.parents],
        files=MODEL_FILES,
        sft_teacher=claim,
        distilled_from=source.teacher,
        teacher_mismatch_allowed=allow_teacher_mismatch,
    )
    return summary


def benchmark(
    recipe: BenchmarkRecipe,
    *,
    models: Mapping[str, Path],
    prompts: Path,
    output: Path,
    context: Context,
    recipe_hash: str,
    teacher: Path | None = None,
    costs: Sequence[StageCost] = (),
    alerts: Sequence[Alert] = (),
) -> BenchmarkReport:
    """Measure every model on the same prompts; the first is the candidate, the others its baselines.

    Writes report.json and report.md, with what earlier stages took and alerted.
    """
    runtime = open_runtime(context.runtime)
    compiled_pattern(recipe.answer_pattern)
    rows = read_prompts(prompts)
    chosen = rows[: recipe.limit]
    teacher_model = load_model(teacher, runtime) if teacher else None
    scored: dict[str, Scored] = {}
    warnings = model_warnings(context, teacher_model)
    for name, path in models.items():
        context.reporter.phase(f"measuring {name}")
        model = load_model(path, runtime)
        warnings += model_warnings(context, model)
        scored[name] = score_model(
            name,
            model,
            chosen,
            recipe,
            context,
            runtime,
            teacher=teacher_model,
            eos_token_ids=adopt_tokenizer(path, context.prompting).eos_token_ids,
        )
    candidate = next(iter(models))
    lineage = verified_lineage(models[candidate])
    claim = vouched(lineage.sft_teacher if lineage else None, made_here=context.made_here(models[candidate]))
    report = BenchmarkReport(
        recipe=recipe,
        seed=runtime.seed,
        prompts_sha256=prompts_hash(rows),
        prompts=len(chosen),
        prompts_with_answer=sum(row.answer is not None for row in chosen),
        teacher=teacher_model.facts.identity if teacher_model else None,
        models=[entry.score for entry in scored.values()],
        comparisons=_comparisons(candidate, scored),
        hardware=hardware_name(runtime.device),
        recipe_hash=recipe_hash,
        teacher_mismatch_allowed=bool(lineage and lineage.teacher_mismatch_allowed),
        teacher_basis=claim.basis if claim else None,
        costs=list(costs),
        alerts=list(alerts),
        warnings=list(dict.fromkeys(warnings)),
    )
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "report.json", report.to_json(indent=2))
    write_atomic(output / "report.md", report_markdown(report))
    record_lineage(
        output,
        kind="report",
        stage="benchmark",
        section=recipe,
        context=context,
        parents=[
            *(Parent(role=name, identity=entry.score.identity) for name, entry in scored.items()),
            Parent(role="prompts", sha256=report.prompts_sha256),
        ],
        files=["report.json", "report.md"],
    )
    return report


def _settings(recipe: SftRecipe | DistillRecipe, normalize: Normalize) -> LoopSettings:
    return LoopSettings(
        recipe.steps, recipe.optimizer, normalize, recipe.micro_batch_tokens, recipe.activation_checkpointing
    )


def _comparisons(candidate: str, scored: Mapping[str, Scored]) -> list[Comparison]:
    first = scored[candidate].greedy_correct
    return [
        Comparison(candidate=candidate, baseline=name, accuracy_difference=paired_difference(first, other))
        for name, entry in scored.items()
        if name != candidate and first is not None and (other := entry.greedy_correct) is not None
    ]


def _responses_hash(rows: Sequence[ResponseRow]) -> str:
    return content_hash([[row.prompt.text(), row.response, row.response_ids] for row in rows])

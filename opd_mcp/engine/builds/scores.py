"""Stage 2a, second half: the teacher's log-probs of every token, shard by shard, and the manifest that proves them."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opd_mcp.engine.builds.directory import (
    BadRow,
    ShardNote,
    begun_build,
    built_shard,
    close_build,
    note_path,
    open_build,
)
from opd_mcp.engine.builds.hygiene import without_truncated
from opd_mcp.engine.cache.manifest import MANIFEST_FILE, read_manifest, write_manifest
from opd_mcp.engine.cache.rollouts import RolloutRecord, read_record
from opd_mcp.engine.cache.shards import ContentHash, read_shard, widened, write_shard
from opd_mcp.engine.cache.statistics import ScoreTally, compacted
from opd_mcp.engine.context import Context
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.models.loading import adopt_tokenizer
from opd_mcp.engine.progress import model_warnings, stage_cost
from opd_mcp.engine.provenance import claim_of, full_identity, record_lineage, tokenizer_files
from opd_mcp.engine.runtime import Runtime, open_runtime, return_large_blocks
from opd_mcp.engine.teachers.http import open_remote, same_probe
from opd_mcp.engine.teachers.teacher import LocalTeacher, Teacher, open_local
from opd_mcp.engine.training.loop import require_going
from opd_mcp.identity.consistency import (
    delta_by_construction,
    proven_claim,
    require_behaviour,
    require_consistent,
)
from opd_mcp.identity.lineage import LINEAGE_FILE
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.tokenizers import require_same_tokens
from opd_mcp.schemas.cache import CacheManifest, Hygiene, Shard, TeacherDelta
from opd_mcp.schemas.errors import DataError, RunError
from opd_mcp.schemas.identity import Parent, RemoteTeacher, TeacherClaim
from opd_mcp.schemas.recipes import ScoreRecipe
from opd_mcp.schemas.reports import StageCost

BAD_SHARE = 0.01
DELTA_ROWS = 32


def score(
    recipe: ScoreRecipe,
    *,
    student: Path,
    rollouts: Path,
    output: Path,
    context: Context,
    teacher: Path | None = None,
    remote: RemoteTeacher | None = None,
    sft_teacher: TeacherClaim | None = None,
    sft_teacher_path: Path | None = None,
    allow_teacher_mismatch: bool = False,
) -> StageCost:
    """The teacher cache: rollouts with the log-probs of `teacher` (a directory here) or `remote`, and the manifest.

    `output` may hold what an interrupted call made. With `sft_teacher_path` Δ is measured. Raises ConsistencyError
    `tokenizer_mismatch`, `teacher_mismatch`, `lineage_missing` or `behaviour_mismatch`; IntegrityError `input_changed`
    for another teacher than the build was begun with; RunError `bad_rows` when over 1 % of the rows cannot be scored.
    """
    started = time.perf_counter()
    runtime = open_runtime(context.runtime)
    return_large_blocks()
    record = read_record(rollouts)
    behaviour = full_identity(student)
    require_behaviour(record.behaviour, behaviour)
    if teacher is not None:
        require_same_tokens(teacher, student)
    scorer = open_teacher(recipe, teacher, remote, student, runtime, context)
    if isinstance(scorer, LocalTeacher):
        model_warnings(context, scorer.model)
    try:
        claim = claim_of(student, sft_teacher, context)
        require_consistent(scorer.identity, claim, allowed=allow_teacher_mismatch)
        begun = begun_build(output)
        open_build(output, _build_record(recipe, record, scorer, runtime, allow_teacher_mismatch, begun))
        built = None
        if not (output / LINEAGE_FILE).is_file():
            built = _built(recipe, scorer, record, rollouts, output, context)
            delta = teacher_delta(claim, sft_teacher_path, scorer, built.sample, recipe, runtime)
            _finish(recipe, scorer, record, claim, built, delta, rollouts, output, context, allow_teacher_mismatch)
        earlier = built.earlier if built else 0.0
    finally:
        scorer.close()
    close_build(output)
    return stage_cost("score", started, read_manifest(output).tokens, runtime.device, earlier=earlier)


def check_teacher(
    recipe: ScoreRecipe,
    *,
    student: Path,
    context: Context,
    teacher: Path | None = None,
    remote: RemoteTeacher | None = None,
    sft_teacher: TeacherClaim | None = None,
    sft_teacher_path: Path | None = None,
    allow_teacher_mismatch: bool = False,
) -> None:
    """Ask a remote teacher who it is, before any work for it; raises what `score` would raise after the rollouts."""
    if teacher is not None:
        require_same_tokens(teacher, student)
    scorer = open_teacher(recipe, teacher, remote, student, open_runtime(context.runtime), context)
    scorer.close()
    require_consistent(scorer.identity, claim_of(student, sft_teacher, context), allowed=allow_teacher_mismatch)


def open_teacher(
    recipe: ScoreRecipe,
    teacher: Path | None,
    remote: RemoteTeacher | None,
    student: Path,
    runtime: Runtime,
    context: Context,
) -> Teacher:
    """The teacher that scores: the remote one where there is one, proven by its probe, else the one here."""
    if remote is not None:
        return open_remote(
            remote,
            tokenizer=teacher or student,
            files=teacher,
            key=context.teacher_key,
            concurrency=recipe.concurrency,
            topk=recipe.topk,
            should_stop=context.reporter.should_stop,
        )
    assert teacher is not None, "a teacher is a directory or a server"
    return open_local(teacher, runtime, recipe.micro_batch_tokens)


@dataclass
class _Built:
    """What all shards together say."""

    notes: list[ShardNote]
    tally: ScoreTally
    content: ContentHash
    sample: Sequences
    earlier: float


def _build_record(
    recipe: ScoreRecipe,
    record: RolloutRecord,
    scorer: Teacher,
    runtime: Runtime,
    allowed: bool,
    begun: dict[str, Any],
) -> dict[str, Any]:
    how = {"micro_batch_tokens", "concurrency"}
    teacher = scorer.identity.to_dict()
    before = begun.get("teacher", {}).get("probe")
    if before is not None and same_probe(before, scorer.identity.probe):
        teacher["probe"] = before  # a server's rounding may differ from day to day
    return {
        "teacher": teacher,
        "rollouts": [shard.sha256 for shard in record.shards],
        "recipe": recipe.model_dump(mode="json", exclude=how, exclude_none=True),
        "dtype": str(runtime.dtype),
        "allow_teacher_mismatch": allowed,
    }


def _built(
    recipe: ScoreRecipe, scorer: Teacher, record: RolloutRecord, rollouts: Path, output: Path, context: Context
) -> _Built:
    built, done = _Built([], ScoreTally(), ContentHash(), Sequences.empty(), 0.0), 0
    total = sum(shard.rows for shard in record.shards)
    for number, shard in enumerate(record.shards):
        require_going(context)
        path = output / f"shard-{number:05d}.parquet"
        rows, note, kept = built_shard(path, partial(_scored, recipe, scorer, rollouts, shard, path, context))
        built.earlier += note.seconds if kept else 0.0
        built.notes.append(note)
        built.tally.add(rows, note.clamped)
        built.content.add(rows)
        if number == 0:
            built.sample = rows.take(np.arange(min(DELTA_ROWS, len(rows))))  # a slice would hold the whole shard
        done += shard.rows
        del rows  # they would lie beside the next shard's
        context.reporter.progress(done, total, "scored rollouts")
        _require_good(built.notes, total, output)
    if not any(note.shard.tokens for note in built.notes):
        raise DataError(
            "empty_data",
            "No rollout is left to train on.",
            value=total,
            fix="Set 'score.on_truncated' to 'keep', or raise 'rollout.sampling.max_new_tokens'.",
        )
    return built


def _scored(
    recipe: ScoreRecipe, scorer: Teacher, rollouts: Path, shard: Shard, path: Path, context: Context
) -> tuple[Sequences, ShardNote]:
    begun = time.perf_counter()
    drawn = read_shard(rollouts / shard.file, sha256=shard.sha256)
    sequences, dropped, capped = without_truncated(drawn, recipe)
    result = scorer.score(sequences, recipe.topk)
    bad = result.bad_rows(sequences)
    scored = sequences.with_columns(**result.scores.columns())
    if bad:
        scored = scored.take(np.array([row for row in range(len(sequences)) if row not in bad], dtype=np.int64))
    small, clamped = compacted(scored, recipe.dtype)
    note = ShardNote(
        shard=write_shard(path, small, check_fence=context.check_fence),
        seconds=time.perf_counter() - begun,
        clamped=clamped,
        truncated_dropped=dropped,
        truncated_capped=capped,
        bad_rows=[BadRow(prompt_id=sequences.prompt_row_ids[row], reason=why) for row, why in sorted(bad.items())],
    )
    return widened(small), note


def _require_good(notes: Sequence[ShardNote], total: int, output: Path) -> None:
    reasons = Counter(row.reason for note in notes for row in note.bad_rows)
    bad = sum(reasons.values())
    if bad <= BAD_SHARE * total:
        return
    # Once the cause is gone these rows deserve another try, so their shards do not count as finished.
    for note in notes:
        if note.bad_rows:
            note_path(output / note.shard.file).unlink(missing_ok=True)
    reason, count = reasons.most_common(1)[0]
    raise RunError(
        "bad_rows",
        f"{bad} of {total} rollouts cannot be scored, more than {BAD_SHARE:.0%}; most often ({count}): {reason}.",
        value=next(row.prompt_id for note in notes for row in note.bad_rows if row.reason == reason),
        fix="Remove the cause and start again; finished shards without such rows are kept.",
    )


def teacher_delta(
    claim: TeacherClaim | None,
    path: Path | None,
    scorer: Teacher,
    sample: Sequences,
    recipe: ScoreRecipe,
    runtime: Runtime,
) -> TeacherDelta | None:
    """Δ between the SFT teacher and the scorer: 0 where they are proven the same, else measured on a sample.

    None where the SFT teacher's directory is not known, or the sample holds no token.
    """
    known = delta_by_construction(scorer.identity, claim)
    if known is None and path is not None:
        known = delta_by_construction(scorer.identity, proven_claim(inspect_model(path).identity))
    if known is not None or path is None or len(sample.response_ids) == 0:
        return known
    local = open_local(path, runtime, recipe.micro_batch_tokens)
    theirs = local.score(sample, 0).scores.logprobs.astype(np.float64)
    difference = np.abs(theirs - sample.columns["teacher_logprobs"].astype(np.float64))
    return TeacherDelta(
        sft_teacher=local.identity.label(),
        rows=len(sample),
        tokens=len(difference),
        mean_abs=float(difference.mean()),
        over_one_nat=float((difference > 1).mean()),
    )


def _finish(
    recipe: ScoreRecipe,
    scorer: Teacher,
    record: RolloutRecord,
    claim: TeacherClaim | None,
    built: _Built,
    delta: TeacherDelta | None,
    rollouts: Path,
    output: Path,
    context: Context,
    allowed: bool,
) -> None:
    adopt_tokenizer(rollouts / "tokenizer", context.prompting).save(output / "tokenizer")
    write_manifest(
        output,
        CacheManifest(
            teacher=scorer.identity,
            behaviour=record.behaviour,
            sft_teacher=claim,
            teacher_mismatch_allowed=allowed,
            prompts_sha256=record.prompts_sha256,
            sampling=record.sampling,
            seed=record.seed,
            eos_token_ids=record.eos_token_ids,
            topk=recipe.topk,
            dtype=recipe.dtype,
            vocab_size=scorer.vocab_size,
            shards=[note.shard for note in built.notes],
            content_sha256=built.content.hexdigest(),
            layout=record.layout,
            rollouts=record.statistics,
            scores=built.tally.statistics(),
            hygiene=_hygiene(record.hygiene, recipe, built.notes),
            engine_gap=record.engine_gap,
            teacher_delta=delta,
        ),
    )
    record_lineage(
        output,
        kind="cache",
        stage="score",
        section=recipe,
        context=context,
        parents=[
            Parent(role="teacher", identity=scorer.identity),
            Parent(role="student", identity=record.behaviour),
            Parent(role="prompts", sha256=record.prompts_sha256),
        ],
        files=[MANIFEST_FILE, *tokenizer_files(output)],
        sft_teacher=claim,
        teacher_mismatch_allowed=allowed,
    )


def _hygiene(before: Hygiene, recipe: ScoreRecipe, notes: Sequence[ShardNote]) -> Hygiene:
    return before.model_copy(
        update={
            "on_truncated": recipe.on_truncated,
            "truncated_dropped": sum(note.truncated_dropped for note in notes),
            "truncated_capped": sum(note.truncated_capped for note in notes),
            "quarantined": dict(Counter(row.reason for note in notes for row in note.bad_rows)),
        }
    )

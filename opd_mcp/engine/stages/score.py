"""The teacher cache: the teacher's log-probs of every rollout token, shard by shard, and the manifest to prove it."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.cache.building import (
    BadRow,
    ShardNote,
    begun_build,
    built_shard,
    close_build,
    known_engine,
    note_path,
    open_build,
    shared_engine,
)
from opd_mcp.engine.cache.manifest import RolloutRecord, ScoreTally, read_record, write_manifest
from opd_mcp.engine.cache.shards import ContentHash, compacted, read_shard, widened, write_shard
from opd_mcp.engine.context import Context, EngineWish, ScoreInputs, TeacherInputs, require_going
from opd_mcp.engine.data.encoding import context_of
from opd_mcp.engine.data.sequences import TRUNCATED, Sequences
from opd_mcp.engine.generation.served import opened_scorer
from opd_mcp.engine.models.loading import adopt_tokenizer, model_warnings
from opd_mcp.engine.provenance import (
    Provenance,
    claim_of,
    engines_of,
    full_identity,
    record_lineage,
    require_self,
    stage_cost,
    tokenizer_files,
)
from opd_mcp.engine.runtime import Runtime, open_runtime, return_large_blocks
from opd_mcp.engine.scoring.connection import Access
from opd_mcp.engine.scoring.local import GAP_ROWS, LocalTeacher, Teacher, open_local, require_agreement
from opd_mcp.engine.scoring.panel import open_panel
from opd_mcp.engine.scoring.remote import RemoteScorer, open_remote, same_probe
from opd_mcp.identity.consistency import (
    delta_by_construction,
    proven_claim,
    require_behaviour,
    require_consistent,
)
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.lineage import LINEAGE_FILE, MANIFEST_FILE, read_manifest
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.tokenizers import special_differences
from opd_mcp.schemas.cache import COARSEST_DTYPE, CacheManifest, EngineGap, Hygiene, Shard, TeacherDelta
from opd_mcp.schemas.errors import DataError, RunError
from opd_mcp.schemas.identity import EngineFacts, ModelIdentity, Parent, TeacherClaim
from opd_mcp.schemas.recipes import ScoreRecipe
from opd_mcp.schemas.reports import StageCost

BAD_SHARE = 0.01
DELTA_ROWS = 32


def score(section: ScoreRecipe, inputs: ScoreInputs, output: Path, context: Context) -> StageCost:
    """The teacher cache: rollouts with the teacher's log-probs, and the manifest.

    `output` may hold what an interrupted call made. With `sft_teacher_path` Δ is measured. Raises ConsistencyError
    `tokenizer_mismatch`, `teacher_mismatch`, `lineage_missing` or `behaviour_mismatch`; IntegrityError `input_changed`
    for another teacher than the build was begun with, ConsistencyError `teacher_untrue` for a server that has become
    another during the build; RunError `bad_rows` when over 1 % of the rows cannot be scored, `engine_disagrees` for an
    engine whose log-probs are not the teacher's.
    """
    started = time.perf_counter()
    runtime = open_runtime(context.runtime)
    return_large_blocks()
    record = read_record(inputs.rollouts)
    require_agreement(record.engine_gap)
    require_behaviour(record.behaviour, full_identity(inputs.student, inputs.form))
    with ExitStack() as stack:
        teacher, facts = open_teacher(section, inputs, runtime, context, stack)
        if isinstance(teacher, LocalTeacher):
            model_warnings(context, teacher.model)
        claim = claim_of(inputs.student, inputs.sft_teacher, context)
        identity = teacher.identity.model_copy(update={"context": record.teacher_context})
        require_self(claim, identity, record.behaviour)
        require_consistent(identity, claim, allowed=inputs.allow_teacher_mismatch)
        build = _CacheBuild(section, inputs, output, context, runtime, teacher, record, claim, facts, identity)
        open_build(output, build.record(begun_build(output)))
        earlier = 0.0
        if not (output / LINEAGE_FILE).is_file():
            shared_engine(output, facts)
            gap = build.scorer_gap()
            shards = build.shards()
            earlier = shards.earlier
            build.finish(shards, gap)
    close_build(output)
    return stage_cost("score", started, read_manifest(output).tokens, runtime.device, earlier=earlier)


def check_teacher(section: ScoreRecipe, inputs: TeacherInputs, context: Context) -> int | None:
    """Ask a remote teacher who it is, before any work for it; raises what `score` would raise after the rollouts.

    The tokens of the longest row that it can score; None where it does not say.
    """
    with ExitStack() as stack:
        teacher, _ = open_teacher(section, inputs, open_runtime(context.runtime), context, stack)
    claim = claim_of(inputs.student, inputs.sft_teacher, context)
    seen = context_of(read_prompts(inputs.prompts), context.prompting) if inputs.prompts else None
    identity = teacher.identity.model_copy(update={"context": seen})
    require_consistent(identity, claim, allowed=inputs.allow_teacher_mismatch)
    room = teacher.max_length if isinstance(teacher, RemoteScorer) else None
    return None if room is None else room - 1  # a server is always asked for one new token


def open_teacher(
    section: ScoreRecipe, inputs: TeacherInputs, runtime: Runtime, context: Context, stack: ExitStack
) -> tuple[Teacher, EngineFacts | None]:
    """The teacher that scores until the stack is closed, and what serves it: the remote one where there is one, an
    engine with the teacher's files, both proven by their probe, or the one here.

    Raises ConsistencyError `tokenizer_mismatch` for a teacher's directory with other tokens than the student.
    """
    if inputs.teacher is not None:
        special_differences(inputs.teacher, inputs.student)  # the rollouts had none of these in their prompts
    if inputs.teachers:
        for path in inputs.teachers.values():
            special_differences(path, inputs.student)
        return open_panel(inputs.teachers, runtime, section.micro_batch_tokens, context), None
    if inputs.remote is None and section.engine is not None and inputs.teacher is not None:
        length = longest_rollout(inputs.rollouts) + 1 if isinstance(inputs, ScoreInputs) else 0
        wish = EngineWish(section.engine, inputs.teacher, context.runtime.dtype, length, section.topk)
        return stack.enter_context(opened_scorer(wish, section.concurrency, context))
    if inputs.remote is None:
        assert inputs.teacher is not None, "a teacher is a directory or a server"
        return open_local(inputs.teacher, runtime, section.micro_batch_tokens, context), None
    scorer = open_remote(
        inputs.remote,
        inputs.teacher or inputs.student,
        files=inputs.teacher,
        concurrency=section.concurrency,
        topk=section.topk,
        access=Access(context.teacher_key, should_stop=context.reporter.should_stop),
    )
    stack.callback(scorer.close)
    return scorer, scorer.facts


def longest_rollout(rollouts: Path) -> int:
    """The tokens of the longest row, with the prompt that the teacher sees."""
    shards = (
        read_shard(rollouts / shard.file, sha256=shard.sha256).for_teacher() for shard in read_record(rollouts).shards
    )
    return max((int(rows.lengths().max()) for rows in shards if len(rows)), default=0)


@dataclass
class _ScoredShards:
    """What all shards together say; `sample` are the first rows, `earlier` the seconds of shards that were kept."""

    notes: list[ShardNote] = field(default_factory=list)
    tally: ScoreTally = field(default_factory=ScoreTally)
    content: ContentHash = field(default_factory=ContentHash)
    domains: Counter[str] = field(default_factory=Counter)
    sample: Sequences = field(default_factory=Sequences.empty)
    earlier: float = 0.0


@dataclass(frozen=True)
class _CacheBuild:
    """The scoring of all rollouts of one record by one teacher."""

    section: ScoreRecipe
    inputs: ScoreInputs
    output: Path
    context: Context
    runtime: Runtime
    teacher: Teacher
    rollouts: RolloutRecord
    claim: TeacherClaim | None
    scored_by: EngineFacts | None
    identity: ModelIdentity
    """The teacher's, with its context."""

    def record(self, begun: dict[str, Any]) -> dict[str, Any]:
        """What fixes the build; `begun` is what an interrupted call began it with."""
        how = {"micro_batch_tokens", "concurrency"}
        teacher = self.identity.to_dict()
        before = begun.get("teacher", {}).get("probe")
        if before is not None and same_probe(before, self.teacher.identity.probe):
            teacher["probe"] = before  # a server's rounding may differ from day to day
        return {
            "teacher": teacher,
            "rollouts": [shard.sha256 for shard in self.rollouts.shards],
            "recipe": self.section.model_dump(mode="json", exclude=how, exclude_none=True),
            "dtype": str(self.runtime.dtype),
            "allow_teacher_mismatch": self.inputs.allow_teacher_mismatch,
            **known_engine(begun),
        }

    def scorer_gap(self) -> EngineGap | None:
        """How far an engine's log-probs of the first rows are from those of the teacher here; None without an engine.

        Raises RunError `engine_disagrees`: it serves another model, or does not compute this one.
        """
        path, facts = self.inputs.teacher, self.scored_by
        if self.section.engine is None or self.inputs.remote is not None or path is None or facts is None:
            return None
        first = self.rollouts.shards[0]
        rows = read_shard(self.inputs.rollouts / first.file, sha256=first.sha256)
        rows = rows.take(np.arange(min(GAP_ROWS, len(rows))))
        if len(rows.response_ids) == 0:
            return None
        local = open_local(path, self.runtime, self.section.micro_batch_tokens)
        seen = rows.for_teacher()
        ours = local.score(seen, 0).scores.logprobs.astype(np.float64)
        gaps = list[EngineGap]()
        for server in self.teacher.each() if isinstance(self.teacher, RemoteScorer) else ():
            difference = np.abs(server.score(seen, 0).scores.logprobs.astype(np.float64) - ours)
            gaps.append(EngineGap(tokens=len(ours), mean=float(difference.mean()), largest=float(difference.max())))
            require_agreement(gaps[-1], self.context.runtime.dtype if facts.dtype == "float32" else COARSEST_DTYPE)
        return max(gaps, key=lambda gap: gap.mean, default=None)

    def shards(self) -> _ScoredShards:
        """All shards, made where they are missing."""
        built, done = _ScoredShards(), 0
        total = sum(shard.rows for shard in self.rollouts.shards)
        for number, shard in enumerate(self.rollouts.shards):
            require_going(self.context)
            path = self.output / f"shard-{number:05d}.parquet"
            rows, note, kept = built_shard(path, partial(self._scored, shard, path))
            built.earlier += note.seconds if kept else 0.0
            built.notes.append(note)
            built.tally.add(rows, note.clamped)
            built.content.add(rows)
            built.domains.update(rows.domains)
            if number == 0:
                built.sample = rows.take(np.arange(min(DELTA_ROWS, len(rows))))  # a slice would hold the whole shard
            done += shard.rows
            del rows  # they would be in memory together with the next shard's
            self.context.reporter.progress(done, total, "scored rollouts")
            _require_good(built.notes, total, self.output)
        if not any(note.shard.tokens for note in built.notes):
            raise DataError(
                "empty_data",
                "No rollout is left to train on.",
                value=total,
                fix="Set 'score.on_truncated' to 'keep', or raise 'rollout.sampling.max_new_tokens'.",
            )
        return built

    def _scored(self, shard: Shard, path: Path) -> tuple[Sequences, ShardNote]:
        begun = time.perf_counter()
        drawn = read_shard(self.inputs.rollouts / shard.file, sha256=shard.sha256)
        sequences, dropped, capped = without_truncated(drawn, self.section)
        result = self.teacher.score(sequences.for_teacher(), self.section.topk)
        bad = result.bad_rows(sequences)
        scored = sequences.with_columns(**result.scores.columns())
        if bad:
            scored = scored.take(np.array([row for row in range(len(sequences)) if row not in bad], dtype=np.int64))
        small, clamped = compacted(scored, self.section.dtype)
        note = ShardNote(
            shard=write_shard(path, small, check_fence=self.context.check_fence),
            seconds=time.perf_counter() - begun,
            clamped=clamped,
            truncated_dropped=dropped,
            truncated_capped=capped,
            bad_rows=[BadRow(prompt_id=sequences.prompt_row_ids[row], reason=why) for row, why in sorted(bad.items())],
        )
        return widened(small), note

    def teacher_delta(self, sample: Sequences) -> TeacherDelta | None:
        """Δ between the SFT teacher and the scorer: 0 where they are proven the same, else measured on a sample.

        None where the SFT teacher's directory is not known, or the sample holds no token.
        """
        path = self.inputs.sft_teacher_path
        known = delta_by_construction(self.identity, self.claim)
        if known is not None or path is None or self.inputs.teachers or len(sample.response_ids) == 0:
            return known
        saw = self.claim.identity.context if self.claim and self.claim.identity else None
        answered = inspect_model(path).identity.model_copy(update={"context": saw})
        if (known := delta_by_construction(self.identity, proven_claim(answered))) is not None:
            return known
        if saw is not None and not answered.same_context(self.identity):
            return None  # what it saw is no longer known
        local = open_local(path, self.runtime, self.section.micro_batch_tokens)
        theirs = local.score(sample.for_teacher() if saw else sample, 0).scores.logprobs.astype(np.float64)
        difference = np.abs(theirs - sample.columns["teacher_logprobs"].astype(np.float64))
        return TeacherDelta(
            sft_teacher=local.identity.label(),
            rows=len(sample),
            tokens=len(difference),
            mean_abs=float(difference.mean()),
            over_one_nat=float((difference > 1).mean()),
        )

    def finish(self, built: _ScoredShards, gap: EngineGap | None) -> None:
        """Write the tokenizer, the manifest and the lineage, once the teacher has shown again who it is."""
        self.teacher.prove()
        record, section, output = self.rollouts, self.section, self.output
        delta = self.teacher_delta(built.sample)
        adopt_tokenizer(self.inputs.rollouts / "tokenizer", self.context.prompting).save(output / "tokenizer")
        write_manifest(
            output,
            CacheManifest(
                teacher=self.identity,
                behaviour=record.behaviour,
                sft_teacher=self.claim,
                teacher_mismatch_allowed=self.inputs.allow_teacher_mismatch,
                prompts_sha256=record.prompts_sha256,
                sampling=record.sampling,
                seed=record.seed,
                eos_token_ids=record.eos_token_ids,
                topk=section.topk,
                dtype=section.dtype,
                vocab_size=self.teacher.vocab_size,
                shards=[note.shard for note in built.notes],
                content_sha256=built.content.hexdigest(),
                layout=record.layout,
                rollouts=record.statistics,
                scores=built.tally.statistics(),
                domains=dict(built.domains) or None,
                hygiene=_hygiene(record.hygiene, section, built.notes),
                engine_gap=record.engine_gap,
                generated_by=record.generated_by,
                rescored=record.rescored,
                scored_by=self.scored_by,
                scorer_gap=gap,
                rendered_at=record.rendered_at,
                teacher_delta=delta,
            ),
        )
        parents = [
            Parent(role="teacher", identity=self.identity),
            Parent(role="student", identity=record.behaviour),
            Parent(role="prompts", sha256=record.prompts_sha256),
        ]
        record_lineage(
            output,
            Provenance("cache", "score", section, parents, [MANIFEST_FILE, *tokenizer_files(output)]),
            self.context,
            sft_teacher=self.claim,
            teacher_mismatch_allowed=self.inputs.allow_teacher_mismatch,
            rendered_at=self.rollouts.rendered_at,
            engines=engines_of(rollout=record.generated_by, score=self.scored_by),
        )


def without_truncated(sequences: Sequences, settings: ScoreRecipe) -> tuple[Sequences, int, int]:
    """The rows as the settings want truncated ones, and how many were dropped and capped."""
    truncated = np.asarray(sequences.finish_reasons) == TRUNCATED
    if settings.on_truncated == "keep" or not truncated.any():
        return sequences, 0, 0
    if settings.on_truncated == "drop":
        return sequences.take(np.flatnonzero(~truncated)), int(truncated.sum()), 0
    lengths = sequences.response_lengths()
    limit = np.full(len(sequences), settings.cap_tokens or 0) if settings.cap_tokens else (lengths + 1) // 2
    kept = np.where(truncated, np.minimum(lengths, limit), lengths)
    capped = int((kept < lengths).sum())
    return _cut(sequences, kept), 0, capped


def _cut(sequences: Sequences, lengths: NDArray[np.int64]) -> Sequences:
    starts = sequences.response_offsets[:-1]
    positions = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    columns = {name: values[positions] for name, values in sequences.columns.items()}
    return replace(sequences, response_ids=sequences.response_ids[positions], response_offsets=offsets, columns=columns)


def _require_good(notes: Sequence[ShardNote], total: int, output: Path) -> None:
    reasons = Counter(reason_kind(row.reason) for note in notes for row in note.bad_rows)
    bad = sum(reasons.values())
    if bad <= BAD_SHARE * total:
        return
    # Once the cause is gone these rows deserve another try, so their shards do not count as finished.
    for note in notes:
        if note.bad_rows:
            note_path(output / note.shard.file).unlink(missing_ok=True)
    kind, count = reasons.most_common(1)[0]
    first = next(row for note in notes for row in note.bad_rows if reason_kind(row.reason) == kind)
    raise RunError(
        "bad_rows",
        f"{bad} of {total} rollouts cannot be scored, more than {BAD_SHARE:.0%}; most often ({count}): {first.reason}.",
        value=first.prompt_id,
        fix="Remove the cause and start again; finished shards without such rows are kept.",
    )


def reason_kind(reason: str) -> str:
    """A reason without its numbers: a server's own text names the length of each row."""
    return re.sub(r"(?<!HTTP )\b\d{2,}", "…", reason) if "refused" in reason else reason


def _hygiene(before: Hygiene, section: ScoreRecipe, notes: Sequence[ShardNote]) -> Hygiene:
    return before.model_copy(
        update={
            "on_truncated": section.on_truncated,
            "truncated_dropped": sum(note.truncated_dropped for note in notes),
            "truncated_capped": sum(note.truncated_capped for note in notes),
            "quarantined": dict(Counter(reason_kind(row.reason) for note in notes for row in note.bad_rows)),
        }
    )

"""Stage 2a, first half: the student's own rollouts, one shard after the other, taken up again where they stopped."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from opd_mcp.engine.builds.directory import ShardNote, built_shard, open_build
from opd_mcp.engine.builds.hygiene import prompt_hygiene
from opd_mcp.engine.cache.rollouts import RECORD_FILE, RolloutRecord, read_record, write_record
from opd_mcp.engine.cache.shards import write_shard
from opd_mcp.engine.cache.statistics import RolloutTally
from opd_mcp.engine.context import Context
from opd_mcp.engine.data.prompts import encode_prompts
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.generation.rollouts import draw_rollouts
from opd_mcp.engine.models.loading import LoadedModel, adopt_tokenizer, load_model
from opd_mcp.engine.progress import counter, stage_cost
from opd_mcp.engine.provenance import full_identity
from opd_mcp.engine.runtime import Runtime, open_runtime
from opd_mcp.engine.teachers.local import score_sequences
from opd_mcp.engine.training.loop import require_going
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import prompts_hash
from opd_mcp.schemas.cache import BuildLayout, EngineGap
from opd_mcp.schemas.recipes import RolloutRecipe
from opd_mcp.schemas.reports import StageCost

GAP_ROWS = 16


def rollout(
    recipe: RolloutRecipe,
    *,
    student: Path,
    prompts: Path,
    output: Path,
    context: Context,
    tokenizer: Path | None = None,
    eval_prompts: Path | None = None,
) -> StageCost:
    """The student's own rollouts in shards; `tokenizer` is the teacher's directory: its template and EOS hold.

    `output` may hold what an interrupted call made: its finished shards are kept. Raises IntegrityError
    `input_changed` when that call had another student, other prompts or other settings.
    """
    started = time.perf_counter()
    runtime = open_runtime(context.runtime)
    adopted = adopt_tokenizer(tokenizer or student, context.prompting)
    rows = read_prompts(prompts)
    encoded = encode_prompts(rows, adopted.tokenizer, context)
    count = recipe.count or len(encoded)
    layout = BuildLayout(rows=count, shard_rows=recipe.shard_rows, batch_size=recipe.batch_size, seed=runtime.seed)
    behaviour = full_identity(student)
    open_build(
        output,
        {
            "student": behaviour.to_dict(),
            "prompts": prompts_hash(rows),
            "sampling": recipe.sampling.to_dict(),
            "layout": layout.to_dict(),
            "eos_token_ids": list(adopted.eos_token_ids),
            "prompting": context.prompting.to_dict(),
            "dtype": str(runtime.dtype),
        },
    )
    if (output / RECORD_FILE).is_file():
        return stage_cost("rollout", started, read_record(output).statistics.response_tokens, runtime.device)
    model = load_model(student, runtime)
    shards, tally, earlier, gap = [], RolloutTally(), 0.0, None
    for number, first in enumerate(range(0, count, recipe.shard_rows)):
        require_going(context)
        chosen = [encoded[row % len(encoded)] for row in range(first, min(first + recipe.shard_rows, count))]
        path = output / f"rollouts-{number:05d}.parquet"

        draw = partial(
            draw_rollouts,
            model,
            chosen,
            recipe.sampling,
            eos_token_ids=adopted.eos_token_ids,
            batch_size=recipe.batch_size,
            seed=runtime.seed,
            scope=f"rollout/{number}",
            valid_vocab=model.facts.tokens,
            on_batch=counter(context, count, "rollouts", before=first),
        )
        drawn, note, kept = built_shard(path, partial(_drawn, draw, path, context))
        earlier += note.seconds if kept else 0.0
        context.reporter.progress(first + len(drawn), count, "rollouts")
        tally.add(drawn)
        shards.append(note.shard)
        gap = gap or engine_gap(model, drawn, runtime)
    statistics = tally.statistics()
    adopted.save(output / "tokenizer")
    write_record(
        output,
        RolloutRecord(
            behaviour=behaviour,
            prompts_sha256=prompts_hash(rows),
            sampling=recipe.sampling,
            seed=runtime.seed,
            eos_token_ids=list(adopted.eos_token_ids),
            shards=shards,
            layout=layout,
            statistics=statistics,
            hygiene=prompt_hygiene(rows, len(encoded), eval_prompts),
            engine_gap=gap,
        ),
    )
    return stage_cost("rollout", started, statistics.response_tokens, model.device, earlier=earlier)


def _drawn(draw: Callable[[], Sequences], path: Path, context: Context) -> tuple[Sequences, ShardNote]:
    begun = time.perf_counter()
    drawn = draw()
    shard = write_shard(path, drawn, check_fence=context.check_fence)
    return drawn, ShardNote(shard=shard, seconds=time.perf_counter() - begun)


def engine_gap(model: LoadedModel, drawn: Sequences, runtime: Runtime) -> EngineGap | None:
    """How far the generator's log-probs are from the scorer's, on the first rows; None when they hold no token."""
    sample = drawn.slice(0, min(GAP_ROWS, len(drawn)))
    if len(sample.response_ids) == 0:
        return None
    scores = score_sequences(model, sample, topk=0, micro_batch_tokens=4096, runtime=runtime)
    difference = np.abs(scores.logprobs.astype(np.float64) - sample.columns["behaviour_logprobs"].astype(np.float64))
    return EngineGap(tokens=len(difference), mean=float(difference.mean()), largest=float(difference.max()))

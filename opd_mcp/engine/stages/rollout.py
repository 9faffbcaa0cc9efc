"""The student's own rollouts, shard by shard, resumed where an earlier call stopped."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

from opd_mcp.engine.cache.building import begun_build, built_shard, drawn_shard, known_engine, open_build, shared_engine
from opd_mcp.engine.cache.manifest import RECORD_FILE, RolloutRecord, RolloutTally, read_record, write_record
from opd_mcp.engine.context import Context, RolloutInputs, counter, require_going
from opd_mcp.engine.data.encoding import (
    EncodedPrompt,
    by_domain,
    context_of,
    encode_prompts,
    ids_of,
    recorded_moment,
)
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import Generator
from opd_mcp.engine.generation.served import (
    engine_wish,
    first_gap,
    generator_gap,
    opened_generator,
    require_fits,
    require_room,
    room_for,
)
from opd_mcp.engine.models.loading import LoadedModel, adopt_tokenizer, load_model
from opd_mcp.engine.provenance import full_identity, stage_cost
from opd_mcp.engine.runtime import Runtime, open_runtime
from opd_mcp.engine.scoring.local import score_sequences
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import PromptRow, prompts_hash, require_all_or_no_domain
from opd_mcp.identity.data.scan import eval_overlap
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.tokenizers import require_unused, special_differences
from opd_mcp.schemas.cache import BuildLayout, Hygiene
from opd_mcp.schemas.recipes import RolloutRecipe
from opd_mcp.schemas.reports import StageCost

# Padded tokens of one forward pass over rows that are scored again.
RESCORING_TOKENS = 16384


def rollout(section: RolloutRecipe, inputs: RolloutInputs, output: Path, context: Context) -> StageCost:
    """The student's own rollouts in shards.

    `output` may hold what an interrupted call made: its finished shards are kept, and prompts are rendered as at the
    moment when it began. Raises IntegrityError
    `input_changed` when that call had another student, other prompts or other settings; RunError `engine_disagrees`
    when the first shard's log-probs are not those that scoring gives; DataError `too_long` for rows longer than
    the generator or the scorer takes, before any is drawn.
    """
    started = time.perf_counter()
    runtime = open_runtime(context.runtime)
    adopted = adopt_tokenizer(inputs.tokenizer or inputs.student, context.prompting)
    begun = begun_build(output)
    if "rendered_at" in begun:
        context = replace(context, rendered_at=datetime.fromisoformat(begun["rendered_at"]))
    moment = recorded_moment(adopted.tokenizer, context)
    if begun and "rendered_at" not in begun:
        moment = None  # of an earlier version, which did not record it
    rows = read_prompts(inputs.prompts)
    encoded = encode_prompts(rows, adopted.tokenizer, context)
    require_all_or_no_domain(rows)
    differing = special_differences(adopted.path, inputs.student)
    require_unused(differing, ids_of(encoded) if differing else (), context.prompting, inputs.student)
    count = min(section.count or len(encoded), inputs.most or sys.maxsize)
    turn = inputs.skipped % max(len(encoded), 1)
    encoded = [*encoded[turn:], *encoded[:turn]]
    room, seen = _rooms(encoded[:count], section, inputs)
    layout = BuildLayout(rows=count, shard_rows=section.shard_rows, batch_size=section.batch_size, seed=runtime.seed)
    behaviour = full_identity(inputs.student, inputs.form)
    open_build(
        output,
        {
            "student": behaviour.to_dict(),
            "prompts": prompts_hash(rows),
            "sampling": section.sampling.to_dict(),
            "layout": layout.to_dict(),
            "eos_token_ids": list(adopted.eos_token_ids),
            "prompting": context.prompting.to_dict(),
            "dtype": str(runtime.dtype),
            **({"rendered_at": moment} if moment else {}),
            **({"generated_by": section.engine} if section.engine else {}),
            **known_engine(begun),
            **({"rescore": section.rescore} if section.rescore else {}),
            **({"skipped": inputs.skipped} if inputs.skipped else {}),
        },
    )
    if (output / RECORD_FILE).is_file():
        return stage_cost("rollout", started, read_record(output).statistics.response_tokens, runtime.device)
    asked = by_domain([encoded[row % len(encoded)] for row in range(count)])
    here = section.engine is None
    facts = inspect_model(inputs.student, form=inputs.form)
    model = load_model(facts, runtime, generates=here, compiled=here or section.rescore is not None)
    shards, tally, earlier, gap = [], RolloutTally(), 0.0, None
    wish = engine_wish(section.engine, model, seen, context)
    with opened_generator(wish, model, section.batch_size, context) as generator:
        require_fits(generator, room)
        shared_engine(output, generator.facts)
        for number, first in enumerate(range(0, count, section.shard_rows)):
            require_going(context)
            chosen = asked[first : first + section.shard_rows]
            path, scope = output / f"rollouts-{number:05d}.parquet", f"rollout/{number}"
            settings = GenerationSettings(
                section.sampling, adopted.eos_token_ids, section.batch_size, runtime.seed, scope, model.facts.tokens
            )
            if number == 0 and not (here and section.rescore is None):
                gap = first_gap(generator, chosen, settings, model, context)
            on_batch = counter(context, count, "rollouts", before=first)
            draw = partial(_rows, generator, chosen, settings, on_batch, model if section.rescore else None)
            drawn, note, kept = built_shard(path, partial(drawn_shard, draw, path, context.check_fence))
            earlier += note.seconds if kept else 0.0
            context.reporter.progress(first + len(drawn), count, "rollouts")
            tally.add(drawn)
            shards.append(note.shard)
            gap = gap or generator_gap(generator, drawn, model, context)
    statistics = tally.statistics()
    adopted.save(output / "tokenizer")
    write_record(
        output,
        RolloutRecord(
            behaviour=behaviour,
            prompts_sha256=prompts_hash(rows),
            sampling=section.sampling,
            seed=runtime.seed,
            eos_token_ids=list(adopted.eos_token_ids),
            shards=shards,
            layout=layout,
            statistics=statistics,
            hygiene=prompt_hygiene(rows, len(encoded), inputs.eval_prompts),
            engine_gap=gap,
            generated_by=generator.facts,
            rescored=True if section.rescore else None,
            rendered_at=moment,
            teacher_context=context_of(rows, context.prompting),
        ),
    )
    return stage_cost("rollout", started, statistics.response_tokens, model.device, earlier=earlier)


def _rooms(prompts: list[EncodedPrompt], section: RolloutRecipe, inputs: RolloutInputs) -> tuple[int, int]:
    """The tokens of the longest row as drawn, and with what the teacher sees, which the same engine may score later.

    Raises DataError `too_long` where the scorer's is longer than it takes.
    """
    room = room_for(prompts, section.sampling)
    seen = max(room, room_for([prompt.for_teacher() for prompt in prompts], section.sampling))
    require_room(seen, inputs.longest, "the teacher's server")
    if seen > room and inputs.tokenizer is not None:
        require_room(seen, inspect_model(inputs.tokenizer).positions, "the teacher")
    return room, seen


def _rows(
    generator: Generator,
    prompts: list[EncodedPrompt],
    settings: GenerationSettings,
    on_batch: Callable[[int], None],
    rescorer: LoadedModel | None,
) -> Sequences:
    drawn = generator.draw(prompts, settings, on_batch)
    if rescorer is None:
        return drawn
    runtime = Runtime(rescorer.device, rescorer.model.dtype, settings.seed)
    scores = score_sequences(rescorer, drawn, topk=0, micro_batch_tokens=RESCORING_TOKENS, runtime=runtime)
    return drawn.with_columns(behaviour_logprobs=scores.logprobs)


def prompt_hygiene(rows: list[PromptRow], usable: int, evaluation: Path | None) -> Hygiene:
    """Counts over the prompts; `usable` of them have a length that fits."""
    texts = [row.text() for row in rows]
    overlap = {} if evaluation is None else eval_overlap(texts, [row.text() for row in read_prompts(evaluation)])
    return Hygiene(
        prompts=len(rows),
        over_long_prompts=len(rows) - usable,
        duplicate_prompts=len(texts) - len(set(texts)),
        **overlap,
    )

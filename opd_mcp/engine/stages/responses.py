"""The teacher's responses to the SFT prompts, shard by shard, resumed where an earlier attempt stopped."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import groupby
from pathlib import Path

from opd_mcp.engine.cache.building import begun_build, built_shard, drawn_shard, known_engine, open_build, shared_engine
from opd_mcp.engine.cache.shards import write_shard
from opd_mcp.engine.context import Context, ResponsesInputs, counter, require_going
from opd_mcp.engine.data.encoding import EncodedPrompt, by_domain, context_of, encode_prompts, recorded_moment
from opd_mcp.engine.data.sequences import Sequences, concatenate
from opd_mcp.engine.evaluation.teacher_responses import graded_responses, require_gradable, right_responses
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import Generator
from opd_mcp.engine.generation.served import (
    engine_wish,
    first_gap,
    generator_gap,
    opened_generator,
    require_fits,
    room_for,
)
from opd_mcp.engine.models.loading import AdoptedTokenizer, adopt_tokenizer, load_model
from opd_mcp.engine.provenance import (
    Provenance,
    engines_of,
    full_identity,
    record_lineage,
    stage_cost,
    tokenizer_files,
)
from opd_mcp.engine.runtime import open_runtime
from opd_mcp.identity.consistency import proven_claim
from opd_mcp.identity.data.reading import read_prompts, read_responses
from opd_mcp.identity.data.rows import prompts_hash
from opd_mcp.identity.panels import full_panel, require_domains
from opd_mcp.schemas.identity import EngineFacts, Parent
from opd_mcp.schemas.recipes import ResponsesRecipe
from opd_mcp.schemas.reports import StageCost

RESPONSES_FILE = "responses.parquet"
# What a resumed run draws again at most, as of rollouts by default.
SHARD_ROWS = 4096


def generate_responses(section: ResponsesRecipe, inputs: ResponsesInputs, output: Path, context: Context) -> StageCost:
    """The teacher's responses: `responses.parquet` with exact ids, and the tokenizer to adopt.

    With `keep` "right" those that the grader finds wrong are left out, and copies of a prompt's response. Where the
    context has a place for checkpoints, finished shards are kept there, and prompts are rendered as at the moment when
    the first was drawn. Raises DataError `no_answers`, or `empty_data` where none is right; RunError `engine_disagrees`
    when log-probs are not those that scoring gives, IntegrityError `input_changed` where kept shards are of other
    prompts or settings, and what an engine raises.
    """
    started = time.perf_counter()
    runtime = open_runtime(context.runtime)
    adopted = adopt_tokenizer(inputs.teacher, context.prompting)
    rows, begun = read_prompts(inputs.prompts), {} if context.checkpoints is None else begun_build(context.checkpoints)
    if begun.get("rendered_at"):
        context = replace(context, rendered_at=datetime.fromisoformat(begun["rendered_at"]))
    moment = recorded_moment(adopted.tokenizer, context)
    prompts = encode_prompts(rows[: section.limit], adopted.tokenizer, context)
    asked = _asked(inputs, [prompt for prompt in prompts for _ in range(section.samples)])
    encoded = [prompt for one in asked for prompt in one.prompts]
    if section.keep == "right":
        require_gradable(encoded, inputs.grading)
    own = full_panel(inputs.teachers) if inputs.teachers else full_identity(inputs.teacher)
    if context.checkpoints is not None:
        made_of = {"teacher": own.to_dict(), "prompts": prompts_hash(rows), "responses": section.to_dict()}
        how = {"seed": runtime.seed, "dtype": str(runtime.dtype), "prompting": context.prompting.to_dict()}
        stops = {"eos_token_ids": list(adopted.eos_token_ids), "rendered_at": moment}
        open_build(context.checkpoints, made_of | how | stops | known_engine(begun))
    answering = _Answering(section, adopted, context, len(encoded))
    drawn = concatenate([part for one in asked for part in answering.answers(one)])
    if encoded[0].teacher_ids is not None:  # the student learns to answer what it sees itself
        drawn = drawn.with_prompts([prompt.ids for prompt in encoded])
    output.mkdir(parents=True, exist_ok=True)
    texts = adopted.tokenizer.batch_decode(
        [drawn.response(row).tolist() for row in range(len(drawn))], skip_special_tokens=True
    )
    if section.keep == "right" and inputs.grading is not None:
        kept = right_responses([prompt.row for prompt in encoded], texts, inputs.grading, context)
        drawn = drawn.take(kept)
        encoded, texts = [encoded[row] for row in kept], [texts[row] for row in kept]
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
    if inputs.grading is not None and section.keep == "all":
        graded_responses(read_responses(output / RESPONSES_FILE), adopted.tokenizer, inputs.grading, context)
    identity = own.model_copy(update={"context": context_of(rows, context.prompting)})
    parents = [Parent(role="teacher", identity=identity), Parent(role="prompts", sha256=prompts_hash(rows))]
    made = Provenance("responses", "responses", section, parents, [RESPONSES_FILE, *tokenizer_files(output)])
    record_lineage(
        output,
        made,
        context,
        sft_teacher=proven_claim(identity),
        rendered_at=moment,
        engines=engines_of(responses=answering.engine),
    )
    tokens = len(drawn.response_ids)
    return stage_cost("generate_responses", started, tokens, runtime.device, earlier=answering.earlier)


@dataclass(frozen=True)
class _Asked:
    """Prompts that one teacher answers; `scope` names the random streams."""

    scope: str
    teacher: Path
    prompts: Sequence[EncodedPrompt]


def _asked(inputs: ResponsesInputs, prompts: Sequence[EncodedPrompt]) -> list[_Asked]:
    """Who answers what; raises DataError `unknown_domain` for prompts of none of several teachers."""
    if not inputs.teachers:
        return [_Asked("responses", inputs.teacher, prompts)]
    domains = [prompt.row.teacher_domain for prompt in prompts]
    require_domains(Counter(domains), inputs.teachers, "prompts to answer")
    return [
        _Asked(f"responses/{domain}", inputs.teachers[str(domain)], list(group))
        for domain, group in groupby(by_domain(prompts), key=lambda prompt: prompt.row.teacher_domain)
    ]


@dataclass
class _Answering:
    """Draws responses; `total` is their number, `done` so many are there, `earlier` are the seconds of kept shards."""

    section: ResponsesRecipe
    adopted: AdoptedTokenizer
    context: Context
    total: int
    done: int = 0
    earlier: float = 0.0
    engine: EngineFacts | None = None

    def answers(self, asked: _Asked) -> list[Sequences]:
        """A teacher's responses to its prompts as it sees them, by shards."""
        context, here = self.context, self.section.engine is None
        runtime = open_runtime(context.runtime)
        seen = [prompt.for_teacher() for prompt in asked.prompts]
        model = load_model(asked.teacher, runtime, generates=here, compiled=here)
        room, batch = room_for(seen, self.section.sampling), self.section.batch_size
        shards, gap = list[Sequences](), None
        with opened_generator(
            engine_wish(self.section.engine, model, room, context), model, batch, context
        ) as generator:
            require_fits(generator, room)
            if context.checkpoints is not None:
                shared_engine(context.checkpoints, generator.facts)
            for number, first in enumerate(range(0, len(seen), SHARD_ROWS)):
                require_going(context)
                chosen, scope = seen[first : first + SHARD_ROWS], f"{asked.scope}/{number}" if number else asked.scope
                stops, vocab = self.adopted.eos_token_ids, model.facts.tokens
                settings = GenerationSettings(self.section.sampling, stops, batch, runtime.seed, scope, vocab)
                if number == 0 and not here:
                    first_gap(generator, chosen, settings, model, context)
                shards.append(self._shard(generator, chosen, settings))
                gap = gap or generator_gap(generator, shards[-1], model, context)
        self.engine = generator.facts
        return shards

    def _shard(self, generator: Generator, prompts: Sequence[EncodedPrompt], settings: GenerationSettings) -> Sequences:
        on_batch = counter(self.context, self.total, "responses", before=self.done)
        draw, first = partial(generator.draw, prompts, settings, on_batch), self.done
        self.done += len(prompts)
        if self.context.checkpoints is None:
            return draw()
        path = self.context.checkpoints / f"responses-{first:08d}.parquet"
        drawn, note, kept = built_shard(path, partial(drawn_shard, draw, path, self.context.check_fence))
        self.earlier += note.seconds if kept else 0.0
        self.context.reporter.progress(self.done, self.total, "responses")
        return drawn

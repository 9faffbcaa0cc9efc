"""The teacher's responses to the SFT prompts."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from opd_mcp.engine.cache.shards import write_shard
from opd_mcp.engine.context import Context, ResponsesInputs, counter
from opd_mcp.engine.data.encoding import EncodedPrompt, by_domain, context_of, encode_prompts, recorded_moment
from opd_mcp.engine.data.sequences import Sequences, concatenate
from opd_mcp.engine.evaluation.teacher_responses import graded_responses, require_gradable, right_responses
from opd_mcp.engine.generation.batch_state import GenerationSettings
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


def generate_responses(section: ResponsesRecipe, inputs: ResponsesInputs, output: Path, context: Context) -> StageCost:
    """The teacher's responses: `responses.parquet` with exact ids, and the tokenizer to adopt.

    With `keep` "right" those that the grader finds wrong are left out, and copies of a prompt's response. Raises
    DataError `no_answers`, or `empty_data` where none is right; RunError `engine_disagrees` when log-probs are not
    those that scoring gives, and what an engine raises.
    """
    started = time.perf_counter()
    runtime = open_runtime(context.runtime)
    adopted = adopt_tokenizer(inputs.teacher, context.prompting)
    rows = read_prompts(inputs.prompts)
    prompts = encode_prompts(rows[: section.limit], adopted.tokenizer, context)
    asked = _asked(inputs, [prompt for prompt in prompts for _ in range(section.samples)])
    encoded = [prompt for one in asked for prompt in one.prompts]
    if section.keep == "right":
        require_gradable(encoded, inputs.grading)
    parts, engine = list[Sequences](), None
    for one in asked:
        on_batch = counter(context, len(encoded), "responses", before=sum(map(len, parts)))
        answers, engine = _answers(section, one, adopted, on_batch, context)
        parts.append(answers)
    drawn = concatenate(parts)
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
    own = full_panel(inputs.teachers) if inputs.teachers else full_identity(inputs.teacher)
    identity = own.model_copy(update={"context": context_of(rows, context.prompting)})
    parents = [Parent(role="teacher", identity=identity), Parent(role="prompts", sha256=prompts_hash(rows))]
    made = Provenance("responses", "responses", section, parents, [RESPONSES_FILE, *tokenizer_files(output)])
    moment = recorded_moment(adopted.tokenizer, context)
    record_lineage(
        output,
        made,
        context,
        sft_teacher=proven_claim(identity),
        rendered_at=moment,
        engines=engines_of(responses=engine),
    )
    return stage_cost("generate_responses", started, len(drawn.response_ids), runtime.device)


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


def _answers(
    section: ResponsesRecipe,
    asked: _Asked,
    adopted: AdoptedTokenizer,
    on_batch: Callable[[int], None],
    context: Context,
) -> tuple[Sequences, EngineFacts | None]:
    """A teacher's responses to its prompts as it sees them, and the engine that drew them."""
    runtime, here = open_runtime(context.runtime), section.engine is None
    seen = [prompt.for_teacher() for prompt in asked.prompts]
    model = load_model(asked.teacher, runtime, generates=here, compiled=here)
    settings = GenerationSettings(
        section.sampling, adopted.eos_token_ids, section.batch_size, runtime.seed, asked.scope, model.facts.tokens
    )
    room = room_for(seen, section.sampling)
    wish = engine_wish(section.engine, model, room, context)
    with opened_generator(wish, model, section.batch_size, context) as generator:
        require_fits(generator, room)
        if not here:
            first_gap(generator, seen, settings, model, context)
        drawn = generator.draw(seen, settings, on_batch)
    generator_gap(generator, drawn, model, context)
    return drawn, generator.facts

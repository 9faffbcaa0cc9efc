"""The teacher's responses to the SFT prompts."""

import time
from pathlib import Path

from opd_mcp.engine.cache.shards import write_shard
from opd_mcp.engine.context import Context, ResponsesInputs, counter
from opd_mcp.engine.data.encoding import encode_prompts, recorded_moment
from opd_mcp.engine.evaluation.teacher_responses import graded_responses
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.served import first_gap, generator_gap, opened_generator, require_fits, room_for
from opd_mcp.engine.models.loading import adopt_tokenizer, load_model
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
from opd_mcp.schemas.identity import Parent
from opd_mcp.schemas.recipes import ResponsesRecipe
from opd_mcp.schemas.reports import StageCost

RESPONSES_FILE = "responses.parquet"


def generate_responses(section: ResponsesRecipe, inputs: ResponsesInputs, output: Path, context: Context) -> StageCost:
    """The teacher's responses: `responses.parquet` with exact ids, and the tokenizer to adopt.

    Raises RunError `engine_disagrees` when their log-probs are not those that scoring gives, and what an engine raises.
    """
    started = time.perf_counter()
    runtime = open_runtime(context.runtime)
    adopted = adopt_tokenizer(inputs.teacher, context.prompting)
    rows = read_prompts(inputs.prompts)
    encoded = encode_prompts(rows[: section.limit], adopted.tokenizer, context)
    here = section.engine is None
    model = load_model(inputs.teacher, runtime, generates=here, compiled=here)
    settings = GenerationSettings(
        section.sampling, adopted.eos_token_ids, section.batch_size, runtime.seed, "responses", model.facts.tokens
    )
    room = room_for(encoded, section.sampling)
    with opened_generator(section.engine, model, room, section.batch_size, context) as generator:
        require_fits(generator, room)
        if not here:
            first_gap(generator, encoded, settings, model, context)
        drawn = generator.draw(encoded, settings, counter(context, len(encoded), "responses"))
    generator_gap(generator, drawn, model, context)
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
    if inputs.grading is not None:
        graded_responses(read_responses(output / RESPONSES_FILE), adopted.tokenizer, inputs.grading, context)
    identity = full_identity(inputs.teacher)
    parents = [Parent(role="teacher", identity=identity), Parent(role="prompts", sha256=prompts_hash(rows))]
    made = Provenance("responses", "responses", section, parents, [RESPONSES_FILE, *tokenizer_files(output)])
    moment = recorded_moment(adopted.tokenizer, context)
    record_lineage(
        output,
        made,
        context,
        sft_teacher=proven_claim(identity),
        rendered_at=moment,
        engines=engines_of(responses=generator.facts),
    )
    return stage_cost("generate_responses", started, len(drawn.response_ids), model.device)

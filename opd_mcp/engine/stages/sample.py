"""A few responses of one model, to be read: `samples.json`."""

import json
import time
from pathlib import Path

from opd_mcp.engine.context import Context, SampleInputs, counter
from opd_mcp.engine.data.encoding import encode_prompts
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.models.loading import adopt_tokenizer, load_model
from opd_mcp.engine.provenance import stage_cost
from opd_mcp.engine.runtime import open_runtime
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.recipes import SampleRecipe
from opd_mcp.schemas.reports import StageCost

SAMPLES_FILE = "samples.json"
BATCH = 8


def sample(section: SampleRecipe, inputs: SampleInputs, output: Path, context: Context) -> StageCost:
    """One response per prompt: `output`/samples.json lists prompt, response, tokens and finish_reason."""
    started = time.perf_counter()
    runtime = open_runtime(context.runtime)
    adopted = adopt_tokenizer(inputs.model, context.prompting)
    encoded = encode_prompts(read_prompts(inputs.prompts), adopted.tokenizer, context)
    loaded = load_model(inputs.model, runtime, generates=True, compiled=False)  # compiling pays for more rows
    settings = GenerationSettings(
        section.sampling, adopted.eos_token_ids, BATCH, runtime.seed, "sample", loaded.facts.tokens
    )
    prompts = [prompt.ids for prompt in encoded]
    drawn = generate(loaded.model, prompts, settings, counter(context, len(encoded), "samples"))
    samples = [
        {
            "prompt": prompt.row.text(),
            "response": adopted.tokenizer.decode(response.response_ids, skip_special_tokens=True),
            "tokens": len(response.response_ids),
            "finish_reason": response.finish_reason,
        }
        for prompt, response in zip(encoded, drawn, strict=True)
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / SAMPLES_FILE, json.dumps(samples, ensure_ascii=False, indent=2) + "\n")
    return stage_cost("sample", started, sum(len(response.response_ids) for response in drawn), loaded.device)

"""A few responses of one model, to be looked at: `samples.json`."""

import json
import time
from pathlib import Path

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.prompts import encode_prompts
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.models.loading import adopt_tokenizer, load_model
from opd_mcp.engine.runtime import hardware_name, open_runtime
from opd_mcp.engine.training.loop import require_going
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.recipes import SampleRecipe
from opd_mcp.schemas.reports import StageCost

SAMPLES_FILE = "samples.json"
BATCH = 8


def sample(recipe: SampleRecipe, *, model: Path, prompts: Path, output: Path, context: Context) -> StageCost:
    """One response a prompt: `output`/samples.json lists prompt, response, tokens and finish_reason."""
    started = time.perf_counter()
    runtime = open_runtime(context.runtime)
    adopted = adopt_tokenizer(model, context.prompting)
    encoded = encode_prompts(read_prompts(prompts), adopted.tokenizer, context)
    loaded = load_model(model, runtime, compiled=False)  # a few short responses are there before it pays

    def on_batch(done: int) -> None:
        context.reporter.progress(done, len(encoded), "samples")
        require_going(context)

    drawn = generate(
        loaded.model,
        [prompt.ids for prompt in encoded],
        recipe.sampling,
        eos_token_ids=adopted.eos_token_ids,
        batch_size=BATCH,
        seed=runtime.seed,
        scope="sample",
        valid_vocab=loaded.facts.tokens,
        on_batch=on_batch,
    )
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
    seconds, tokens = time.perf_counter() - started, sum(len(response.response_ids) for response in drawn)
    device = hardware_name(loaded.device)
    return StageCost(stage="sample", seconds=seconds, tokens=tokens, tokens_per_second=tokens / seconds, device=device)

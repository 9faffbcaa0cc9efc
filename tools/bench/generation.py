"""Bulk sampling on one CPU core: top-p against none, and our generator against HF `generate`.

Run: `python tools/bench/generation.py [--rounds 5] [--json FILE]`. It prints {"top_p_ratio", "hf_ratio",
"hf_ratio_uneven"}: the speed at top-p 0.95 over the speed at top-p 1 (bar 0.95), and ours over HF's where a row in
seven reaches the limit (bar 1.3) and where rows end at very different lengths (bar 1.5). Each is the median of ratios
of processor time, taken within the rounds of one interleaved run. `engine.py` takes `generation_variants` as a case.

And what rows that join bring, which a GPU has them do: the uneven rows in batches of 64 by steps in buffers of fixed
size, once as there (`joining_ratio`, and `joining_steps`, the ratio of the steps), once with batches that begin anew.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.engine.generation import generator, replay
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.generation.prefill import left_padded
from opd_mcp.engine.models.attention import use_packed_attention
from opd_mcp.schemas.recipes import Sampling

VOCAB, BATCH, NEW_TOKENS = 512, 256, 128
# of 512 near-uniform tokens: a response has 85 tokens on average, and one in seven reaches the limit
STOPS = list(range(2, 10))
# half of the rows end within 22 tokens, one in 80 lives to see 140
UNEVEN_STOPS, UNEVEN_TOKENS = list(range(2, 18)), 192
# A language model's logits are far from uniform; at this deviation some hundred tokens of 32,768 hold 95 % of the mass.
WIDE_VOCAB, SPREAD, WIDE_TOKENS, WIDE_BATCH = 32_768, 5.0, 16, 64
Run = Callable[[], None]


def built_model(vocab: int, spread: float | None = None) -> Qwen3ForCausalLM:
    """A random model of 0.85 M parameters besides its embeddings; `spread` is the deviation of its logits."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=1024,
        tie_word_embeddings=spread is None,
        eos_token_id=STOPS,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).eval()
    if spread is not None:
        torch.nn.init.normal_(model.lm_head.weight, std=spread / config.hidden_size**0.5)
    return model


def random_prompts(vocab: int, count: int) -> list[list[int]]:
    """Prompts of 8 to 39 tokens, none of them a stop."""
    chance = random.Random(0)
    return [[chance.randrange(20, vocab) for _ in range(chance.randrange(8, 40))] for _ in range(count)]


def generation_variants(*, quick: bool, stops: list[int] | None = None, limit: int | None = None) -> dict[str, Run]:
    """Both on one random model, with the same prompts and temperature 1."""
    stops, limit = stops or STOPS, limit or (64 if quick else NEW_TOKENS)
    plain, packing = built_model(VOCAB), built_model(VOCAB)
    assert use_packed_attention(packing)
    prompts = random_prompts(VOCAB, BATCH)
    ids, mask = left_padded(prompts, plain.device)
    settings = GenerationConfig(
        max_new_tokens=limit, do_sample=True, top_k=0, eos_token_id=stops, pad_token_id=0, temperature=1.0
    )

    def ours() -> None:
        generate(packing, prompts, GenerationSettings(Sampling(max_new_tokens=limit), stops, BATCH, 0, "bench"))

    def hf_generate() -> None:
        torch.manual_seed(0)
        plain.generate(ids, attention_mask=mask, generation_config=settings)

    return {"ours": ours, "hf_generate": hf_generate}


def joining_variants(steps: dict[str, int]) -> dict[str, Run]:
    """The uneven rows by the way of a GPU, whose steps run here as they are; each run notes how many it took."""
    model = built_model(VOCAB)
    assert use_packed_attention(model)
    prompts, sampling = random_prompts(VOCAB, BATCH), Sampling(max_new_tokens=UNEVEN_TOKENS)
    settings = GenerationSettings(sampling, UNEVEN_STOPS, BATCH // generator.JOINING, 0, "bench")

    def run(name: str, room: int) -> None:
        steps[name] = 0
        step = replay.Segment.step

        def counted(segment: replay.Segment) -> None:
            steps[name] += 1
            step(segment)

        with (
            patch.object(generator, "replays", replay.has_fixed_steps),
            patch.object(replay, "LEAST_STEPS", 10**9),  # there is nothing to record on
            patch.object(replay, "JOINING_BYTES", room),
            patch.object(replay.Segment, "step", counted),
        ):
            generate(model, prompts, settings)

    return {"joining": partial(run, "joining", replay.JOINING_BYTES), "batches": partial(run, "batches", 0)}


def top_p_variants() -> dict[str, Run]:
    """The same rows, none of which ends early, at top-p 1 and 0.95."""
    model = built_model(WIDE_VOCAB, SPREAD)
    assert use_packed_attention(model)
    prompts = random_prompts(WIDE_VOCAB, WIDE_BATCH)

    def at(top_p: float) -> Run:
        sampling = Sampling(top_p=top_p, max_new_tokens=WIDE_TOKENS)
        return lambda: _generated(model, prompts, sampling)

    return {"top_p": at(0.95), "plain": at(1.0)}


def _generated(model: Qwen3ForCausalLM, prompts: list[list[int]], sampling: Sampling) -> None:
    generate(model, prompts, GenerationSettings(sampling, [], WIDE_BATCH, 0, "bench"))


def median_ratio(first: Run, second: Run, rounds: int) -> float:
    """Processor time of `second` / `first`, both once per round, in an order that alternates."""
    ratios = []
    for number in range(rounds + 1):
        seconds = {}
        for name in ("first", "second") if number % 2 else ("second", "first"):
            begun = time.process_time()
            (first if name == "first" else second)()
            seconds[name] = time.process_time() - begun
        if number:  # the first round warms up
            ratios.append(seconds["second"] / seconds["first"])
    return statistics.median(ratios)


def main(rounds: int, file: Path | None) -> None:
    """Print the ratios as one JSON line, and write them to a file."""
    torch.set_num_threads(1)
    begun, load = time.perf_counter(), os.getloadavg()[0]
    even, uneven = (
        generation_variants(quick=False),
        generation_variants(quick=False, stops=UNEVEN_STOPS, limit=UNEVEN_TOKENS),
    )
    wide, steps = top_p_variants(), dict[str, int]()
    joining = joining_variants(steps)
    answer = {
        "top_p_ratio": median_ratio(wide["top_p"], wide["plain"], rounds),
        "hf_ratio": median_ratio(even["ours"], even["hf_generate"], rounds),
        "hf_ratio_uneven": median_ratio(uneven["ours"], uneven["hf_generate"], rounds),
        "joining_ratio": median_ratio(joining["joining"], joining["batches"], rounds),
        "joining_steps": steps["batches"] / steps["joining"],
        "rounds": rounds,
        "load": load,
        "seconds": time.perf_counter() - begun,
    }
    text = json.dumps({name: round(value, 3) for name, value in answer.items()})
    print(text)
    if file is not None:
        file.write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    main(given.rounds, given.json)

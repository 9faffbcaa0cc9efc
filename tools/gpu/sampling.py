"""How near sampling on one CUDA device is to what its memory allows, and what rows that join a batch bring.

Run from a bare checkout: `python tools/gpu/sampling.py [--json FILE]`. Needs torch, transformers, numpy and pydantic.
Takes less than six minutes. Random bf16 weights in Qwen3's shapes, T = 1.

1. The 0.6B and the 4B shape, batches of 64, 256 and 1024 rows of 128 new tokens, none of which ends early: tokens per
   second, and the share of the roofline, which is the time that reading the weights and all keys and values of each
   step takes at the bandwidth that a copy reaches in the same process. At batch 256 also HF `generate` with a static
   cache. Bar on CUDA: 60 % of the roofline at batch 256.
2. The 0.6B shape, 1024 rows that end at very different lengths, 256 at a time: with rows that join, and in batches that
   each begin anew; tokens per second, steps, and log-probs against a forward pass.

`--device cpu --tiny` runs the same code on tiny shapes, to check this script without a GPU; its speeds mean nothing.
Exits with 1 if a deviation, or on CUDA a bar, is missed.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.engine.generation import generator, replay
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.runtime import hardware_name
from opd_mcp.schemas.recipes import Sampling
from tools.gpu.check import SHAPES, VOCAB, Shape, check, failures, random_model
from tools.gpu.generation import (
    MOST_OFF,
    OURS,
    Workload,
    interleaved_rates,
    our_variant,
    random_prompts,
    sdpa_twin,
    static_variant,
    true_logprobs_gap,
)
from tools.gpu.timing import median_seconds

BATCHES, COMPARED, NEW_TOKENS, PROMPT = (64, 256, 1024), 256, 128, (32, 128)
LEAST_OF_ROOFLINE = 0.6
COPIED_BYTES = 4 << 30
UNEVEN_ROWS, UNEVEN_TOKENS = 1024, 512
# near-uniform tokens end a row with this chance at each step: half of the rows live for 70 tokens, one in 160 for 512
STOP_SHARE = 0.01
TINY: Shape = (64, 2, 2, 128)


def main(given: argparse.Namespace) -> None:
    """Print the report as one JSON line, and write it to a file."""
    device, cuda = torch.device(given.device), given.device == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here; --device cpu --tiny checks the script itself.")
    shapes = {"tiny": TINY} if given.tiny else {name: SHAPES[name] for name in ("0.6B", "4B")}
    vocab, batches = (512, (4,)) if given.tiny else (VOCAB, BATCHES)
    bandwidth = copy_bandwidth(device, (1 << 24) if given.tiny else COPIED_BYTES)
    report: dict[str, object] = {"device": hardware_name(device), "torch": torch.__version__, "bandwidth": bandwidth}
    for name, shape in shapes.items():
        model = random_model(shape, device, vocab, training=False)
        report[name] = shares = [batch_speed(model, rows, bandwidth, tiny=given.tiny) for rows in batches]
        print(name, json.dumps(shares), flush=True)
        if cuda and (share := shares[batches.index(COMPARED)]["roofline_share"]) < LEAST_OF_ROOFLINE:
            failures.append(f"{name}: {share:.2f} of the roofline at batch {COMPARED}, below {LEAST_OF_ROOFLINE}")
        if name == next(iter(shapes)):
            report["joining"] = joining = joining_speed(model, tiny=given.tiny)
            print("joining", json.dumps(joining), flush=True)
        del model
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    print(json.dumps(report))
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for line in failures:
        print(f"missed: {line}")
    sys.exit(bool(failures))


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second that a copy of so many bytes reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds({"copy": partial(target.copy_, source)}, device, 5)["copy"]


def batch_speed(model: PreTrainedModel, rows: int, bandwidth: float, *, tiny: bool) -> dict[str, float | str | int]:
    """Tokens per second of a batch of so many rows, none of which ends early, and its share of the roofline."""
    work = Workload(rows, (4, 12), 8, 1) if tiny else Workload(rows, PROMPT, NEW_TOKENS, 2)
    prompts = random_prompts(work, model.config.vocab_size)
    never = [model.config.vocab_size]
    variants = {OURS: our_variant(model, prompts, never, work)}
    if rows == COMPARED or tiny:
        variants["hf_static_cache"] = static_variant(sdpa_twin(model), prompts, never, work)
    rates = interleaved_rates(variants, model.device, work.rounds)
    ours = rates[OURS]
    assert isinstance(ours, float), "ours runs"
    tokens = rows * work.new_tokens
    least = sum(step_bytes(model, prompts, done) for done in range(work.new_tokens)) / bandwidth
    return {"rows": rows, "new_tokens": work.new_tokens, **rates, "roofline_share": least * ours / tokens}


def step_bytes(model: PreTrainedModel, prompts: list[list[int]], done: int) -> int:
    """Bytes of weights, keys and values that the step after `done` new tokens has to read."""
    config = model.config.get_text_config()
    weights = sum(each.nbytes for each in model.parameters())
    if not config.tie_word_embeddings:  # a step looks up the rows of its tokens only
        weights -= model.get_input_embeddings().weight.nbytes
    width = config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return weights + 2 * config.num_hidden_layers * width * sum(len(prompt) + done for prompt in prompts)


def joining_speed(model: PreTrainedModel, *, tiny: bool) -> dict[str, object]:
    """Tokens per second and steps of uneven rows that join, and of batches; checks log-probs of the former."""
    work = Workload(16, (4, 12), 24, 1) if tiny else Workload(UNEVEN_ROWS, PROMPT, UNEVEN_TOKENS, 2)
    vocab = model.config.vocab_size
    prompts, stops = random_prompts(work, vocab), list(range(max(1, int((0.1 if tiny else STOP_SHARE) * vocab))))
    settings = GenerationSettings(
        Sampling(temperature=1.0, max_new_tokens=work.new_tokens), stops, work.rows // generator.JOINING, 0, "joining"
    )
    steps = dict[str, list[int]]()

    def run(name: str, room: int, seed: int) -> int:
        with patch.object(replay, "JOINING_BYTES", room), fixed_steps(model, steps.setdefault(name, [])):
            drawn = generate(model, prompts, settings)
        if name == "joining" and seed == 0:
            gaps[:] = [true_logprobs_gap(model, prompts[:8], drawn[:8])]
        return sum(len(row.response_ids) for row in drawn)

    gaps = list[float]()
    variants = {"joining": partial(run, "joining", replay.JOINING_BYTES), "batches": partial(run, "batches", 0)}
    rates = interleaved_rates(variants, model.device, work.rounds)
    off = check("generation with rows that join, log-probs against a forward pass", gaps[0], MOST_OFF)
    counts = {name: sum(of_segments) // (work.rounds + 1) for name, of_segments in steps.items()}
    return {"rows": work.rows, "at_a_time": settings.batch_size, "tokens_s": rates, "steps": counts, "log-probs": off}


@contextmanager
def fixed_steps(model: PreTrainedModel, taken: list[int]) -> Iterator[None]:
    """Decode in buffers of fixed size, without recordings where there is no CUDA; `taken` gets each segment's steps."""
    drawn_segment = replay._drawn_segment

    def counted(*given: object) -> int:
        taken.append(drawn_segment(*given))  # type: ignore[arg-type]
        return taken[-1]

    recorded = model.device.type == "cuda"
    with (
        patch.object(replay, "_drawn_segment", counted),
        patch.object(generator, "replays", replay.replays if recorded else replay.has_fixed_steps),
        patch.object(replay, "LEAST_STEPS", replay.LEAST_STEPS if recorded else 10**9),
    ):
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())

"""Speed of sampling: ours, HF `generate` with a static cache, and HF continuous batching; a part of `check.py`."""

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from opd_mcp.engine.generation import generator
from opd_mcp.engine.generation.batch_state import Generated, GenerationSettings
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.generation.prefill import left_padded
from opd_mcp.engine.models.attention import use_packed_attention
from opd_mcp.engine.models.embeddings import head_logits
from opd_mcp.schemas.recipes import Sampling
from tools.gpu.timing import Check, synchronize

# samples one response per prompt with this seed; returns their tokens, up to and including the stop tokens
Variant = Callable[[int], int]
OURS = "ours"
# An HF variant that raises these cannot run here, which is no failure: torch reports a missing compiler, a failed
# capture and exhausted memory as RuntimeError; continuous batching raises MemoryError without room for its cache.
IMPOSSIBLE = (RuntimeError, MemoryError)
# the same bf16 products, summed in two orders through all layers
MOST_OFF = 0.1
PAGE = 256  # tokens per page of continuous batching's cache, HF's default


@dataclass(frozen=True)
class Workload:
    """The amount of sampling: rows, range of prompt lengths, maximum of new tokens, and counted rounds."""

    rows: int
    prompt: tuple[int, int]
    new_tokens: int
    rounds: int


FULL, TINY = Workload(64, (32, 128), 128, rounds=2), Workload(4, (4, 12), 8, rounds=1)


def generation_speeds(model: PreTrainedModel, check: Check, *, tiny: bool) -> dict[str, object]:
    """Tokens per second of each variant at T = 1, or why it did not run; rows of full length, and rows that stop early.

    `model` packs, as the engine's models do; the HF variants get its weights with plain SDPA. Checks our log-probs.
    """
    model.eval()
    work, vocab = TINY if tiny else FULL, model.config.vocab_size
    prompts = random_prompts(work, vocab)
    # continuous batching replaces the attention of the model that it was called on (transformers 5.17)
    plain, paged = sdpa_twin(model), sdpa_twin(model)
    # Near-uniform tokens: with this many stop tokens a response has half of the new tokens on average.
    stops = {"fixed_length": [vocab], "stop_tokens": list(range(math.ceil(1.5 * vocab / work.new_tokens)))}
    found: dict[str, object] = {"rows": work.rows, "new_tokens": work.new_tokens, "rounds": work.rounds}
    found["log-probs"] = check("generation, log-probs against a forward pass", worst_logprob(model, prompts), MOST_OFF)
    windowed = check("generation with windows, the same", worst_logprob(windowed_model(model), prompts), MOST_OFF)
    found["log-probs with windows"] = windowed
    for name, ids in stops.items():
        variants = {
            OURS: our_variant(model, prompts, ids, work),
            "ours_step_by_step": step_by_step_variant(model, prompts, ids, work),
            "hf_static_cache": static_variant(plain, prompts, ids, work),
            "hf_continuous_batching": continuous_variant(paged, prompts, ids, work),
        }
        found[name] = interleaved_rates(variants, model.device, work.rounds)
        # the manager was made for these stop tokens
        paged.destroy_cached_continuous_batching_manager()
    print("generation, tokens/s", json.dumps(found), flush=True)
    return found


def random_prompts(work: Workload, vocab: int) -> list[list[int]]:
    """The same random prompts of the workload's lengths in every run."""
    rng = np.random.default_rng(0)
    low, high = work.prompt
    return [rng.integers(vocab, size=length).tolist() for length in rng.integers(low, high + 1, size=work.rows)]


def windowed_model(model: PreTrainedModel) -> PreTrainedModel:
    """A small random Gemma 3 with the vocabulary, device and dtype of `model`; one layer in two sees 16 tokens."""
    config = Gemma3TextConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    with torch.device(model.device):
        made: PreTrainedModel = Gemma3ForCausalLM(config).to(model.dtype).eval()
    assert use_packed_attention(made), "only models that pack are recorded"
    return made


def sdpa_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model with the same weights and transformers' own attention."""
    config = copy.deepcopy(model.config)  # the copy gets another attention implementation
    with torch.device(model.device):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(model.dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def our_variant(model: PreTrainedModel, prompts: list[list[int]], stops: list[int], work: Workload) -> Variant:
    """The engine's own generator."""
    sampling = Sampling(temperature=1.0, max_new_tokens=work.new_tokens)

    def run(seed: int) -> int:
        drawn = generate(model, prompts, GenerationSettings(sampling, stops, work.rows, seed, "generation"))
        return sum(len(response.response_ids) for response in drawn)

    return run


def step_by_step_variant(model: PreTrainedModel, prompts: list[list[int]], stops: list[int], work: Workload) -> Variant:
    """The engine's own generator with the growing cache that it uses where steps cannot be replayed."""
    run = our_variant(model, prompts, stops, work)

    def slowly(seed: int) -> int:
        with patch.object(generator, "replays", lambda model, cache: False):
            return run(seed)

    return slowly


def worst_logprob(model: PreTrainedModel, prompts: list[list[int]]) -> float:
    """The largest deviation of a response's log-probs from those of a forward pass over prompt and response."""
    prompts = prompts[:4]
    sampling = Sampling(temperature=1.0, max_new_tokens=40)
    drawn = generate(model, prompts, GenerationSettings(sampling, [0], 4, 0, "log-probs"))
    return true_logprobs_gap(model, prompts, drawn)


def true_logprobs_gap(model: PreTrainedModel, prompts: list[list[int]], drawn: list[Generated]) -> float:
    """The largest deviation of these responses' log-probs from those of a forward pass over prompt and response."""
    worst = 0.0
    for prompt, row in zip(prompts, drawn, strict=True):
        ids = torch.tensor([prompt + row.response_ids], device=model.device)
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        exact = torch.log_softmax(head_logits(model, hidden), dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        worst = max(worst, (exact.cpu() - torch.tensor(row.logprobs)).abs().max().item())
    return worst


def static_variant(model: PreTrainedModel, prompts: list[list[int]], stops: list[int], work: Workload) -> Variant:
    """HF `generate`, left-padded; on CUDA a static cache makes it compile the decoding step."""
    ids, mask = left_padded(prompts, model.device)
    settings = sampling_settings(stops, work)
    settings.cache_implementation = "static"

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        drawn = model.generate(ids, attention_mask=mask, generation_config=settings)
        return tokens_until_stop(drawn[:, ids.shape[1] :], stops)

    return run


def continuous_variant(model: PreTrainedModel, prompts: list[list[int]], stops: list[int], work: Workload) -> Variant:
    """HF continuous batching with room for all rows at once; its manager and its cache are kept between rounds."""
    settings = sampling_settings(stops, work)
    pages = math.ceil((work.prompt[1] + work.new_tokens) / PAGE) + 1
    batching = ContinuousBatchingConfig(
        num_blocks=work.rows * pages, max_batch_tokens=max(PAGE, sum(len(prompt) for prompt in prompts))
    )

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        drawn = model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=batching, persistent_manager=True
        )
        # it logs failures and returns whatever it has
        errors = [output.error for output in drawn.values() if output.error is not None]
        if errors or len(drawn) < len(prompts):
            raise RuntimeError(errors[0] if errors else f"{len(drawn)} of {len(prompts)} responses came back")
        return sum(len(output.generated_tokens) for output in drawn.values())

    return run


def sampling_settings(stops: list[int], work: Workload) -> GenerationConfig:
    """Untruncated sampling at T = 1."""
    return GenerationConfig(
        max_new_tokens=work.new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=stops,
        pad_token_id=0,
    )


def tokens_until_stop(drawn: Tensor, stops: Sequence[int]) -> int:
    """Number of tokens in all rows of `drawn` [B, T], each up to and including its first stop token."""
    ends = torch.isin(drawn, torch.tensor(stops, device=drawn.device))
    before = ends.cumsum(dim=1) - ends.long()
    return int((before == 0).sum())


def interleaved_rates(variants: dict[str, Variant], device: torch.device, rounds: int) -> dict[str, float | str]:
    """Median tokens per second of each over interleaved rounds, after a warm-up round; or why a variant cannot run."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    reasons: dict[str, str] = {}
    for number in range(rounds + 1):
        for name, run in variants.items():
            if name in reasons:
                continue
            synchronize(device)
            started = time.perf_counter()
            try:
                tokens = run(number)
            except IMPOSSIBLE as error:
                if name == OURS:
                    raise
                reasons[name] = f"not run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                continue
            synchronize(device)
            if number:
                rates[name].append(tokens / (time.perf_counter() - started))
    return {name: reasons.get(name) or statistics.median(rates[name]) for name in variants}

"""Bulk generation with a KV cache: left-padded, longest prompts first, finished rows dropped from the batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_mcp.engine.data.batches import length_sorted_batches
from opd_mcp.engine.data.sequences import EOS, TRUNCATED
from opd_mcp.engine.generation.kv_cache import roomy_cache
from opd_mcp.engine.generation.sampling import draw_tokens
from opd_mcp.engine.models.rows import head_logits
from opd_mcp.engine.runtime import generator_for
from opd_mcp.schemas.recipes import Sampling

# dropping rows copies the KV cache: worth it once this share of the rows is done
FINISHED_SHARE_TO_DROP = 0.125


@dataclass(frozen=True)
class Generated:
    """One response: token ids with the stop token, their log-probs (T = 1, untruncated), and why it ended."""

    response_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_token_ids: Sequence[int],
    batch_size: int,
    seed: int,
    scope: str,
    valid_vocab: int | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Generated]:
    """One response for each prompt, in the prompts' order.

    The random stream depends on seed, scope and the batch's number only. Ids at or above `valid_vocab` (a padded
    vocabulary's tail) are never drawn. `on_batch` hears the rows done so far.
    """
    was_training = model.training
    model.eval()
    results: dict[int, Generated] = {}
    for number, rows in enumerate(length_sorted_batches([len(prompt) for prompt in prompts], batch_size)):
        generator = generator_for(seed, scope, number, device=model.device)
        batch = _generate_batch(
            model, [prompts[row] for row in rows], sampling, list(eos_token_ids), generator, valid_vocab
        )
        results.update(zip(rows.tolist(), batch, strict=True))
        on_batch(len(results))
    model.train(was_training)
    return [results[row] for row in range(len(prompts))]


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask [B, L], prompts at the right edge."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_token_ids: list[int],
    generator: torch.Generator,
    valid_vocab: int | None,
) -> list[Generated]:
    device = model.device
    input_ids, mask = left_padded(prompts, device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    eos = torch.tensor(eos_token_ids, device=device)
    cache = roomy_cache(model.config)
    decoder = model.get_decoder()

    rows, limit = len(prompts), sampling.max_new_tokens
    tokens = torch.zeros(rows, limit, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, limit, device=device)
    lengths = torch.full((rows,), limit, device=device)
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)

    for step in range(limit):
        output = decoder(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits = head_logits(model, output.last_hidden_state[:, -1])
        drawn = draw_tokens(logits[:, :valid_vocab], sampling, generator)
        tokens[alive, step] = drawn
        logprobs[alive, step] = torch.log_softmax(logits, dim=-1).gather(1, drawn[:, None])[:, 0].float()
        ends = torch.isin(drawn, eos) & ~stopped[alive]
        stopped[alive[ends]] = True
        lengths[alive[ends]] = step + 1

        going = ~stopped[alive]
        count = int(going.sum())
        if count == 0:
            break
        input_ids, positions = drawn[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if count <= len(alive) * (1 - FINISHED_SHARE_TO_DROP):
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive, input_ids, positions, mask = alive[keep], input_ids[keep], positions[keep], mask[keep]

    return _as_results(tokens, logprobs, lengths, stopped)


def _as_results(tokens: Tensor, logprobs: Tensor, lengths: Tensor, stopped: Tensor) -> list[Generated]:
    all_ids, all_logprobs = tokens.tolist(), logprobs.tolist()
    return [
        Generated(all_ids[row][:length], all_logprobs[row][:length], EOS if ended else TRUNCATED)
        for row, (length, ended) in enumerate(zip(lengths.tolist(), stopped.tolist(), strict=True))
    ]

"""Bulk generation with a KV cache: left-padded, longest prompts first, finished rows dropped from the batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opd_mcp.engine.data.batches import length_sorted_batches
from opd_mcp.engine.generation.drawing import Drawing, Generated
from opd_mcp.engine.generation.kv_cache import roomy_cache
from opd_mcp.engine.generation.replay import draw_replayed, replays
from opd_mcp.engine.models.rows import head_logits
from opd_mcp.engine.runtime import generator_for
from opd_mcp.schemas.recipes import Sampling

# dropping rows copies the KV cache: worth it once this share of the rows is done
FINISHED_SHARE_TO_DROP = 0.125


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
    vocab = len(model.get_output_embeddings().weight)
    results: dict[int, Generated] = {}
    for number, rows in enumerate(length_sorted_batches([len(prompt) for prompt in prompts], batch_size)):
        generator = generator_for(seed, scope, number, device=model.device)
        drawing = Drawing(len(rows), vocab, sampling, eos_token_ids, generator, valid_vocab)
        batch = _generate_batch(model, [prompts[row] for row in rows], drawing)
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


def _generate_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], drawing: Drawing) -> list[Generated]:
    input_ids, mask = left_padded(prompts, model.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = roomy_cache(model.config)
    output = model.get_decoder()(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    drawn = drawing.take(head_logits(model, output.last_hidden_state[:, -1]))
    del output  # [B, L, H], which nobody needs any more
    draw_rest = draw_replayed if replays(model, cache) else _draw_growing
    draw_rest(model, cache, mask, positions[:, -1:], drawn, drawing)
    return drawing.responses()


def _draw_growing(
    model: PreTrainedModel, cache: DynamicCache, mask: Tensor, positions: Tensor, drawn: Tensor, drawing: Drawing
) -> None:
    """The rest of a batch after its prefill, with a cache that grows and loses its finished rows."""
    decoder = model.get_decoder()
    for _ in range(1, drawing.limit):
        going = drawing.going()
        count = int(going.sum())
        if count == 0:
            return
        positions, mask = positions + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if count <= len(going) * (1 - FINISHED_SHARE_TO_DROP):
            places = going.nonzero()[:, 0]
            cache.batch_select_indices(places)
            drawing.keep(places)
            drawn, positions, mask = drawn[places], positions[places], mask[places]
        output = decoder(
            input_ids=drawn[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        drawn = drawing.take(head_logits(model, output.last_hidden_state[:, -1]))

"""KV caches that are written in place: one with room ahead, so that a new token copies itself and not all before it,
and one of fixed size, so that every decoding step has the same shapes; how a model is continued with a cache, and
whether it then computes what it computes at once.
"""

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from opd_mcp.engine.runtime import is_out_of_memory

ROOM_AHEAD = 64
# what decoders call it: most classes, the same before transformers 5.20, and those with a state only before that
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
# Largest difference of a step from the whole, as a share of the largest value. Measured with tiny random models of 70
# classes: in float32 at most 2e-5 where a class decodes rightly and 0.2 or more where it does not (docs/data.md).
DECODING_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
NARROW_TOLERANCE = 0.1


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [B, h, T, d], views of buffers with room for more tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens' states and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = appended(self.keys, key_states), appended(self.values, value_states)  # type: ignore[has-type]
        self.keys, self.values = keys, values
        return keys, values


def appended(states: Tensor, new: Tensor) -> Tensor:
    """`states` [B, h, T, d] with `new` [B, h, n, d] after them, in the room behind `states` where there is enough."""
    if states.numel() == 0:
        length, room = 0, None
    else:
        length = states.shape[2]
        room = states._base
    total = length + new.shape[2]
    if room is None or room.shape[:2] != new.shape[:2] or room.shape[2] < total:
        room = new.new_empty(*new.shape[:2], total + max(ROOM_AHEAD, total // 2), new.shape[3])
        if length:
            room[:, :, :length] = states
    room[:, :, length:total] = new
    return room[:, :, :total]


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache for generation with this model; layers that keep a window only stay as transformers makes them."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def continued(
    model: PreTrainedModel, cache: DynamicCache, ids: Tensor, mask: Tensor | dict[str, Tensor], positions: Tensor
) -> Tensor:
    """Last hidden states [B, n, H] of the next tokens `ids` [B, n], which the cache takes in.

    `mask` covers all tokens [B, L], those in the cache among them, or is what is added to the scores [B, 1, n, L], for
    all layers or for each kind of layer; `positions` are those of the new ones.
    """
    decoder = model.get_decoder()
    output = decoder(
        input_ids=ids,
        # a state has taken in what the mask is about: Mamba would apply the whole mask to the one new token
        attention_mask=mask if ids.shape[1] > 1 or keeps_keys(cache) else None,
        position_ids=positions,
        use_cache=True,
        **{_cache_argument(type(decoder).forward): cache},
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def prefilled(
    model: PreTrainedModel, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor, width: int
) -> Tensor:
    """Last hidden states [B, H] of prompts `ids` [B, L] at the right edge, which the empty cache takes in.

    At most `width` columns at a time, so that activations do not grow with the prompts; a cache with a layer that
    keeps no keys takes them at once.
    """
    if any(not isinstance(e, DynamicLayer) or isinstance(e, LinearAttentionLayer) for e in cache.layers):
        width = ids.shape[1]
    for start in range(0, ids.shape[1], width):
        stop = min(start + width, ids.shape[1])
        hidden = continued(model, cache, ids[:, start:stop], mask[:, :stop], positions[:, start:stop])
    return hidden[:, -1].clone()  # not a view, which would keep all of them


def keeps_keys(cache: DynamicCache) -> bool:
    """Whether a layer keeps keys and values of tokens, which a mask can hide."""
    return any(isinstance(e, DynamicLayer) or not isinstance(e, LinearAttentionLayer) for e in cache.layers)


def keep_rows(cache: DynamicCache, kept: Tensor) -> None:
    """Keep the rows `kept` [m] of the batch; unlike `batch_select_indices`, every kind of layer knows how."""
    cache.reorder_cache(kept)


@cache
def _cache_argument(forward: Callable[..., object]) -> str:
    known = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in known), "past_key_values")


@cache
def takes_masks_by_kind(forward: Callable[..., object]) -> bool:
    """Whether a decoder's `forward` takes a mask per kind of layer, as transformers' own generation passes them."""
    return "attention_mask, dict)" in inspect.getsource(forward)


@torch.no_grad()
def decoding_problem(model: PreTrainedModel) -> str | None:
    """Why the model cannot be decoded with a cache here; None where each step equals the whole sequence computed alone.

    Three documents of other lengths are left-padded and continued token by token, and one row ends before the others,
    as in generation.
    """
    vocab, device = model.config.get_text_config().vocab_size, model.device
    lengths, prompts, steps = (14, 10, 12), (9, 4, 6), 5
    ids = [(torch.arange(length, device=device) * 7 + 3 * length) % vocab for length in lengths]
    was_training = model.training
    model.eval()
    try:
        alone = [model.get_decoder()(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in ids]
        worst = _largest_difference(model, ids, alone, prompts, steps)
    except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        return f"decoding with a cache fails ({type(error).__name__}: {first[:120]})"
    finally:
        model.train(was_training)
    if worst <= DECODING_TOLERANCE.get(model.dtype, NARROW_TOLERANCE):
        return None
    return f"decoding with a cache differs from the whole sequence by {worst:.1g} of its largest value"


def _largest_difference(
    model: PreTrainedModel, ids: list[Tensor], alone: list[Tensor], prompts: tuple[int, ...], steps: int
) -> float:
    width, rows = max(prompts), torch.arange(len(ids), device=ids[0].device)
    padded = torch.stack(
        [torch.cat([part.new_zeros(width - n), part[:n]]) for part, n in zip(ids, prompts, strict=True)]
    )
    mask = torch.stack([(torch.arange(width, device=padded.device) >= width - n).long() for n in prompts])
    positions, kept = (mask.cumsum(-1) - 1).clamp_min(0), roomy_cache(model.config)
    worst = torch.zeros((), device=padded.device)
    for step in range(steps):
        hidden = continued(model, kept, padded, mask, positions)[:, -1].float()
        expected = torch.stack([alone[row][prompts[row] - 1 + step] for row in rows.tolist()]).float()
        worst = torch.maximum(worst, (hidden - expected).abs().max() / expected.abs().max())
        if step == 1:
            left = torch.tensor([0, 2], device=rows.device)
            keep_rows(kept, left)
            rows, mask, positions = rows[left], mask[left], positions[left]
        padded = torch.stack([ids[row][prompts[row] + step] for row in rows.tolist()])[:, None]
        positions, mask = positions[:, -1:] + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return float(worst) if bool(worst.isfinite()) else float("inf")


class FixedLayer(DynamicLayer):
    """One layer's keys and values [n, h, E, d]; a new token's are written at `cursor` [1]."""

    def __init__(self, keys: Tensor, values: Tensor, cursor: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.cursor = keys, values, cursor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new token's states and return the whole buffers; the mask says how far they are filled."""
        self.keys.index_copy_(2, self.cursor, key_states)
        self.values.index_copy_(2, self.cursor, value_states)
        return self.keys, self.values


class FixedCache(DynamicCache):
    """A cache of such layers. Compilers call `update` as it is: what it does depends on the layer's number."""

    @torch.compiler.disable
    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, the new token's among them."""
        return super().update(*args, **kwargs)

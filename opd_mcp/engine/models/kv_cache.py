"""KV caches that are written in place: one with room ahead, so that a new token copies itself and not all before it,
and one of fixed size, so that every decoding step has the same shapes.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM_AHEAD = 64


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

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, moved together."""
        if self.get_seq_length() > 0:
            self.keys, self.values = self.keys.index_select(0, indices), self.values.index_select(0, indices)


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

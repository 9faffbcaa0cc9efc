"""Keys and values in buffers of fixed size, so that every decoding step has the same shapes."""

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


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

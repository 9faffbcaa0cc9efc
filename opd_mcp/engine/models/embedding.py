"""Token embeddings whose gradient goes straight into the main gradient.

Autograd would make a [V, H] tensor of zeros for every micro-batch, add a few rows to it and then add all of it to the
gradient: for a large vocabulary on a small batch that costs as much as a layer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def embedded(model: PreTrainedModel, input_ids: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """Embeddings [T, H] of ids [T] whose gradient is added to `main_grad` [V, H] in the backward.

    None for a class that does more than look rows up (Gemma scales them), or a frozen table: the model then embeds.
    """
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding or main_grad is None or table.max_norm is not None:
        return None
    output: Tensor = _Lookup.apply(input_ids, table.weight, main_grad, table.padding_idx)
    return output


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, main_grad: Tensor, padding_idx: int | None) -> Tensor:
        ctx.ids, ctx.main_grad, ctx.padding_idx = ids, main_grad, padding_idx
        return weight.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, None, None]:
        gradient = upstream.to(ctx.main_grad.dtype)
        if ctx.padding_idx is not None:
            gradient = gradient.masked_fill((ctx.ids == ctx.padding_idx)[:, None], 0.0)
        ctx.main_grad.index_add_(0, ctx.ids, gradient)
        return None, None, None, None

"""The two ends of a model: its token embeddings, and its head as the logit tiles need it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_mcp.engine.losses.logit_tiles import Head


def model_head(model: PreTrainedModel, operands: torch.dtype | None = None) -> Head:
    """The model's head; `operands` is the matrix dtype on CUDA (the weight's own by default)."""
    linear = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    narrow = operands or (linear.weight.dtype if linear.weight.dtype is torch.bfloat16 else None)
    return Head(linear.weight, getattr(linear, "bias", None), cap, narrow)


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """fp32 (or fp64) logits [R, V] of hidden states [R, H], not differentiable."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return model_head(model).logits(hidden)


def embedded(model: PreTrainedModel, input_ids: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """Embeddings [T, H] of ids [T] whose gradient is added to `main_grad` [V, H] in the backward.

    Autograd would make a [V, H] tensor of zeros for every micro-batch, add a few rows to it and then add all of it to
    the gradient: for a large vocabulary on a small batch that costs as much as a layer.
    None for a class that does more than look up rows (Gemma scales them), or a frozen table: the model then embeds.
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

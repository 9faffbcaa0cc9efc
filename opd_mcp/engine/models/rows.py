"""The head of a model as the tiles need it."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_mcp.engine.losses.tiles import Head


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

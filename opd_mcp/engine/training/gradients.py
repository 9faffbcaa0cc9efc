"""Main gradients: float32 sums of a step's micro-batches, whatever the dtype of the weights."""

import torch
from torch import Tensor


def main_gradient(weight: Tensor) -> Tensor | None:
    """The weight's `.grad`, float32 or wider, zeros at first; None for a frozen weight.

    Narrower weights were given a float32 gradient by the optimizer (optim.py), so that autograd sums in it as well.
    """
    if not weight.requires_grad:
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return weight.grad

"""Main gradients: fp32 sums of a step's micro-batches, whatever the dtype of the weights."""

import torch
from torch import Tensor


def main_gradient(weight: Tensor) -> Tensor | None:
    """The tensor that sums the weight's gradient over a step, zeros at first; None for a frozen weight.

    fp32 (or wider) weights use `.grad` itself; narrower ones keep an fp32 sum in `.main_grad` (optim.py moves what
    autograd leaves in `.grad` there).
    """
    if not weight.requires_grad:
        return None
    if weight.dtype in (torch.float32, torch.float64):
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad
    if getattr(weight, "main_grad", None) is None:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    return weight.main_grad  # type: ignore[attr-defined]

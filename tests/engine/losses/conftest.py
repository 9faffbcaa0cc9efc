"""The objectives as plain autograd on a row of logits: what the one-pass head is compared with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_mcp.engine.losses.objectives import LEAST_TAIL_MASS, target_logprobs


@pytest.fixture
def plain_losses() -> Callable[..., Tensor]:
    """`plain_losses(name, logits, targets, columns, clip)`: loss [R], differentiable by torch alone."""
    return _plain_losses


def _plain_losses(name: str, logits: Tensor, targets: Tensor, columns: dict[str, Tensor], clip: float = 10.0) -> Tensor:
    if name == "cross_entropy":
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    if name == "sampled":
        logprobs = target_logprobs(logits, targets)
        return -(columns["teacher_logprobs"] - logprobs).clamp(-clip, clip).detach() * logprobs
    student = torch.log_softmax(logits, dim=-1)
    ids, teacher = columns["topk_ids"].long(), columns["topk_logprobs"]
    inside, rest = student.gather(1, ids), student.scatter(1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    teacher_rest = (1 - teacher.exp().sum(dim=-1, keepdim=True)).clamp_min(LEAST_TAIL_MASS).log()
    ours, theirs = torch.cat([inside, rest], dim=1), torch.cat([teacher, teacher_rest], dim=1)
    if name == "topk_reverse_kl":
        return (ours.exp() * (ours - theirs)).sum(dim=-1)
    return (theirs.exp() * (theirs - ours)).sum(dim=-1)

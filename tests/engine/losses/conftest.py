"""The objectives as plain autograd on a row of logits: what the one-pass head is compared with."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_mcp.engine.losses.objectives import LEAST_TAIL_MASS, target_logprobs

BETA, LAMBDA = 0.3, 1.5


@pytest.fixture
def plain_losses() -> Callable[..., Tensor]:
    """`plain_losses(name, logits, targets, columns, clip)`: loss [R], differentiable by torch alone."""
    return _plain_losses


def _plain_losses(name: str, logits: Tensor, targets: Tensor, columns: dict[str, Tensor], clip: float = 10.0) -> Tensor:
    if name == "cross_entropy":
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    if name in ("sampled", "extrapolated"):
        logprobs = target_logprobs(logits, targets)
        target = columns["teacher_logprobs"]
        if name == "extrapolated":
            target = columns["behaviour_logprobs"] + LAMBDA * (target - columns["behaviour_logprobs"])
        return -(target - logprobs).clamp(-clip, clip).detach() * logprobs
    if name == "opsa":
        return target_logprobs(logits, targets)
    student = torch.log_softmax(logits, dim=-1)
    ids, teacher = columns["topk_ids"].long(), columns["topk_logprobs"]
    inside, rest = student.gather(1, ids), student.scatter(1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    teacher_rest = (1 - teacher.exp().sum(dim=-1, keepdim=True)).clamp_min(LEAST_TAIL_MASS).log()
    ours, theirs = torch.cat([inside, rest], dim=1), torch.cat([teacher, teacher_rest], dim=1)
    reverse = (ours.exp() * (ours - theirs)).sum(dim=-1)
    forward = (theirs.exp() * (theirs - ours)).sum(dim=-1)
    if name == "topk_js":
        mixture = (BETA * theirs.exp() + (1 - BETA) * ours.exp()).log()
        to_teacher, to_student = theirs.exp() * (theirs - mixture), ours.exp() * (ours - mixture)
        return (BETA * to_teacher + (1 - BETA) * to_student).sum(dim=-1)
    if name == "topk_entropy_mixed":
        share = -(theirs.exp() * theirs).sum(dim=-1) / math.log(ids.shape[1] + 1)
        return (1 - share) * reverse + share * forward
    return reverse if name == "topk_reverse_kl" else forward

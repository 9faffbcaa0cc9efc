"""Row-scoped objectives: each token's loss depends on its own logits only.

A_t = clip(log π_T − log π_θ, −τ, τ) with stop-gradient (Lightning OPD, arXiv 2604.13010, §3); the top-k reverse KL
adds one tail bucket, without which the truncated sum is no divergence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# the least teacher mass outside its top k that float32 log-probs can still tell from rounding
LEAST_TAIL_MASS = 1e-6


@dataclass(frozen=True)
class RowLosses:
    """Per response token [R]: the loss to differentiate, and log π_θ of the token (detached, T = 1, untruncated)."""

    loss: Tensor
    logprobs: Tensor


def cross_entropy_rows(logits: Tensor, targets: Tensor) -> RowLosses:
    """−log π_θ(target) of logits [R, V] and targets [R]."""
    logprobs = target_logprobs(logits, targets)
    return RowLosses(-logprobs, logprobs.detach())


def sampled_rows(logits: Tensor, targets: Tensor, teacher_logprobs: Tensor, *, advantage_clip: float) -> RowLosses:
    """−A_t · log π_θ(a_t): the paper's one-sample policy gradient, w ≡ 1; teacher_logprobs [R]."""
    logprobs = target_logprobs(logits, targets)
    advantage = clipped_advantage(logprobs.detach(), teacher_logprobs, advantage_clip)
    return RowLosses(-advantage * logprobs, logprobs.detach())


def topk_reverse_kl_rows(logits: Tensor, targets: Tensor, topk_ids: Tensor, topk_logprobs: Tensor) -> RowLosses:
    """KL(π_θ‖π_T) over the teacher's k tokens and one bucket for the rest; topk_ids, topk_logprobs [R, k], k < V."""
    assert topk_ids.shape[1] < logits.shape[1], "the tail bucket needs at least one token outside the top k"
    logprobs_all = torch.log_softmax(logits, dim=-1)
    student = logprobs_all.gather(1, topk_ids)
    student_tail = logprobs_all.scatter(1, topk_ids, -torch.inf).logsumexp(dim=-1)
    teacher = topk_logprobs.to(student.dtype)
    kept = teacher.double().exp().sum(dim=-1)
    teacher_tail = torch.log((1 - kept).clamp_min(LEAST_TAIL_MASS)).to(student.dtype)
    inside = (student.exp() * (student - teacher)).sum(dim=-1)
    loss = inside + student_tail.exp() * (student_tail - teacher_tail)
    return RowLosses(loss, logprobs_all.detach().gather(1, targets[:, None])[:, 0])


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log π(target) [R] of logits [R, V]."""
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)


def clipped_advantage(logprobs: Tensor, teacher_logprobs: Tensor, advantage_clip: float) -> Tensor:
    """A_t = clip(log π_T − log π_θ, −τ, τ) [R]."""
    return (teacher_logprobs.to(logprobs.dtype) - logprobs).clamp(-advantage_clip, advantage_clip)

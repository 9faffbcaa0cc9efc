"""Row-scoped objectives: each token's loss depends on its own logits only, so its gradient is known with them.

Every one of them reads the log-probs of a few ids of its row (`ids`) and of the rest of the vocabulary taken together,
and its gradient with respect to the logits is `common · softmax` outside those ids and explicit values on them. That is
all that the one-pass head (linear_head.py) needs. A_t = clip(log π_T − log π_θ, −τ, τ) with stop-gradient (Lightning
OPD, arXiv 2604.13010, §3); the top-k divergences add one tail bucket, without which the truncated sum is no divergence.
`token_weights` says how token losses add up to the loss of one optimizer step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opd_mcp.schemas.recipes import DistillRecipe, Normalize

# the least teacher mass outside its top k that float32 log-probs can still tell from rounding
LEAST_TAIL_MASS = 1e-6

Columns = Mapping[str, Tensor]


@dataclass(frozen=True)
class RowTerms:
    """Per row [C]: the loss, and its gradient: `common` · softmax outside the row's ids, `at_ids` [C, k] on them."""

    loss: Tensor
    common: Tensor
    at_ids: Tensor


class RowObjective(Protocol):
    """A loss of one row of logits, with its gradient."""

    def ids(self, targets: Tensor, columns: Columns) -> Tensor:
        """The distinct ids [C, k] whose own log-probs the loss reads, k < V."""

    def terms(self, own: Tensor, rest: Tensor, columns: Columns) -> RowTerms:
        """Loss and gradient from log π_θ of the ids `own` [C, k] and of all other ids together `rest` [C]."""


@dataclass(frozen=True)
class CrossEntropy:
    """−log π_θ(target)."""

    def ids(self, targets: Tensor, columns: Columns) -> Tensor:
        """The targets."""
        return targets[:, None]

    def terms(self, own: Tensor, rest: Tensor, columns: Columns) -> RowTerms:
        """Softmax minus one-hot; 1 − π(target) is the rest's mass, which does not cancel."""
        return RowTerms(-own[:, 0], torch.ones_like(rest), -rest.exp()[:, None])


@dataclass(frozen=True)
class Sampled:
    """−A_t · log π_θ(a_t): the paper's one-sample policy gradient, w ≡ 1; reads `teacher_logprobs` [C].

    With `extrapolation` λ ≠ 1 the target is log π_ref + λ (log π_T − log π_ref), and `behaviour_logprobs` [C] are read
    too: beyond the teacher for λ > 1 (ExOPD, arXiv 2602.12125), a KL penalty towards π_ref for λ < 1.
    """

    advantage_clip: float
    extrapolation: float = 1.0

    def ids(self, targets: Tensor, columns: Columns) -> Tensor:
        """The sampled tokens."""
        return targets[:, None]

    def terms(self, own: Tensor, rest: Tensor, columns: Columns) -> RowTerms:
        """A_t times the terms of the cross entropy: nothing flows through the advantage."""
        advantage = clipped_advantage(own[:, 0], target_scores(columns, self.extrapolation), self.advantage_clip)
        return RowTerms(-advantage * own[:, 0], advantage, -(advantage * rest.exp())[:, None])


@dataclass(frozen=True)
class ConstantPenalty:
    """log π_θ(a_t): the advantage is −1 whatever the teacher says (OPSA, arXiv 2608.31046), a control."""

    def ids(self, targets: Tensor, columns: Columns) -> Tensor:
        """The sampled tokens."""
        return targets[:, None]

    def terms(self, own: Tensor, rest: Tensor, columns: Columns) -> RowTerms:
        """The cross entropy's terms with the opposite sign."""
        return RowTerms(own[:, 0], -torch.ones_like(rest), rest.exp()[:, None])


@dataclass(frozen=True)
class TopkReverseKl:
    """KL(π_θ‖π_T) over the teacher's k tokens and one bucket for the rest; reads `topk_ids`, `topk_logprobs`.

    Each bucket's log-ratio is clipped to [−τ, τ] under a stop-gradient: the gradient is the expectation of `Sampled`'s
    over the buckets, and without the clip that of the divergence itself.
    """

    k: int
    advantage_clip: float = math.inf

    def ids(self, targets: Tensor, columns: Columns) -> Tensor:
        """The teacher's k likeliest tokens."""
        return columns["topk_ids"][:, : self.k].long()

    def terms(self, own: Tensor, rest: Tensor, columns: Columns) -> RowTerms:
        """p_j (log-ratio of j's bucket − their mean under π_θ) for every j."""
        teacher, teacher_rest = teacher_buckets(columns["topk_logprobs"][:, : self.k], own.dtype)
        ratio = -clipped_advantage(own, teacher, self.advantage_clip)
        ratio_rest = -clipped_advantage(rest, teacher_rest, self.advantage_clip)
        loss = (own.exp() * ratio).sum(dim=-1) + rest.exp() * ratio_rest
        return RowTerms(loss, ratio_rest - loss, own.exp() * (ratio - loss[:, None]))


@dataclass(frozen=True)
class TopkForwardKl:
    """KL(π_T‖π_θ) over the teacher's k tokens and one bucket for the rest; reads `topk_ids`, `topk_logprobs`."""

    k: int

    def ids(self, targets: Tensor, columns: Columns) -> Tensor:
        """The teacher's k likeliest tokens."""
        return columns["topk_ids"][:, : self.k].long()

    def terms(self, own: Tensor, rest: Tensor, columns: Columns) -> RowTerms:
        """The teacher's whole mass times p_j, minus its mass on j; the bucket's is shared as the student shares it."""
        teacher, teacher_rest = teacher_buckets(columns["topk_logprobs"][:, : self.k], own.dtype)
        loss = (teacher.exp() * (teacher - own)).sum(dim=-1) + teacher_rest.exp() * (teacher_rest - rest)
        mass = teacher.exp().sum(dim=-1) + teacher_rest.exp()
        return RowTerms(loss, mass - (teacher_rest - rest).exp(), mass[:, None] * own.exp() - teacher.exp())


@dataclass(frozen=True)
class TopkJensenShannon:
    """β KL(π_T‖m) + (1 − β) KL(π_θ‖m), m = β π_T + (1 − β) π_θ, over the teacher's k tokens and one bucket.

    GKD's divergence (arXiv 2306.13649, §3). For β → 0 it is the forward KL times β, for β → 1 the reverse KL times
    1 − β.
    """

    k: int
    beta: float

    def ids(self, targets: Tensor, columns: Columns) -> Tensor:
        """The teacher's k likeliest tokens."""
        return columns["topk_ids"][:, : self.k].long()

    def terms(self, own: Tensor, rest: Tensor, columns: Columns) -> RowTerms:
        """dL/dπ_θ of a bucket is (1 − β) log(π_θ / m), whatever the teacher's mass there."""
        teacher, teacher_rest = teacher_buckets(columns["topk_logprobs"][:, : self.k], own.dtype)
        student = torch.cat([own, rest[:, None]], dim=-1)
        teacher = torch.cat([teacher, teacher_rest[:, None]], dim=-1)
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        forward = self.beta * (teacher.exp() * (teacher - mixture)).sum(dim=-1)
        slope = (1 - self.beta) * (student - mixture)
        mean = (student.exp() * slope).sum(dim=-1)
        return RowTerms(forward + mean, slope[:, -1] - mean, own.exp() * (slope[:, :-1] - mean[:, None]))


@dataclass(frozen=True)
class TopkEntropyMixed:
    """(1 − u) · reverse KL + u · forward KL over the same buckets, u the teacher's entropy there over log(k + 1).

    Where the teacher is sure the student seeks its mode, where it is not the student covers it (arXiv 2603.07079
    selects by entropy; here the mixture is linear in it).
    """

    k: int
    advantage_clip: float = math.inf

    def ids(self, targets: Tensor, columns: Columns) -> Tensor:
        """The teacher's k likeliest tokens."""
        return columns["topk_ids"][:, : self.k].long()

    def terms(self, own: Tensor, rest: Tensor, columns: Columns) -> RowTerms:
        """The two divergences' terms, mixed."""
        reverse = TopkReverseKl(self.k, self.advantage_clip).terms(own, rest, columns)
        forward = TopkForwardKl(self.k).terms(own, rest, columns)
        share = bucket_entropy(columns["topk_logprobs"][:, : self.k]).to(own.dtype) / math.log(self.k + 1)
        return RowTerms(
            torch.lerp(reverse.loss, forward.loss, share),
            torch.lerp(reverse.common, forward.common, share),
            torch.lerp(reverse.at_ids, forward.at_ids, share[:, None]),
        )


SFT_OBJECTIVE = CrossEntropy()


def distill_objective(settings: DistillRecipe) -> RowObjective:
    """The estimator of the settings as a loss of one row of logits with its gradient."""
    match settings.estimator:
        case "sampled":
            return Sampled(settings.advantage_clip, settings.extrapolation)
        case "topk_reverse_kl":
            return TopkReverseKl(settings.topk, settings.advantage_clip)
        case "topk_forward_kl":
            return TopkForwardKl(settings.topk)
        case "topk_js":
            return TopkJensenShannon(settings.topk, settings.js_beta)
        case "topk_entropy_mixed":
            return TopkEntropyMixed(settings.topk, settings.advantage_clip)
        case "opsa":
            return ConstantPenalty()


def teacher_buckets(topk_logprobs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probs of the teacher's tokens [C, k] and of everything outside them [C]."""
    outside = 1 - topk_logprobs.double().exp().sum(dim=-1)
    return topk_logprobs.to(dtype), outside.clamp_min(LEAST_TAIL_MASS).log().to(dtype)


def bucket_entropy(topk_logprobs: Tensor) -> Tensor:
    """The teacher's entropy [C] in nats over its k tokens and one bucket for the rest, in float64."""
    inside, outside = teacher_buckets(topk_logprobs, torch.float64)
    buckets = torch.cat([inside, outside[:, None]], dim=-1)
    return -(buckets.exp() * buckets).sum(dim=-1)


def target_scores(columns: Columns, extrapolation: float) -> Tensor:
    """log π_T of the sampled tokens [C], or log π_ref + λ (log π_T − log π_ref) for λ ≠ 1."""
    if extrapolation == 1.0:
        return columns["teacher_logprobs"]
    return torch.lerp(columns["behaviour_logprobs"], columns["teacher_logprobs"], extrapolation)


def clipped_advantage(logprobs: Tensor, teacher_logprobs: Tensor, advantage_clip: float) -> Tensor:
    """A_t = clip(log π_T − log π_θ, −τ, τ), elementwise."""
    return (teacher_logprobs.to(logprobs.dtype) - logprobs).clamp(-advantage_clip, advantage_clip)


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log π(target) [R] of logits [R, V]."""
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)


def token_weights(response_lengths: Tensor, normalize: Normalize) -> Tensor:
    """Weight of each sequence's tokens [N] for a step over `response_lengths` [N]; all tokens' weights sum to one.

    `sample`: each sequence counts alike, its tokens share its weight (what the published numbers were trained with);
    `token`: each token counts alike. Sequences without tokens weigh nothing. float64.
    """
    lengths = response_lengths.to(torch.float64)
    counted = (lengths > 0).to(torch.float64)
    if normalize == "sample":
        return counted / (counted.sum() * lengths.clamp_min(1)).clamp_min(1)
    return counted / lengths.sum().clamp_min(1)

"""Factors by which the tokens of a step are weighed, beyond what their own row says: sequence- and batch-scoped.

They are computed from a first pass over the step's log-probs and held constant (`step.Reweigh`). None is on by default.
"""

import math

import torch
from torch import Tensor

from opd_mcp.engine.losses.objectives import bucket_entropy, clipped_advantage, target_scores
from opd_mcp.engine.training.step import Reweigh, StepTokens
from opd_mcp.schemas.recipes import DistillRecipe

# γ of IW-OPD, and the share of tokens that OPSA penalises: the papers' values
EARLY_GAIN = 0.5
PENALISED_SHARE = 0.2


def reweigh_of(settings: DistillRecipe) -> Reweigh | None:
    """The product of the factors that the settings ask for; None where every token counts as its row says."""
    factors: list[Reweigh] = []
    if settings.token_weighting == "early":
        factors.append(lambda tokens: early_factors(tokens, settings))
    if settings.entropy_share < 1:
        factors.append(lambda tokens: entropy_factors(tokens, settings))
    if settings.estimator == "opsa":
        factors.append(lambda tokens: share_factors(-tokens.logprobs, PENALISED_SHARE))
    if not factors:
        return None
    return lambda tokens: math.prod((factor(tokens) for factor in factors), start=torch.ones_like(tokens.logprobs))


def early_factors(tokens: StepTokens, settings: DistillRecipe) -> Tensor:
    """1 + γ (1 − Σ_{s<t} |A_s| / Σ_s |A_s|) [R], sums over the token's sequence (IW-OPD, arXiv 2606.22600).

    The more of a response's disagreement lies before a token, the less it says about the student's own prefixes. The
    sum is over the tokens before this one, so that the first has the factor 1 + γ.
    """
    target = target_scores(tokens.columns, settings.extrapolation).to(tokens.logprobs)
    size = clipped_advantage(tokens.logprobs, target, settings.advantage_clip).abs().double()
    before = size.cumsum(0) - size
    starts = torch.ones_like(tokens.sequence, dtype=torch.bool)
    starts[1:] = tokens.sequence[1:] != tokens.sequence[:-1]  # a sequence's tokens lie together
    run = starts.cumsum(0) - 1
    totals = torch.zeros(int(run[-1]) + 1, dtype=size.dtype, device=size.device).index_add_(0, run, size)
    done = (before - before[starts][run]) / totals[run].clamp_min(1e-300)
    return (1 + EARLY_GAIN * (1 - done)).to(tokens.logprobs)


def entropy_factors(tokens: StepTokens, settings: DistillRecipe) -> Tensor:
    """`share_factors` [R] by the teacher's entropy over its top k and the rest (arXiv 2604.14084)."""
    entropy = bucket_entropy(tokens.columns["topk_logprobs"][:, : settings.topk])
    return share_factors(entropy.to(tokens.logprobs), settings.entropy_share)


def share_factors(values: Tensor, share: float) -> Tensor:
    """Factors [R]: 0, but for the largest `share` of the values the inverse of the share that was kept.

    The mean factor is 1. Equal values are kept together, so that the order of the tokens decides nothing.
    """
    count = max(1, math.ceil(share * len(values)))
    kept = (values >= values.topk(count).values[-1]).to(values.dtype)
    return kept / kept.mean()

"""95 % intervals and unbiased pass@k."""

import math

import numpy as np
from numpy.typing import NDArray

from opd_mcp.schemas.reports import Estimate95

Z95 = 1.959963984540054
BOOTSTRAP_DRAWS = 2000


def wilson(successes: int, trials: int) -> Estimate95:
    """A proportion of independent trials with its Wilson score interval."""
    share = successes / trials
    spread = Z95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return Estimate95(
        value=share,
        low=min(share, max(0.0, centre - half)),
        high=max(share, min(1.0, centre + half)),
        samples=trials,
        basis="greedy, one response a prompt; Wilson interval",
    )


def mean_over_prompts(shares: NDArray[np.float64], samples_per_prompt: int) -> Estimate95:
    """avg@n: the mean of per-prompt shares [P], normal interval clustered by prompt."""
    mean = float(shares.mean())
    half = Z95 * float(shares.std(ddof=1)) / math.sqrt(len(shares)) if len(shares) > 1 else math.inf
    return Estimate95(
        value=mean,
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
        samples=len(shares) * samples_per_prompt,
        basis=f"{samples_per_prompt} samples a prompt; normal interval clustered by prompt",
    )


def paired_difference(candidate: NDArray[np.float64], baseline: NDArray[np.float64]) -> Estimate95:
    """Mean difference on the same prompts [P], normal interval."""
    difference = candidate - baseline
    mean = float(difference.mean())
    half = Z95 * float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 1.0
    return Estimate95(
        value=mean,
        low=max(-1.0, mean - half),
        high=min(1.0, mean + half),
        samples=len(difference),
        basis="greedy, paired by prompt; normal interval",
    )


def per_token_mean(sums: NDArray[np.float64], tokens: NDArray[np.float64], *, seed: int, basis: str) -> Estimate95:
    """Σ sums / Σ tokens over sequences [N], percentile bootstrap over sequences."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(sums), size=(BOOTSTRAP_DRAWS, len(sums)))
    ratios = sums[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate95(
        value=float(sums.sum() / tokens.sum()),
        low=float(low),
        high=float(high),
        samples=len(sums),
        basis=f"{basis}; bootstrap over sequences",
    )


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased pass@k = 1 − C(n − c, k) / C(n, k) of one prompt with c of n samples correct."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)

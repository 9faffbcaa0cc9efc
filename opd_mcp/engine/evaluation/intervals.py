"""95 % intervals and unbiased pass@k."""

import math

import numpy as np
from numpy.typing import NDArray

from opd_mcp.grading.paired import Z95, paired_estimate
from opd_mcp.schemas.reports import Estimate95

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
    """avg@n: the mean of per-prompt shares [P]; the interval has width even where all prompts agree.

    Two prompts always right and two always wrong are added before a normal interval clustered by prompt (Agresti and
    Coull 1998): without them the samples' variance, and with it the width, is 0 when every sample is right.
    """
    mean = float(shares.mean())
    widened = np.concatenate([shares, [0.0, 0.0, 1.0, 1.0]])
    centre, half = float(widened.mean()), Z95 * float(widened.std(ddof=1)) / math.sqrt(len(widened))
    return Estimate95(
        value=mean,
        low=min(mean, max(0.0, centre - half)),
        high=max(mean, min(1.0, centre + half)),
        samples=len(shares) * samples_per_prompt,
        basis=f"{samples_per_prompt} samples a prompt; Agresti-Coull interval clustered by prompt",
    )


def paired_difference(candidate: NDArray[np.float64], baseline: NDArray[np.float64]) -> Estimate95:
    """Mean difference of two 0/1 outcomes on the same prompts [P] with Tango's score interval (1998)."""
    return paired_estimate(int((candidate > baseline).sum()), int((candidate < baseline).sum()), len(candidate))


def gap_closed(
    candidate: NDArray[np.float64], baseline: NDArray[np.float64], teacher: NDArray[np.float64], *, basis: str
) -> Estimate95 | None:
    """Σ (candidate − baseline) / Σ (teacher − baseline) over the same prompts [P], with Fieller's interval (1954).

    None where the teacher is not better than the baseline beyond chance: the interval then has no end. Two prompts on
    which only the candidate or only the teacher gains are added for the interval alone, so that it has width where all
    prompts agree.
    """
    gained, gap = candidate - baseline, teacher - baseline
    x, y = np.append(gained, [1.0, 0.0]), np.append(gap, [0.0, 1.0])
    (xx, xy), (_, yy) = np.cov(x, y) / len(x) * Z95**2
    mean_x, mean_y = float(x.mean()), float(y.mean())
    squared = mean_y**2 - yy
    if gap.mean() <= 0 or mean_y <= 0 or squared <= 0:
        return None
    half = math.sqrt(max(0.0, (mean_x * mean_y - xy) ** 2 - squared * (mean_x**2 - xx)))
    share = float(gained.mean() / gap.mean())
    return Estimate95(
        value=share,
        low=min(share, float((mean_x * mean_y - xy - half) / squared)),
        high=max(share, float((mean_x * mean_y - xy + half) / squared)),
        samples=len(candidate),
        basis=f"{basis}, paired by prompt; Fieller interval",
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

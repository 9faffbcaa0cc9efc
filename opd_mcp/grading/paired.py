"""The difference of two models' accuracy on the same prompts, with Tango's score interval (1998), and over seeds.

By counts alone, so that the engine measures with it, and a comparison of reports too.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev

from opd_mcp.schemas.reports import Estimate95

Z95 = 1.959963984540054


def paired_estimate(gained: int, lost: int, pairs: int) -> Estimate95:
    """The mean difference of two 0/1 outcomes over so many prompts: right only here (gained), only there (lost).

    The score interval has width even where the two agree on every prompt.
    """
    return Estimate95(
        value=(gained - lost) / pairs,
        low=_difference_bound(gained, lost, pairs, -1.0),
        high=_difference_bound(gained, lost, pairs, 1.0),
        samples=pairs,
        basis="greedy, paired by prompt; Tango score interval",
    )


def paired_outcomes(candidate: str, baseline: str) -> Estimate95:
    """The difference of outcomes as reports keep them: a `1` or `0` per prompt, of the same prompts in their order."""
    pairs = list(zip(candidate, baseline, strict=True))
    return paired_estimate(pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs))


def mean_over_seeds(values: Sequence[float]) -> Estimate95 | None:
    """The mean of one value per seed with its t-interval; None for fewer than two, which have no spread."""
    if len(values) < 2:
        return None
    middle, half = mean(values), t95(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    basis = f"mean over {len(values)} seeds; t-interval"
    return Estimate95(value=middle, low=middle - half, high=middle + half, samples=len(values), basis=basis)


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t; above 9 degrees of freedom by its expansion in their inverse."""
    if freedom <= len(T95):
        return T95[freedom - 1]
    first = (Z95**3 + Z95) / 4
    second = (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / 96
    third = (3 * Z95**7 + 19 * Z95**5 + 17 * Z95**3 - 15 * Z95) / 384
    return Z95 + first / freedom + second / freedom**2 + third / freedom**3


def _difference_bound(gained: int, lost: int, pairs: int, end: float) -> float:
    """The difference between the measured one and `end` (−1 or 1) whose score statistic is 1.96, by bisection."""
    inside, outside = (gained - lost) / pairs, end
    while abs(outside - inside) > 1e-9:
        middle = (inside + outside) / 2
        if abs(_score_statistic(gained, lost, pairs, middle)) <= Z95:
            inside = middle
        else:
            outside = middle
    return inside


def _score_statistic(gained: int, lost: int, pairs: int, difference: float) -> float:
    """Tango's statistic for a true difference strictly between −1 and 1."""
    b = -gained - lost + (2 * pairs - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    lost_share = (math.sqrt(b * b - 8 * pairs * c) - b) / (4 * pairs)
    variance = pairs * (2 * lost_share + difference * (1 - difference))
    return (gained - lost - pairs * difference) / math.sqrt(variance)

"""The difference of two models' accuracy on the same prompts, with Tango's score interval (1998).

By counts alone, so that the engine measures with it, and a comparison of reports too.
"""

import math

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

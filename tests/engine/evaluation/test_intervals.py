"""Intervals and pass@k against known values."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.engine.evaluation.intervals import (
    mean_over_prompts,
    paired_difference,
    pass_at_k,
    per_token_mean,
    wilson,
)


def test_wilson_known_values() -> None:
    """15 of 50: the score interval is [0.1910, 0.4375]; it never leaves [0, 1]."""
    estimate = wilson(15, 50)
    assert (estimate.low, estimate.high) == (pytest.approx(0.1910, abs=1e-4), pytest.approx(0.4375, abs=1e-4))
    assert wilson(0, 500).low == 0
    assert wilson(10, 10).high == 1


@given(n=st.integers(1, 8), data=st.data())
def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_sample(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    samples = [True] * correct + [False] * (n - correct)
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_avg_at_n_is_clustered_by_prompt() -> None:
    estimate = mean_over_prompts(np.array([0.0, 1.0] * 50), 4)
    assert estimate.value == 0.5
    assert estimate.high - estimate.value == pytest.approx(1.96 * 0.5025 / 10, abs=1e-3)
    assert estimate.samples == 400


def test_paired_difference_uses_the_pairs() -> None:
    candidate, baseline = np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 1, 0])
    assert paired_difference(candidate, baseline).value == 0.25
    assert paired_difference(candidate, candidate).low == paired_difference(candidate, candidate).high == 0


def test_per_token_mean_weighs_sequences_by_their_tokens() -> None:
    estimate = per_token_mean(np.array([1.0, 9.0]), np.array([1.0, 3.0]), seed=0, basis="exact")
    assert estimate.value == 2.5
    assert estimate.low == 1.0
    assert estimate.high == 3.0

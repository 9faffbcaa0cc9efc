"""Intervals and pass@k against known values."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from opd_mcp.engine.evaluation.intervals import (
    gap_closed,
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
    assert estimate.high - estimate.value == pytest.approx(1.96 * 0.5025 / 10, abs=3e-3)
    assert estimate.samples == 400


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_avg_at_n_has_width_where_every_sample_agrees(share: float) -> None:
    few, many = (mean_over_prompts(np.full(prompts, share), 4) for prompts in (50, 500))
    assert few.value == share
    assert few.high - few.low > many.high - many.low > 3 / 500
    assert {few.low, few.high} & {share}


def pairs(both: int, gained: int, lost: int, neither: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    counts = (both, gained, lost, neither)
    return np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)


def test_paired_difference_known_values() -> None:
    """Tango's interval of 1, 1, 7 and 12 pairs as Fagerland, Lydersen and Laake (2014) print it."""
    estimate = paired_difference(*pairs(1, 1, 7, 12))
    assert estimate.value == pytest.approx(-6 / 21)
    assert (round(estimate.low, 3), round(estimate.high, 3)) == (-0.517, -0.026)


def test_paired_difference_has_width_where_both_agree_on_every_prompt() -> None:
    """Without a differing pair the score bound is z² / (n + z²)."""
    estimate = paired_difference(*pairs(300, 0, 0, 200))
    assert (estimate.value, estimate.high) == (0.0, pytest.approx(3.8415 / 503.8415, abs=1e-5))
    assert estimate.low == -estimate.high


@given(counts=st.tuples(*[st.integers(0, 40)] * 4).filter(any))
def test_paired_difference_lies_in_its_interval_and_turns_with_the_pair(counts: tuple[int, int, int, int]) -> None:
    candidate, baseline = pairs(*counts)
    estimate, turned = paired_difference(candidate, baseline), paired_difference(baseline, candidate)
    assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low < estimate.high
    assert (estimate.low, estimate.high) == (
        pytest.approx(-turned.high, abs=1e-6),
        pytest.approx(-turned.low, abs=1e-6),
    )


def test_per_token_mean_weighs_sequences_by_their_tokens() -> None:
    estimate = per_token_mean(np.array([1.0, 9.0]), np.array([1.0, 3.0]), seed=0, basis="exact")
    assert estimate.value == 2.5
    assert estimate.low == 1.0
    assert estimate.high == 3.0


def test_the_share_of_the_gap_covers_the_truth_and_is_absent_without_a_gap() -> None:
    """Right answers at 0.3, 0.6 and 0.8 on 200 prompts: the true share is 0.6, covered in about 95 % of draws."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        ease = rng.random(200)  # prompts that are easy for one model are easy for the others
        baseline, candidate, teacher = ((ease < share).astype(float) for share in (0.3, 0.6, 0.8))
        noise = rng.random(200) < 0.2
        candidate = np.where(noise, 1 - candidate, candidate)
        truth = (0.6 * 0.8 + 0.4 * 0.2 - 0.3) / 0.5
        share = gap_closed(candidate, baseline, teacher, basis="greedy accuracy")
        assert share is not None
        covered += share.low <= truth <= share.high
    assert 0.92 <= covered / 300 <= 1.0
    ones, zeros = np.ones(30), np.zeros(30)
    same = gap_closed(ones, zeros, ones, basis="greedy accuracy")
    assert same is not None
    assert same.low < same.value == 1.0 < same.high, "thirty prompts that agree prove no exact share"
    assert gap_closed(ones, zeros, zeros, basis="greedy accuracy") is None
    assert gap_closed(zeros, ones, zeros, basis="greedy accuracy") is None, "the teacher is worse"

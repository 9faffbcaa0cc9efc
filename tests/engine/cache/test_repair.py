"""The residual of a mismatched teacher: equal to its definition, blind to the token itself, gone where style is all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.engine.cache.repair import FOLDS, held_out_means, prompt_folds, repaired, situations
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.schemas.errors import ConsistencyError

rows = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=25)


def scored(responses: list[list[int]], seed: int = 0) -> Sequences:
    """Rows with a prompt of their own each and random log-probs."""
    sequences = build_sequences([[10 + row // 2, 3] for row in range(len(responses))], responses)
    draw = np.random.default_rng(seed)
    tokens = len(sequences.response_ids)
    return sequences.with_columns(
        teacher_logprobs=-draw.exponential(size=tokens).astype(np.float32),
        behaviour_logprobs=-draw.exponential(size=tokens).astype(np.float32),
    )


@given(rows, st.integers(0, 9))
def test_a_held_out_mean_is_that_of_the_same_group_in_other_folds(responses: list[list[int]], seed: int) -> None:
    sequences = scored(responses, seed)
    values = np.random.default_rng(seed).normal(size=len(sequences.response_ids))
    groups = sequences.response_ids.astype(np.int64)
    folds = np.repeat(prompt_folds(sequences), sequences.response_lengths())
    found = held_out_means(values, groups, folds)
    for token in range(len(values)):
        elsewhere = folds != folds[token]
        same = elsewhere & (groups == groups[token])
        chosen = same if same.any() else elsewhere
        expected = values[chosen].mean() if chosen.any() else 0.0
        assert found[token] == pytest.approx(expected, abs=1e-9)


@given(rows, st.integers(0, 9))
def test_no_score_enters_its_own_residual(responses: list[list[int]], seed: int) -> None:
    sequences = scored(responses, seed)
    changed = sequences.columns["teacher_logprobs"].copy()
    first_fold = prompt_folds(sequences)[0]
    of_fold = np.repeat(prompt_folds(sequences) == first_fold, sequences.response_lengths())
    changed[of_fold] -= 5
    before, _ = repaired(sequences)
    after, _ = repaired(sequences.with_columns(teacher_logprobs=changed))
    taken = sequences.columns["teacher_logprobs"] - before.columns["teacher_logprobs"]
    taken_after = changed - after.columns["teacher_logprobs"]
    np.testing.assert_allclose(taken[of_fold], taken_after[of_fold], atol=1e-5)


def test_a_difference_that_follows_from_the_token_alone_is_half_taken_by_the_token_and_explained() -> None:
    draw = np.random.default_rng(5)
    responses = [draw.integers(0, 5, size=12).tolist() for _ in range(400)]
    sequences = scored(responses)
    style = np.asarray([0.0, -1.0, -2.0, 0.5, 1.0])[sequences.response_ids]
    behaviour = sequences.columns["behaviour_logprobs"]
    sequences = sequences.with_columns(teacher_logprobs=(behaviour + style).astype(np.float32))
    after, summary = repaired(sequences)
    remains = after.columns["teacher_logprobs"] - behaviour
    # the situation's mean knows nothing of the token here, so half of the token's own residual remains
    for token in range(5):
        here = sequences.response_ids == token
        assert remains[here].mean() - remains.mean() == pytest.approx((style[here][0] - style.mean()) / 2, abs=0.03)
    assert summary.explained_variance == pytest.approx(0.75, abs=0.05)
    assert summary.mean_residual == pytest.approx(summary.mean_difference, abs=0.02)


def test_situations_are_positions_by_powers_of_two_and_deciles_of_surprisal() -> None:
    offsets = np.asarray([0, 4, 10])
    surprisal = np.asarray([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    found = situations(offsets, surprisal)
    assert (found // 10).tolist() == [0, 1, 1, 2, 0, 1, 1, 2, 2, 2]
    assert (found % 10).tolist() == list(range(10))


def test_rows_of_one_prompt_share_a_fold() -> None:
    sequences = scored([[1]] * 200)
    folds = prompt_folds(sequences)
    assert (folds[::2] == folds[1::2]).all()
    assert set(folds.tolist()) == set(range(FOLDS))


def test_without_the_behaviour_policy_s_scores_the_way_out_is_said() -> None:
    sequences = build_sequences([[1]], [[2, 3]]).with_columns(teacher_logprobs=np.zeros(2, np.float32))
    with pytest.raises(ConsistencyError, match=r"behaviour_missing.*distill\.repair"):
        repaired(sequences)

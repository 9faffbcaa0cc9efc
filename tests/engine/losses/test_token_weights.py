"""Normalisers of a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.engine.losses.objectives import token_weights


def test_sample_gives_each_sequence_the_same_say() -> None:
    weights = token_weights(torch.tensor([2, 8]), "sample")
    assert (weights * torch.tensor([2, 8])).tolist() == [0.5, 0.5]


def test_token_gives_each_token_the_same_say() -> None:
    assert token_weights(torch.tensor([2, 8]), "token").tolist() == [0.1, 0.1]


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any),
    normalize=st.sampled_from(["sample", "token"]),
)
def test_all_tokens_weigh_one_and_empty_responses_nothing(lengths: list[int], normalize: str) -> None:
    counts = torch.tensor(lengths)
    weights = token_weights(counts, normalize)
    assert (weights * counts).sum().item() == pytest.approx(1.0)
    assert (weights[counts == 0] == 0).all()


def test_a_step_without_any_token_has_no_weight() -> None:
    assert token_weights(torch.tensor([0, 0]), "sample").tolist() == [0, 0]

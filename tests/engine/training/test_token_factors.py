"""Factors of a step's tokens: what each counts, and that neither the cut into micro-batches nor their order decides."""

import math

import pytest
import torch

from opd_mcp.engine.training.step import StepTokens
from opd_mcp.engine.training.token_factors import early_factors, reweigh_of, share_factors
from opd_mcp.schemas.recipes import DistillRecipe


def tokens(logprobs: list[float], sequence: list[int], **columns: torch.Tensor) -> StepTokens:
    return StepTokens(torch.tensor(logprobs, dtype=torch.float64), torch.tensor(sequence), columns)


def test_no_setting_means_no_first_pass():
    assert reweigh_of(DistillRecipe()) is None


def test_an_early_token_counts_more_by_what_is_still_to_come():
    """|A| of the first sequence: 1, 2, 1; of the second: 3; of the third: 0, 0."""
    step = tokens(
        [-1.0, -2.0, -3.0, -1.0, -1.0, -2.0],
        [4, 4, 4, 0, 2, 2],
        teacher_logprobs=torch.tensor([-2.0, 0.0, -2.0, -4.0, -1.0, -2.0], dtype=torch.float64),
    )
    factors = early_factors(step, DistillRecipe())
    assert factors.tolist() == pytest.approx([1.5, 1.5 - 0.125, 1.5 - 0.375, 1.5, 1.5, 1.5])
    clipped = early_factors(step, DistillRecipe(advantage_clip=1.0))
    assert clipped.tolist()[:3] == pytest.approx([1.5, 1.5 - 0.5 / 3, 1.5 - 1.0 / 3])


def test_sequences_are_told_apart_in_any_order():
    whole = tokens([-1.0, -3.0, -2.0, -5.0], [1, 1, 0, 0], teacher_logprobs=torch.zeros(4, dtype=torch.float64))
    other = tokens([-2.0, -5.0, -1.0, -3.0], [0, 0, 1, 1], teacher_logprobs=torch.zeros(4, dtype=torch.float64))
    first, second = (early_factors(step, DistillRecipe()).tolist() for step in (whole, other))
    assert first == pytest.approx(second[2:] + second[:2])


def test_the_tokens_where_the_teacher_is_least_sure_are_kept_with_mean_one():
    sure, unsure = [0.98, 0.01], [0.4, 0.3]
    columns = {"topk_logprobs": torch.tensor([sure, unsure, sure, unsure, sure], dtype=torch.float32).log()}
    reweigh = reweigh_of(DistillRecipe(entropy_share=0.4, topk=2))
    factors = reweigh(tokens([-1.0] * 5, [0] * 5, **columns))
    assert factors.tolist() == pytest.approx([0, 2.5, 0, 2.5, 0])


def test_equal_values_are_kept_together():
    assert share_factors(torch.tensor([1.0, 2.0, 2.0, 2.0]), 0.25).tolist() == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3])
    assert share_factors(torch.tensor([3.0]), 0.1).tolist() == [1.0]


def test_the_control_penalises_the_least_likely_fifth():
    logprobs = [-0.1, -9.0, -0.2, -0.3, -0.4, -5.0, -0.5, -0.6, -0.7, -0.8]
    factors = reweigh_of(DistillRecipe(estimator="opsa"))(tokens(logprobs, [0] * 10))
    assert [place for place, factor in enumerate(factors.tolist()) if factor] == [1, 5]
    assert float(factors.mean()) == pytest.approx(1.0)


def test_factors_multiply():
    both = DistillRecipe(entropy_share=0.5, token_weighting="early", topk=2)
    columns = {
        "topk_logprobs": torch.tensor([[0.4, 0.3], [0.98, 0.01]], dtype=torch.float32).log(),
        "teacher_logprobs": torch.zeros(2, dtype=torch.float64),
    }
    step = tokens([-1.0, -1.0], [0, 0], **columns)
    assert reweigh_of(both)(step).tolist() == pytest.approx([1.5 * 2, 0.0])
    assert math.isfinite(float(reweigh_of(both)(step).sum()))

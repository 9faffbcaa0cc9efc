"""Nucleus and greedy draws."""

import pytest
import torch

from opd_mcp.engine.generation.batch_state import draw_tokens, drawn_among_candidates, drawn_in_nucleus, nucleus
from opd_mcp.schemas.recipes import Sampling


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert nucleus(probabilities, 0.7).tolist()[0] == pytest.approx([0, 0.4, 0, 0.3])
    assert nucleus(probabilities, 0.71).tolist()[0] == pytest.approx([0, 0.4, 0.2, 0.3])


def test_nucleus_always_keeps_the_likeliest_token() -> None:
    assert nucleus(torch.tensor([[0.6, 0.4]]), 1e-9).tolist()[0] == pytest.approx([0.6, 0])


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.95, 0.99, 0.99995])
@pytest.mark.parametrize("spread", [0.0, 0.1, 5.0, 60.0])
def test_the_shorter_ways_draw_the_token_of_the_whole_nucleus_to_the_bit(top_p: float, spread: float) -> None:
    """Near-uniform, peaked and one-token distributions; rounded logits make many tokens equally likely."""
    random = torch.Generator().manual_seed(3)
    logits = (torch.randn(64, 3000, generator=random) * spread).round(decimals=1)
    probabilities = torch.softmax(logits, dim=-1)
    noise = torch.empty_like(probabilities).exponential_(generator=random)
    expected = (nucleus(probabilities, top_p) / noise).argmax(dim=-1)
    assert torch.equal(drawn_among_candidates(probabilities, noise, top_p), expected)
    assert torch.equal(drawn_in_nucleus(probabilities, noise, top_p), expected)


def test_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    drawn = draw_tokens(logits, Sampling(temperature=0), torch.Generator().manual_seed(0))
    assert drawn.tolist() == [1, 0]


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0]]).expand(20_000, 2)
    drawn = draw_tokens(logits, Sampling(temperature=0.5), torch.Generator().manual_seed(0))
    expected = torch.softmax(torch.tensor([0.0, 2.0]), -1)[1].item()
    assert drawn.double().mean().item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 1.0), (1.7, 1.0), (0.8, 0.9), (1.3, 0.5)])
def test_tokens_are_drawn_exactly_at_the_temperature_and_top_p(temperature: float, top_p: float) -> None:
    """Frequencies of 200,000 draws against softmax(z / T), cut to the smallest set that reaches top-p."""
    draws = 200_000
    logits = torch.tensor([2.0, 1.5, 0.3, -0.2, -1.0, -4.0])
    sampling = Sampling(temperature=temperature, top_p=top_p)
    ids = draw_tokens(logits.expand(draws, -1), sampling, torch.Generator().manual_seed(0))
    tempered = torch.softmax(logits.double() / temperature, dim=0)
    kept = tempered * (tempered.cumsum(0) - tempered < top_p)  # they stand in falling order
    expected = kept / kept.sum()
    measured = torch.bincount(ids, minlength=6).double() / draws
    assert (measured[expected == 0] == 0).all()
    assert ((measured - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()

"""Drawing one token a row from logits."""

import torch
from torch import Tensor

from opd_mcp.schemas.recipes import Sampling


def draw_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Token ids [B] drawn from fp32 logits [B, V] at the given temperature and top-p; temperature 0 is greedy."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    # argmax of p / Exp(1) is an exact categorical draw, and far cheaper than multinomial for a large V
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(dim=-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, V] with everything outside the smallest set of mass ≥ top_p set to zero (not renormalised)."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(mass_before >= top_p, 0.0))

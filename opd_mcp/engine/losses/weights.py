"""How token losses add up to the loss of one optimizer step."""

import torch
from torch import Tensor

from opd_mcp.schemas.recipes import Normalize


def token_weights(response_lengths: Tensor, normalize: Normalize) -> Tensor:
    """Weight of each sequence's tokens [N] for a step over `response_lengths` [N]; all tokens' weights sum to one.

    `sample`: each sequence counts alike, its tokens share its weight (what the published numbers were trained with);
    `token`: each token counts alike. Sequences without tokens weigh nothing. float64.
    """
    lengths = response_lengths.to(torch.float64)
    counted = (lengths > 0).to(torch.float64)
    if normalize == "sample":
        return counted / (counted.sum() * lengths.clamp_min(1)).clamp_min(1)
    return counted / lengths.sum().clamp_min(1)

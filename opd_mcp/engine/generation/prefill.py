"""Prompts that a cache has taken in, and prompts that wait for a place in a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opd_mcp.engine.models.attention import packs
from opd_mcp.engine.models.kv_cache import prefilled, roomy_cache
from opd_mcp.schemas.memory import PREFILL_TOKENS


@dataclass(frozen=True)
class Prefill:
    """Prompts in a cache: their mask [B, L], last positions [B, 1] and the hidden states [B, H] there."""

    cache: DynamicCache
    mask: Tensor
    positions: Tensor
    hidden: Tensor


@dataclass
class Waiting:
    """Prompts, longest first, of which the first `begun` have a place; the others take those of rows that end.

    `limit` is the most new tokens of a row; `on_ended` hears how many rows have ended.
    """

    model: PreTrainedModel
    prompts: Sequence[Sequence[int]]
    limit: int
    on_ended: Callable[[int], None] = lambda ended: None
    begun: int = 0

    @property
    def left(self) -> int:
        """How many prompts wait."""
        return len(self.prompts) - self.begun

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that waits; 0 if none does."""
        return len(self.prompts[self.begun]) if self.left else 0

    @property
    def whole(self) -> int:
        """Tokens of the longest row, if it reaches the limit."""
        return len(self.prompts[0]) + self.limit

    def taken_in(self, count: int) -> Prefill:
        """The next so many prompts (fewer where fewer wait), which have begun with this."""
        prompts = self.prompts[self.begun : self.begun + count]
        self.begun += len(prompts)
        return taken_in(self.model, prompts)


def taken_in(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Prefill:
    """Prompts that a new cache has taken in."""
    input_ids, mask = left_padded(prompts, model.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = roomy_cache(model.config)
    # models whose attention was compared with packed rows are known to see what came before as they should
    width = max(PREFILL_TOKENS // len(prompts), 1) if packs(model) else input_ids.shape[1]
    hidden = prefilled(model, cache, input_ids, mask, positions, width)
    return Prefill(cache, mask, positions[:, -1:], hidden)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask [B, L], prompts at the right edge."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)

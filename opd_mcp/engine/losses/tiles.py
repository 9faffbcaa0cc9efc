"""Tiles of logits [C, V]: made, exponentiated in place, and never kept."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_mcp.schemas.memory import TILE_BYTES

# the least mass outside a row's ids: below it a ratio to it would overflow float32
LEAST_REST = 1e-30


@dataclass(frozen=True)
class Head:
    """What turns hidden states [R, H] into logits: weight [V, H], bias [V], a soft cap, the dtype of the operands.

    Logits are float32 (float64 for float64 weights) whatever the operands are: bf16-rounded logits would put errors of
    the size of a typical advantage into the log-probs.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    operands: torch.dtype | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and sums."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype of the matrices: bf16 only where their product is accumulated and returned in fp32."""
        return self.operands if self.operands is not None and self.weight.device.type == "cuda" else self.wide

    def product(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """left @ right of operand-dtype matrices, in the wide dtype."""
        if left.dtype is self.wide:
            return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=self.wide)

    def raw_logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [C, V] before the soft cap, of operand-dtype hidden states and weight."""
        logits = self.product(hidden, weight.T, out)
        return logits if self.bias is None else logits.add_(self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [C, V] of hidden states [C, H], not differentiable."""
        logits = self.raw_logits(hidden.to(self.operand_dtype), self.weight.detach().to(self.operand_dtype))
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


@dataclass(frozen=True)
class Exponentials:
    """A tile as exp(z − max) [C, V] with zeros at each row's ids, and the logs that belong to it.

    `own` [C, k] log π of the ids, `rest` [C] log π of everything else, `target` [C] log π of the target, `total` [C]
    the sum of the row's exponentials, ids included.
    """

    values: Tensor
    own: Tensor
    rest: Tensor
    target: Tensor
    total: Tensor


def exponentials(logits: Tensor, ids: Tensor, targets: Tensor) -> Exponentials:
    """The tile's exponentials, in place of its logits.

    The ids are taken out before the sum, so that neither the rest's mass nor 1 − π is ever a difference of two numbers
    close to one another.
    """
    assert ids.shape[1] < logits.shape[1], "the tail bucket needs at least one token outside the ids"
    greatest = logits.amax(dim=1, keepdim=True)
    own = logits.gather(1, ids) - greatest
    target = logits.gather(1, targets[:, None]) - greatest
    values = logits.sub_(greatest).exp_().scatter_(1, ids, 0.0)
    outside = values.sum(dim=1)
    total = outside + own.exp().sum(dim=1)
    normaliser = total.log()
    rest = (outside / total).clamp_min(LEAST_REST).log()
    return Exponentials(values, own - normaliser[:, None], rest, target[:, 0] - normaliser, total)


def row_tiles(rows: int, vocab: int, head: Head, tile_bytes: int | None) -> Iterator[slice]:
    """Slices of rows whose logits fit the tile budget (the device's by default)."""
    budget = tile_bytes or TILE_BYTES.get(head.weight.device.type, TILE_BYTES["cpu"])
    size = max(1, budget // (vocab * head.wide.itemsize))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def tile_buffer(rows: int, vocab: int, head: Head, tile_bytes: int | None) -> Tensor:
    """One tile's memory, used again for every tile."""
    size = max((tile.stop - tile.start for tile in row_tiles(rows, vocab, head, tile_bytes)), default=0)
    return torch.empty(size, vocab, dtype=head.wide, device=head.weight.device)

"""Tiles of logits [C, V]: made, exponentiated in place, and never kept; by a Triton kernel where one runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from opd_mcp.schemas.memory import TILE_BYTES

# the least mass outside a row's ids: below it a ratio to it would overflow float32
LEAST_REST = 1e-30
# of what a CPU core keeps near it
CACHED_WEIGHT_BYTES = 2**20


@dataclass(frozen=True)
class Head:
    """What turns hidden states [R, H] into logits: weight [V, H], bias [V], a soft cap, the dtype of the operands.

    Logits are float32 (float64 for float64 weights) whatever the operands are: bf16-rounded logits would put errors of
    the size of a typical advantage into the log-probs. `kernel` decides whether the Triton kernel (fused.py) or plain
    torch computes the tiles; by default the kernel does where it can.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    operands: torch.dtype | None = None
    kernel: bool | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and sums."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype of the matrices: bf16 only where their product is accumulated and returned in fp32."""
        return self.operands if self.operands is not None and self.weight.device.type == "cuda" else self.wide

    @property
    def fused(self) -> bool:
        """Whether the Triton kernel goes over this head's tiles."""
        if self.kernel is not None:
            return self.kernel
        cuda = self.weight.device.type == "cuda"
        return cuda and self.wide is torch.float32 and kernel_problem(self.weight.device) is None

    def product(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """left @ right of operand-dtype matrices, in the wide dtype."""
        if left.dtype is self.wide:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=self.wide, out=out)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total += left @ right, accumulated in the total's dtype (float32 or wider)."""
        if left.dtype is total.dtype:
            total.addmm_(left, right)
        elif left.dtype is not self.wide and total.dtype is torch.float32:
            # one launch that reads and writes the [V, H] sum once, where a product and an addition take it thrice
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        else:
            total.add_(self.product(left, right))

    def raw_logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [C, V] before the soft cap, of operand-dtype hidden states and weight."""
        if out is None or weight.device.type != "cpu":
            logits = self.product(hidden, weight.T, out)
        else:
            # a block of the weight stays in the core's cache for all rows of the tile
            rows = max(1, CACHED_WEIGHT_BYTES // (weight.shape[1] * weight.itemsize))
            for start in range(0, len(weight), rows):
                self.product(hidden, weight[start : start + rows].T, out[:, start : start + rows])
            logits = out
        return logits if self.bias is None else logits.add_(self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [C, V] of hidden states [C, H], not differentiable."""
        return self.capped(self.raw_logits(hidden.to(self.operand_dtype), self.weight.detach().to(self.operand_dtype)))

    def capped(self, logits: Tensor) -> Tensor:
        """The logits after the soft cap, in place."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, capped: Tensor) -> Tensor | None:
        """The soft cap's derivative at capped logits; None without a cap."""
        return None if self.softcap is None else 1 - (capped / self.softcap).square()


@dataclass(frozen=True)
class Exponentials:
    """A tile as exp(z − max) times the soft cap's slope [C, V], zeros at each row's ids, and the logs of its row.

    `own` [C, k] log π of the ids, `rest` [C] log π of everything else, `target` [C] log π of the target, `total` [C]
    the sum of the row's exponentials, ids included, `slope` [C, k] the cap's at the ids. `values` has the dtype of the
    logits or of the operands.
    """

    values: Tensor
    own: Tensor
    rest: Tensor
    target: Tensor
    total: Tensor
    slope: Tensor | None


def exponentials(head: Head, logits: Tensor, ids: Tensor, targets: Tensor) -> Exponentials:
    """The exponentials of a tile of raw logits, which they overwrite.

    The ids are taken out before the sum, so that neither the rest's mass nor 1 − π is ever a difference of two numbers
    close to one another.
    """
    assert ids.shape[1] < logits.shape[1], "the tail bucket needs at least one token outside the ids"
    own, target = head.capped(logits.gather(1, ids)), head.capped(logits.gather(1, targets[:, None]))
    slope = head.slope(own)
    if head.fused:
        from opd_mcp.engine.losses.fused import row_sums

        narrow = head.bias is None and head.operand_dtype is not logits.dtype
        values = torch.empty_like(logits, dtype=head.operand_dtype) if narrow else logits
        sums = row_sums(logits.scatter_(1, ids, -torch.inf), own.amax(dim=1), softcap=head.softcap, values=values)
        greatest, outside = sums.greatest, sums.outside[:, 0]
    else:
        capped = head.capped(logits)
        slopes = head.slope(capped)
        greatest = capped.amax(dim=1, keepdim=True)
        values = capped.sub_(greatest).exp_().scatter_(1, ids, 0.0)
        outside = values.sum(dim=1)
        if slopes is not None:
            values.mul_(slopes)
    own, target = own - greatest, target - greatest
    total = outside + own.exp().sum(dim=1)
    normaliser = total.log()
    rest = (outside / total).clamp_min(LEAST_REST).log()
    return Exponentials(values, own - normaliser[:, None], rest, target[:, 0] - normaliser, total, slope)


def normalisers(head: Head, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(greatest, log Σ exp(z − greatest)), both [C, 1], of a tile of raw logits, which is spent."""
    if head.fused:
        from opd_mcp.engine.losses.fused import row_sums

        sums = row_sums(logits, head.capped(logits.gather(1, targets[:, None]))[:, 0], softcap=head.softcap)
        return sums.greatest, sums.outside.log()
    capped = head.capped(logits)
    greatest = capped.amax(dim=1, keepdim=True)
    return greatest, capped.sub_(greatest).exp_().sum(dim=1, keepdim=True).log()


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


@cache
def kernel_problem(device: torch.device) -> str | None:
    """Why the kernel cannot go over this device's tiles; None where it can.

    Triton comes with torch's CUDA wheels for Linux, but builds its launcher with the system's C compiler and Python's
    headers, which many containers lack. Plain torch then does the same work.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from opd_mcp.engine.losses.fused import row_sums

        outside = row_sums(torch.zeros(1, 8, device=device), torch.zeros(1, device=device)).outside
    except Exception as error:  # Triton, its compiler and the C compiler raise many kinds; reported, never hidden
        return f"Triton cannot build it here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    assert outside.item() == 8, "the kernel counts eight ones"
    return None

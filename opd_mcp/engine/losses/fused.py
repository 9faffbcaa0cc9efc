"""A Triton kernel for CUDA: a row's max, sum and exponentials in one launch, read twice and written once.

Plain torch reads and writes a float32 tile seven times between the two matrix products; here it is read twice and
written once, in the dtype of the products that follow. `logit_tiles.py` is the reference. Under `TRITON_INTERPRET=1`
the same kernel runs on the CPU, which is how it is tested.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


@dataclass(frozen=True)
class RowSums:
    """Per row [C, 1], float32: the greatest of its logits and its floor, and Σ exp(z − greatest) without the floor."""

    greatest: Tensor
    outside: Tensor


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own types
    logits,
    floors,
    greatest_of,
    outside_of,
    values,
    row_stride,
    value_stride,
    softcap,
    VOCAB: tl.constexpr,
    CAPPED: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    greatest = tl.load(floors + row)
    outside = greatest * 0.0
    for start in range(0, VOCAB, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * row_stride + column, mask=column < VOCAB, other=float("-inf"))
        if CAPPED:
            # 2σ(2x) − 1 is tanh(x); a logit of −inf stays out of the row
            z = tl.where(z == float("-inf"), z, softcap * (2 * tl.sigmoid(2 * z / softcap) - 1))
        above = tl.maximum(greatest, tl.max(z, axis=0))
        outside = outside * tl.exp(greatest - above) + tl.sum(tl.exp(z - above), axis=0)
        greatest = above
    tl.store(greatest_of + row, greatest)
    tl.store(outside_of + row, outside)
    if WRITES:
        for start in range(0, VOCAB, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + row * row_stride + column, mask=column < VOCAB, other=float("-inf"))
            if CAPPED:
                share = tl.sigmoid(2 * z / softcap)
                capped = tl.where(z == float("-inf"), z, softcap * (2 * share - 1))
                # 4σ(2x)σ(−2x) is tanh's slope, without the cancellation of 1 − tanh²
                value = tl.exp(capped - greatest) * (4 * share * tl.sigmoid(-2 * z / softcap))
            else:
                value = tl.exp(z - greatest)
            tl.store(values + row * value_stride + column, value.to(values.dtype.element_ty), mask=column < VOCAB)


def row_sums(logits: Tensor, floors: Tensor, *, softcap: float | None = None, values: Tensor | None = None) -> RowSums:
    """The sums of float32 logits [C, V] above `floors` [C], finite logits of the row (ids left out, or its target).

    The soft cap is applied on the way; floors are already capped. `values` [C, V], which may be `logits` itself,
    receives exp(z − greatest), times the cap's slope: zero where a logit is −inf.
    """
    assert logits.dtype is torch.float32, "the kernel reads float32 tiles"
    rows, vocab = logits.shape
    greatest, outside = (torch.empty(rows, 1, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        target = logits if values is None else values
        _row_kernel[(rows,)](
            logits,
            floors.float().contiguous(),
            greatest,
            outside,
            target,
            logits.stride(0),
            target.stride(0),
            softcap or 1.0,
            VOCAB=vocab,
            CAPPED=softcap is not None,
            WRITES=values is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return RowSums(greatest, outside)

"""The one-pass head: loss, log-probs and both gradients of the vocabulary projection from one pass over its tiles.

A row-scoped objective's gradient with respect to a row of logits is known as soon as the row is. So each tile of logits
[C, V] is turned in place into exp(z − max), gives its losses, and is multiplied at once into grad_hidden and
grad_weight: 6·R·V·H operations and one tile of memory, where a recomputed head takes 8·R·V·H and a plain one keeps
[R, V].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_mcp.engine.losses.rows import Columns, RowObjective
from opd_mcp.engine.losses.tiles import Head, exponentials, normalisers, row_tiles, tile_buffer


@dataclass(frozen=True)
class HeadLosses:
    """The weighted loss (float64 scalar, to be differentiated); per row [R] the unweighted loss and log π(target)."""

    total: Tensor
    losses: Tensor
    logprobs: Tensor


def one_pass_losses(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    columns: Columns,
    objective: RowObjective,
    *,
    main_grad: Tensor | None = None,
    tile_bytes: int | None = None,
) -> HeadLosses:
    """Σ_r row_weights[r] · loss_r over hidden states [R, H] and targets [R], with gradients formed on the way.

    With `main_grad` [V, H] (float32 or wider) the weight's gradient is added to it during this call, and the total must
    be back-propagated as it is, unscaled; without it the gradient comes back through autograd.
    """
    total, losses, logprobs = _OnePassHead.apply(
        hidden, head.weight, head.bias, head, targets, row_weights, columns, objective, main_grad, tile_bytes
    )
    return HeadLosses(total, losses, logprobs)


class _OnePassHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        targets: Tensor,
        row_weights: Tensor,
        columns: Columns,
        objective: RowObjective,
        main_grad: Tensor | None,
        tile_bytes: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, vocab = len(hidden), len(weight)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        narrow = weight.detach().to(head.operand_dtype)
        operand = hidden.detach().to(head.operand_dtype)
        grad_hidden = torch.zeros(rows, weight.shape[1], dtype=head.wide, device=hidden.device) if need_hidden else None
        grad_weight = main_grad if need_weight else None
        if need_weight and grad_weight is None:
            grad_weight = torch.zeros(weight.shape, dtype=head.wide, device=weight.device)
        grad_bias = torch.zeros(vocab, dtype=head.wide, device=weight.device) if need_bias else None
        losses = torch.empty(rows, dtype=head.wide, device=hidden.device)
        logprobs = torch.empty_like(losses)
        scales = row_weights.to(head.wide)
        buffer = tile_buffer(rows, vocab, head, tile_bytes)
        for tile in row_tiles(rows, vocab, head, tile_bytes):
            here = {name: values[tile] for name, values in columns.items()}
            ids = objective.ids(targets[tile], here)
            logits = head.raw_logits(operand[tile], narrow, buffer[: tile.stop - tile.start])
            tile_of = exponentials(head, logits, ids, targets[tile])
            terms = objective.terms(tile_of.own, tile_of.rest, here)
            losses[tile], logprobs[tile] = terms.loss, tile_of.target
            common = terms.common * scales[tile] / tile_of.total
            at_ids = terms.at_ids * scales[tile, None]
            if tile_of.slope is not None:
                at_ids = at_ids * tile_of.slope
            _add_gradients(
                head,
                narrow,
                operand[tile],
                tile_of.values,
                common,
                at_ids,
                ids,
                tile,
                grad_hidden,
                grad_weight,
                grad_bias,
            )
        total = (losses.double() * row_weights.double()).sum()
        ctx.save_for_backward(grad_hidden, None if main_grad is not None else grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(losses, logprobs)
        return total, losses, logprobs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_dtype, weight_dtype = ctx.dtypes
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * upstream).to(hidden_dtype),
            None if grad_weight is None else (grad_weight * upstream).to(weight_dtype),
            None if grad_bias is None else (grad_bias * upstream).to(weight_dtype),
            *([None] * 7),
        )


def _add_gradients(
    head: Head,
    weight: Tensor,
    hidden: Tensor,
    values: Tensor,
    common: Tensor,
    at_ids: Tensor,
    ids: Tensor,
    tile: slice,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """dL/dz = common · values + at_ids on the ids: row scales go into the thin operands, the ids' share stays wide."""
    narrow = values.to(head.operand_dtype)
    if grad_hidden is not None:
        dense = head.product(narrow, weight, grad_hidden[tile]).mul_(common[:, None])
        dense.add_(torch.einsum("ck,ckh->ch", at_ids, weight[ids].to(head.wide)))
        grad_hidden[tile] = dense
    if grad_weight is not None:
        scaled = (hidden.to(head.wide) * common[:, None]).to(head.operand_dtype)
        head.add_product(grad_weight, narrow.T, scaled)
        shares = at_ids[:, :, None] * hidden.to(head.wide)[:, None]
        grad_weight.index_add_(0, ids.flatten(), shares.flatten(0, 1).to(grad_weight.dtype))
    if grad_bias is not None:
        grad_bias.add_(common @ values).index_add_(0, ids.flatten(), at_ids.flatten())


@dataclass(frozen=True)
class RowScores:
    """Per row [R]: log π(target); the k likeliest ids and their log-probs [R, k] where k > 0."""

    logprobs: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor


@torch.no_grad()
def row_scores(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    topk: int = 0,
    valid_vocab: int | None = None,
    tile_bytes: int | None = None,
) -> RowScores:
    """Log-probs and top k from the same tiles, without [R, V]; ids ≥ `valid_vocab` count in the softmax only."""
    rows, vocab = len(hidden), len(head.weight)
    narrow, operand = head.weight.detach().to(head.operand_dtype), hidden.to(head.operand_dtype)
    logprobs = torch.empty(rows, dtype=head.wide, device=hidden.device)
    topk_ids = torch.empty(rows, topk, dtype=torch.long, device=hidden.device)
    topk_logprobs = torch.empty(rows, topk, dtype=head.wide, device=hidden.device)
    buffer = tile_buffer(rows, vocab, head, tile_bytes)
    for tile in row_tiles(rows, vocab, head, tile_bytes):
        logits = head.raw_logits(operand[tile], narrow, buffer[: tile.stop - tile.start])
        best = logits[:, :valid_vocab].topk(topk, dim=-1) if topk else None
        target = head.capped(logits.gather(1, targets[tile, None]))
        greatest, normaliser = normalisers(head, logits, targets[tile])
        logprobs[tile] = (target - greatest - normaliser)[:, 0]
        if best is not None:
            topk_ids[tile] = best.indices
            topk_logprobs[tile] = head.capped(best.values) - greatest - normaliser
    return RowScores(logprobs, topk_ids, topk_logprobs)

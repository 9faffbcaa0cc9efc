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

from opd_mcp.engine.losses.logit_tiles import Exponentials, Head, exponentials, normalisers, row_tiles, tile_buffer
from opd_mcp.engine.losses.objectives import Columns, RowObjective, RowTerms


@dataclass(frozen=True)
class LossRows:
    """What each row [R] is compared with: its target id, the weight of its loss, and the columns of the objective."""

    targets: Tensor
    weights: Tensor
    columns: Columns


@dataclass(frozen=True)
class HeadLosses:
    """The weighted loss (float64 scalar, to be differentiated); per row [R] the unweighted loss and log π(target)."""

    total: Tensor
    losses: Tensor
    logprobs: Tensor


def one_pass_losses(
    head: Head,
    hidden: Tensor,
    rows: LossRows,
    objective: RowObjective,
    *,
    main_grad: Tensor | None = None,
    tile_bytes: int | None = None,
) -> HeadLosses:
    """Σ_r weights[r] · loss_r over hidden states [R, H] and their rows, with gradients formed on the way.

    With `main_grad` [V, H] (float32 or wider) the weight's gradient is added to it during this call, and the total must
    be back-propagated as it is, unscaled; without it the gradient comes back through autograd.
    """
    call = _HeadCall(head, rows, objective, main_grad, tile_bytes)
    total, losses, logprobs = _OnePassHead.apply(hidden, head.weight, head.bias, call)
    return HeadLosses(total, losses, logprobs)


@dataclass(frozen=True)
class _HeadCall:
    """The arguments of `one_pass_losses` that autograd has no gradient for."""

    head: Head
    rows: LossRows
    objective: RowObjective
    main_grad: Tensor | None
    tile_bytes: int | None


@dataclass(frozen=True)
class _Gradients:
    """Sums over the tiles; None for what needs no gradient."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _OnePassHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _HeadCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        head, targets, main_grad = call.head, call.rows.targets, call.main_grad
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
        scales = call.rows.weights.to(head.wide)
        buffer = tile_buffer(rows, vocab, head, call.tile_bytes)
        for tile in row_tiles(rows, vocab, head, call.tile_bytes):
            here = {name: values[tile] for name, values in call.rows.columns.items()}
            ids = call.objective.ids(targets[tile], here)
            logits = head.raw_logits(operand[tile], narrow, buffer[: tile.stop - tile.start])
            tile_of = exponentials(head, logits, ids, targets[tile])
            terms = call.objective.terms(tile_of.own, tile_of.rest, here)
            losses[tile], logprobs[tile] = terms.loss, tile_of.target
            sums = _Gradients(None if grad_hidden is None else grad_hidden[tile], grad_weight, grad_bias)
            _add_gradients(head, narrow, operand[tile], _logit_gradient(tile_of, terms, scales[tile], ids), sums)
        total = (losses.double() * call.rows.weights.double()).sum()
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
            None,
        )


@dataclass(frozen=True)
class _LogitGradient:
    """dL/dz of a tile [C, V]: `common` [C] · `values` [C, V], plus `at_ids` [C, k] on the rows' `ids` [C, k]."""

    values: Tensor
    common: Tensor
    at_ids: Tensor
    ids: Tensor


def _logit_gradient(tile: Exponentials, terms: RowTerms, scales: Tensor, ids: Tensor) -> _LogitGradient:
    common = terms.common * scales / tile.total
    at_ids = terms.at_ids * scales[:, None]
    return _LogitGradient(tile.values, common, at_ids if tile.slope is None else at_ids * tile.slope, ids)


def _add_gradients(head: Head, weight: Tensor, hidden: Tensor, logits: _LogitGradient, sums: _Gradients) -> None:
    """Row scales go into the thin operands, the ids' share stays wide; `sums.hidden` is the tile's part."""
    narrow, ids = logits.values.to(head.operand_dtype), logits.ids
    if sums.hidden is not None:
        dense = head.product(narrow, weight, sums.hidden).mul_(logits.common[:, None])
        dense.add_(torch.einsum("ck,ckh->ch", logits.at_ids, weight[ids].to(head.wide)))
    if sums.weight is not None:
        scaled = (hidden.to(head.wide) * logits.common[:, None]).to(head.operand_dtype)
        head.add_product(sums.weight, narrow.T, scaled)
        shares = logits.at_ids[:, :, None] * hidden.to(head.wide)[:, None]
        sums.weight.index_add_(0, ids.flatten(), shares.flatten(0, 1).to(sums.weight.dtype))
    if sums.bias is not None:
        sums.bias.add_(logits.common @ logits.values).index_add_(0, ids.flatten(), logits.at_ids.flatten())


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

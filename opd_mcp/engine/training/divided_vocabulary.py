"""Embedding and head that no rank ever holds whole: hidden states go to the rows of the vocabulary, not rows to them.

    head        a tile has some response tokens of every rank; each rank forms their logits with its own rows [V/N, H],
                and one gather of a few numbers per token gives all of them the same log-probs and loss
    embedding   each rank gets the rows of its micro-batch's tokens from those that hold them

The head's gradient of a rank's rows is complete there; that of the hidden states is summed over the ranks at once.
"All ranks" are those that hold one replica; the gradients of several are added up at the end of a step.
Vocabulary-parallel as in Megatron-LM (arXiv 1909.08053, §3), with the one-pass head's gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opd_mcp.engine.losses.linear_head import HeadLosses, LossRows
from opd_mcp.engine.losses.logit_tiles import LEAST_REST, Head
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE, RowObjective, RowTerms
from opd_mcp.engine.models.embeddings import model_head
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.ranks import Ranks, own_rows, rows_of
from opd_mcp.engine.training.sharding import ShardedModel, local, row_gradient
from opd_mcp.engine.training.step import LossesOf, main_gradient
from opd_mcp.schemas.memory import TILE_BYTES


class DividedVocabulary:
    """Both ends of a sharded model for one step; every rank calls each method at the same place of its step."""

    def __init__(self, sharded: ShardedModel, runtime: Runtime) -> None:
        model, self._ranks = sharded.model, sharded.ranks
        self._tile_bytes = TILE_BYTES.get(runtime.device.type, TILE_BYTES["cpu"])
        self._embedding = model.get_input_embeddings()
        self._embedded = sharded.rows_of(self._embedding)
        rows = sharded.rows_of(model.get_output_embeddings())
        whole = model_head(model, runtime.dtype if runtime.trains_in_autocast else None)
        held = own_rows(rows.shape[0], self._ranks.part, self._ranks.sharing)
        bias = whole.bias if whole.bias is None else whole.bias.detach()[held]
        bias_grad = None if whole.bias is None else main_gradient(whole.bias)
        self._part = _HeadPart(
            replace(whole, weight=local(rows).detach(), bias=bias, kernel=False),
            self._ranks,
            first=held.start,
            vocab=rows.shape[0],
            tile_bytes=self._tile_bytes,
            main_grad=row_gradient(rows) if rows.requires_grad else None,
            bias_grad=None if bias_grad is None else bias_grad[held],
        )

    def losses_of(self, objective: RowObjective) -> LossesOf:
        """As `one_pass_losses` over the whole vocabulary, of this rank's hidden states and their rows."""
        return lambda hidden, rows: HeadLosses(*_DividedHead.apply(hidden, self._part, rows, objective))

    @torch.no_grad()
    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log π(target) [R] of this rank's hidden states [R, H]."""
        rows = LossRows(targets, torch.zeros(len(targets), dtype=torch.float64, device=targets.device), {})
        part = replace(self._part, main_grad=None, bias_grad=None)
        logprobs: Tensor = _DividedHead.apply(hidden.detach(), part, rows, SFT_OBJECTIVE)[2]
        return logprobs

    @contextmanager
    def looked_up(self, input_ids: Tensor) -> Iterator[Tensor]:
        """Inside, the embedding has the rows of these ids [T] alone, and what is yielded are the ids as it knows them.

        At the end the gradient of those rows, if there is one, is added to that of the ranks that hold them.
        """
        module, rows = self._embedding, self._embedded
        padding, place = getattr(module, "padding_idx", None), module.weight
        ids = input_ids.unique()
        size = max(1, self._tile_bytes // (self._ranks.sharing * rows.shape[1] * rows.itemsize))
        parts = _tiles(self._ranks, len(ids), size, ids.device)
        lent = nn.Parameter(self._fetched(ids, parts), requires_grad=rows.requires_grad)
        try:
            module.weight = lent
            if padding is not None:
                row = (ids == padding).nonzero().flatten().tolist()
                module.padding_idx = row[0] if row else None
            yield torch.searchsorted(ids, input_ids)
        finally:
            module.padding_idx, module.weight = padding, place
        if lent.grad is not None:
            self._give_back(ids, parts, lent.grad)

    def _fetched(self, ids: Tensor, parts: list["_Tile"]) -> Tensor:
        own = local(self._embedded).detach()
        found = own.new_empty(len(ids), own.shape[1])
        for part in parts:
            asked, here = self._held(part.gathered(ids))
            sent = own.new_zeros(len(here), own.shape[1])
            sent[asked] = own[here[asked]]
            found[part.own] = part.summed(sent)  # one term of each sum is not zero
        return found

    def _give_back(self, ids: Tensor, parts: list["_Tile"], gradient: Tensor) -> None:
        total = row_gradient(self._embedded)
        for part in parts:
            asked, here = self._held(part.gathered(ids))
            total.index_add_(0, here[asked], part.gathered(gradient.to(total.dtype))[asked])

    def _held(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these ids this rank holds, and where among its rows."""
        held = own_rows(self._embedded.shape[0], self._ranks.part, self._ranks.sharing)
        return (ids >= held.start) & (ids < held.stop), ids - held.start


@dataclass(frozen=True)
class _HeadPart:
    """This rank's rows of the head, from the id `first` on, and where the gradients of its weight and bias go."""

    head: Head
    ranks: Ranks
    first: int
    vocab: int
    tile_bytes: int
    main_grad: Tensor | None
    bias_grad: Tensor | None

    def tiles(self, rows: int) -> list["_Tile"]:
        """The tiles of this rank's rows and all others'."""
        size, itemsize = self.ranks.sharing, self.head.wide.itemsize
        each = max(1, self.tile_bytes // (rows_of(self.vocab, size) * itemsize) // size)
        return _tiles(self.ranks, rows, each, self.head.weight.device)


@dataclass(frozen=True)
class _Tile:
    """At most `each` rows of every rank: this rank's rows `own` of its micro-batch, `held` of each rank."""

    ranks: Ranks
    own: slice
    each: int
    held: list[int]

    @property
    def mine(self) -> slice:
        """Where this rank's rows are among those of all ranks."""
        first = sum(self.held[: self.ranks.part])
        return slice(first, first + self.held[self.ranks.part])

    def gathered(self, values: Tensor) -> Tensor:
        """The tile's rows of every rank [C, …], of this rank's `values` for its whole micro-batch [R, …]."""
        mine = values[self.own].contiguous()
        if len(mine) < self.each:
            mine = torch.cat([mine, mine.new_zeros(self.each - len(mine), *mine.shape[1:])])
        whole = self.ranks.gathered(mine)
        if min(self.held) == self.each:
            return whole
        parts = whole.split(self.each)
        return torch.cat([part[:count] for part, count in zip(parts, self.held, strict=True)])

    def summed(self, values: Tensor) -> Tensor:
        """This rank's rows of the sum of every rank's `values` [C, …]."""
        whole = values
        if min(self.held) < self.each:
            whole = values.new_zeros(self.ranks.sharing * self.each, *values.shape[1:])
            for rank, part in enumerate(values.split(self.held)):
                whole[rank * self.each : rank * self.each + len(part)] = part
        return self.ranks.scattered_sum(whole)[: self.held[self.ranks.part]]


def _tiles(ranks: Ranks, rows: int, each: int, device: torch.device) -> list[_Tile]:
    """The tiles of this many rows here and others elsewhere, at most `each` of every rank; equally many everywhere."""
    counts = ranks.gathered(torch.tensor([rows], device=device)).tolist()
    found = []
    for start in range(0, max(counts), each):
        size = min(each, max(counts) - start)
        held = [min(max(count - start, 0), size) for count in counts]
        found.append(_Tile(ranks, slice(start, start + held[ranks.part]), size, held))
    return found


class _DividedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, part: _HeadPart, rows: LossRows, objective: RowObjective
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = part.head
        narrow, operand = head.weight.to(head.operand_dtype), hidden.detach().to(head.operand_dtype)
        grad_hidden = torch.zeros_like(operand, dtype=head.wide) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(hidden), dtype=head.wide, device=hidden.device)
        logprobs = torch.empty_like(losses)
        tiles = part.tiles(len(hidden))
        buffer = losses.new_empty(max((sum(tile.held) for tile in tiles), default=0), len(narrow))
        for tile in tiles:
            columns = {name: tile.gathered(values) for name, values in rows.columns.items()}
            targets, weights = tile.gathered(rows.targets), tile.gathered(rows.weights.to(head.wide))
            every = tile.gathered(operand)
            ids = objective.ids(targets, columns)
            logits = _tile_logits(part, head.raw_logits(every, narrow, buffer[: len(every)]), ids, targets)
            terms = objective.terms(logits.own, logits.rest, columns)
            losses[tile.own], logprobs[tile.own] = terms.loss[tile.mine], logits.target[tile.mine]
            dense = _add_gradients(part, narrow, every, logits.gradient(terms, weights), grad_hidden is not None)
            if grad_hidden is not None and dense is not None:
                grad_hidden[tile.own] = tile.summed(dense)
        ctx.grad_hidden, ctx.dtype = grad_hidden, hidden.dtype
        ctx.mark_non_differentiable(losses, logprobs)
        return (losses.double() * rows.weights.double()).sum(), losses, logprobs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.grad_hidden
        return None if grad is None else (grad * upstream).to(ctx.dtype), None, None, None


@dataclass(frozen=True)
class _TileLogits:
    """A tile's exponentials on this rank's rows [C, V/N], zeros at ids, and the logs of whole rows, alike on all ranks.

    `row`, `place` [n] of the ids [C, k] are the entries that this rank holds, `column` [n] where among its rows;
    `share` [C] turns `values` into exponentials relative to the whole row's greatest logit.
    """

    values: Tensor
    share: Tensor
    own: Tensor
    rest: Tensor
    target: Tensor
    total: Tensor
    slope: Tensor | None
    row: Tensor
    place: Tensor
    column: Tensor

    def gradient(self, terms: RowTerms, weights: Tensor) -> "_PartGradient":
        """dL/dz of this rank's columns."""
        at_ids = terms.at_ids * weights[:, None]
        if self.slope is not None:
            at_ids = at_ids * self.slope
        common = terms.common * weights / self.total * self.share
        return _PartGradient(self.values, common, at_ids[self.row, self.place], self.row, self.column)


@dataclass(frozen=True)
class _PartGradient:
    """dL/dz of a tile's part [C, V/N]: `common` [C] · `values`, plus `at_ids` [n] at the places `row`, `column`."""

    values: Tensor
    common: Tensor
    at_ids: Tensor
    row: Tensor
    column: Tensor


def _tile_logits(part: _HeadPart, logits: Tensor, ids: Tensor, targets: Tensor) -> _TileLogits:
    """The tile's exponentials, of raw logits [C, V/N], which they overwrite.

    Those of a rank are relative to its own greatest logit, so that one exchange is enough.
    """
    assert ids.shape[1] < part.vocab, "the tail bucket needs at least one token outside the ids"
    head, (count, rows) = part.head, logits.shape
    wanted = torch.cat([ids, targets[:, None]], dim=1) - part.first
    row, place = ((wanted >= 0) & (wanted < rows)).nonzero(as_tuple=True)
    column = wanted[row, place]
    known = torch.full(wanted.shape, -torch.inf, dtype=logits.dtype, device=logits.device)
    known[row, place] = head.capped(logits[row, column])
    listed = place < ids.shape[1]
    row, place, column = row[listed], place[listed], column[listed]
    capped = head.capped(logits)
    slopes = head.slope(capped)
    greatest = capped.amax(dim=1) if rows else known.new_full((count,), -torch.inf)
    values = capped.sub_(greatest[:, None]).exp_()
    values[row, column] = 0.0
    said = torch.cat([known, greatest[:, None], values.sum(dim=1, keepdim=True)], dim=1)
    if slopes is not None:
        values.mul_(slopes)
    heard = part.ranks.gathered(said).unflatten(0, (part.ranks.sharing, count))
    known, tops = heard[..., :-2].amax(dim=0), heard[..., -2]  # an id is known to the one rank that holds it
    top = tops.amax(dim=0)
    outside = (heard[..., -1] * (tops - top).exp()).sum(dim=0)
    own, target = known[:, :-1] - top[:, None], known[:, -1] - top
    total = outside + own.exp().sum(dim=1)
    normaliser = total.log()
    return _TileLogits(
        values,
        (greatest - top).exp(),
        own - normaliser[:, None],
        (outside / total).clamp_min(LEAST_REST).log(),
        target - normaliser,
        total,
        head.slope(known[:, :-1]),
        row,
        place,
        column,
    )


def _add_gradients(
    part: _HeadPart, weight: Tensor, hidden: Tensor, logits: _PartGradient, need_hidden: bool
) -> Tensor | None:
    """Add to this rank's gradients of weight and bias; its part of the hidden states' [C, H], where it is needed."""
    head, dense = part.head, None
    narrow, wide = logits.values.to(head.operand_dtype), hidden.to(head.wide)
    if need_hidden:
        dense = head.product(narrow, weight).mul_(logits.common[:, None])
        dense.index_add_(0, logits.row, logits.at_ids[:, None] * weight[logits.column].to(head.wide))
    if part.main_grad is not None:
        head.add_product(part.main_grad, narrow.T, (wide * logits.common[:, None]).to(head.operand_dtype))
        shares = logits.at_ids[:, None] * wide[logits.row]
        part.main_grad.index_add_(0, logits.column, shares.to(part.main_grad.dtype))
    if part.bias_grad is not None:
        part.bias_grad.add_(logits.common @ logits.values).index_add_(0, logits.column, logits.at_ids)
    return dense

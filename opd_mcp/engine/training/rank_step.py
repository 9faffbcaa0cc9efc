"""One optimizer step on several ranks: the gradient that one process would have formed, each rank doing its share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from opd_mcp.engine.data.batches import Batch, StepData, build_batch, ranges
from opd_mcp.engine.losses.linear_head import row_scores
from opd_mcp.engine.losses.objectives import RowObjective
from opd_mcp.engine.models.attention import hidden_rows
from opd_mcp.engine.models.embeddings import model_head
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.divided_vocabulary import DividedVocabulary
from opd_mcp.engine.training.ranks import Share, shares
from opd_mcp.engine.training.sharding import ShardedModel
from opd_mcp.engine.training.step import (
    LossesOf,
    Reweigh,
    StepResult,
    StepSettings,
    StepTokens,
    Stopwatch,
    added_gradients,
    head_losses,
    row_weights,
    token_weights_of,
    trained_groups,
)


def accumulate_on_ranks(
    sharded: ShardedModel,
    data: StepData,
    objective: RowObjective,
    settings: StepSettings,
    *,
    reweigh: Reweigh | None = None,
    clock: Stopwatch | None = None,
) -> StepResult:
    """`accumulate_gradients` over all ranks, which all call it with the same rows; the result is the whole step's."""
    clock = clock or Stopwatch(settings.runtime.device)
    model, ranks, sequences = sharded.model, sharded.ranks, data.sequences
    with clock.part("data"):
        groups = trained_groups(model, data, settings)
        share = shares(groups, sequences, ranks.size)[ranks.rank]
    if not groups:
        return StepResult(0.0, torch.empty(0), {}, 0)
    weights = row_weights(data, settings)
    step = _Step(data, settings, sharded)
    with _vocabulary(sharded, step.tokens(), settings.runtime) as vocabulary:
        factors = None if reweigh is None else step.factors(share, reweigh, vocabulary)

        def weighted() -> Iterator[tuple[Batch, Tensor]]:
            for batch in step.batches(share, vocabulary, clock):
                own = token_weights_of(batch, weights)
                yield batch, own if factors is None else own * factors[torch.from_numpy(batch.positions)]

        # not named here: it has the gathered head, which must be gone when the window adds up the gradients
        added = added_gradients(model, weighted(), vocabulary.losses_of(objective), settings, clock)
    with clock.part("backward"):
        sharded.add_up_gradients()
        ranks.add_up(added.total)
        logprobs = step.gathered(added.batches, added.logprobs)[step.positions]
    lengths = sequences.lengths()[np.concatenate(groups)]
    return StepResult(float(added.total), logprobs, step.columns(), len(logprobs), tuple(lengths.tolist()))


class _Vocabulary(Protocol):
    """Embedding and head while a step is computed."""

    def looked_up(self, input_ids: Tensor) -> AbstractContextManager[Tensor]:
        """A block in which the embedding knows these ids [T], by those that are yielded."""

    def losses_of(self, objective: RowObjective) -> LossesOf:
        """The losses by the head, with their gradients."""

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log π(target) [R] of hidden states [R, H]."""


@dataclass(frozen=True)
class _Gathered:
    """Inside a window: the model has a head and an embedding, whose rows `placed` finds."""

    model: PreTrainedModel
    placed: Callable[[Tensor], Tensor]
    runtime: Runtime

    def looked_up(self, input_ids: Tensor) -> AbstractContextManager[Tensor]:
        return nullcontext(self.placed(input_ids))

    def losses_of(self, objective: RowObjective) -> LossesOf:
        return head_losses(self.model, objective, self.runtime)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head = model_head(self.model, self.runtime.dtype if self.runtime.trains_in_autocast else None)
        return row_scores(head, hidden, targets).logprobs


@contextmanager
def _vocabulary(sharded: ShardedModel, tokens: NDArray[np.int64], runtime: Runtime) -> Iterator[_Vocabulary]:
    """That of a step with these tokens, the same on all ranks."""
    if sharded.divides_steps:
        yield DividedVocabulary(sharded, runtime)
        sharded.add_up_rows()
        return
    with sharded.window(tokens) as placed:
        yield _Gathered(sharded.model, placed, runtime)


class _Step:
    """The rows of one step, and where their response tokens are among all of the data's."""

    def __init__(self, data: StepData, settings: StepSettings, sharded: ShardedModel) -> None:
        self._sequences, self._settings, self._sharded = data.sequences, settings, sharded
        counts = data.sequences.response_lengths()[data.indices]
        self._rows = np.repeat(data.indices, counts)
        self.positions = torch.from_numpy(ranges(data.sequences.response_offsets[data.indices], counts))
        self._indices = data.indices[data.sequences.lengths()[data.indices] > 0]

    def tokens(self) -> NDArray[np.int64]:
        """The ids of the step's rows."""
        rows = self._sequences.take(self._indices)
        return np.concatenate([rows.prompt_ids, rows.response_ids]).astype(np.int64)

    def batches(self, share: Share, vocabulary: _Vocabulary, clock: Stopwatch) -> Iterator[Batch]:
        """The share's micro-batches, empty ones included; the embedding knows the ids of the last one."""
        device = self._settings.runtime.device
        for last, group in enumerate(share, 1 - len(share)):
            self._sharded.add_up_layers(now=last == 0)
            with clock.part("data"):
                batch = self._empty() if group is None else build_batch(self._sequences, group, device)
            with vocabulary.looked_up(batch.input_ids) as placed:
                yield replace(batch, input_ids=placed)

    def columns(self) -> dict[str, Tensor]:
        """The stored values of the step's tokens, in the data's order."""
        device, positions = self._settings.runtime.device, self.positions.numpy()
        return {
            name: torch.from_numpy(np.ascontiguousarray(values[positions])).to(device)
            for name, values in self._sequences.columns.items()
        }

    def gathered(self, batches: list[Batch], values: list[Tensor]) -> Tensor:
        """[all response tokens of the data] of every rank's values [R] of its micro-batches."""
        total = int(self._sequences.response_lengths().sum())
        whole = torch.zeros(total, dtype=values[0].dtype, device=values[0].device)
        for batch, part in zip(batches, values, strict=True):
            whole[torch.from_numpy(batch.positions)] = part  # one term of each sum is not zero
        return self._sharded.ranks.add_up(whole)

    @torch.no_grad()
    def factors(self, share: Share, reweigh: Reweigh, vocabulary: _Vocabulary) -> Tensor:
        """The factors of all response tokens of the data; those of tokens outside the step are zero."""
        runtime, model = self._settings.runtime, self._sharded.model
        batches, logprobs = [], []
        for batch in self.batches(share, vocabulary, Stopwatch(runtime.device)):
            with torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=runtime.trains_in_autocast):
                hidden = hidden_rows(model, batch.input_ids, batch.lengths, batch.rows)
            batches.append(batch)
            logprobs.append(vocabulary.logprobs(hidden, batch.targets))
        whole = self.gathered(batches, logprobs)
        rows = torch.from_numpy(self._rows).to(runtime.device)
        own = reweigh(StepTokens(whole[self.positions], rows, self.columns())).detach()
        found = torch.zeros(len(whole), dtype=own.dtype, device=whole.device)
        found[self.positions] = own
        return found

    def _empty(self) -> Batch:
        """One token and no row: its forward and backward run, and add zeros."""
        device = self._settings.runtime.device
        some = build_batch(self._sequences, self._indices[:1], device)
        none = slice(0, 0)
        return replace(
            some,
            input_ids=some.input_ids[:1],
            lengths=[1],
            rows=some.rows[none],
            targets=some.targets[none],
            sequence=some.sequence[none],
            columns={name: values[none] for name, values in some.columns.items()},
            positions=some.positions[none],
        )

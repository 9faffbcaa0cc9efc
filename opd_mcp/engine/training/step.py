"""One optimizer step over micro-batches; the result does not depend on how the step is cut."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from opd_mcp.engine.data.batches import Batch, build_batch
from opd_mcp.engine.data.packing import grouped_rows
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.losses.head import one_pass_losses, row_scores
from opd_mcp.engine.losses.rows import RowObjective
from opd_mcp.engine.losses.weights import token_weights
from opd_mcp.engine.models.attention import hidden_rows, packs
from opd_mcp.engine.models.rows import model_head
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.gradients import main_gradient
from opd_mcp.engine.training.stopwatch import Stopwatch
from opd_mcp.schemas.recipes import Normalize


@dataclass(frozen=True)
class StepTokens:
    """Per-token values of a whole step: log π_θ [R], the sequence of each token [R], and the stored columns."""

    logprobs: Tensor
    sequence: Tensor
    columns: dict[str, Tensor]


# the factors [R] by which a sequence- or batch-scoped objective weighs the tokens of a step
Reweigh = Callable[[StepTokens], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step computed before the optimizer moved: the loss, and per-token values in data order of the step.

    `tokens` are response tokens, `lengths` those of all sequences, prompts included.
    """

    loss: float
    logprobs: Tensor
    columns: dict[str, Tensor]
    tokens: int
    lengths: tuple[int, ...] = ()


def accumulate_gradients(
    model: PreTrainedModel,
    sequences: Sequences,
    indices: NDArray[np.int64],
    objective: RowObjective,
    *,
    normalize: Normalize,
    micro_batch_tokens: int,
    runtime: Runtime,
    reweigh: Reweigh | None = None,
    clock: Stopwatch | None = None,
) -> StepResult:
    """Add the gradient of the weighted loss over the rows `indices` to the parameters' gradients.

    Normalisers are taken over the whole step first, so micro-batches only decide memory. With `reweigh` a first pass
    over all log-probs gives each token a factor, held constant: that is how sequence- and batch-scoped weights work.
    """
    clock = clock or Stopwatch(runtime.device)
    weights = token_weights(torch.from_numpy(sequences.response_lengths()[indices]), normalize)
    weight_of_row = torch.zeros(len(sequences), dtype=torch.float64)
    weight_of_row[torch.from_numpy(indices)] = weights
    factors = None if reweigh is None else _first_pass(model, sequences, indices, reweigh, micro_batch_tokens, runtime)
    head = model_head(model, runtime.dtype if runtime.trains_in_autocast else None)
    head_grad, embedding_grad = main_gradient(head.weight), main_gradient(model.get_input_embeddings().weight)
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    logprobs: list[Tensor] = []
    columns: dict[str, list[Tensor]] = {}
    lengths: list[int] = []
    first = 0
    for batch in _batches(model, sequences, indices, micro_batch_tokens, runtime, clock):
        with clock.part("forward"):
            token_weight = weight_of_row[torch.from_numpy(batch.indices)].to(runtime.device)[batch.sequence]
            if factors is not None:
                token_weight = token_weight * factors[first : first + len(batch.rows)]
                first += len(batch.rows)
            with torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=runtime.trains_in_autocast):
                hidden = hidden_rows(model, batch.input_ids, batch.lengths, batch.rows, main_grad=embedding_grad)
            losses = one_pass_losses(
                head, hidden, batch.targets, token_weight, batch.columns, objective, main_grad=head_grad
            )
        with clock.part("backward"):
            torch.autograd.backward(losses.total)
        total += losses.total.detach()
        logprobs.append(losses.logprobs)
        lengths += batch.lengths
        for name, values in batch.columns.items():
            columns.setdefault(name, []).append(values)
    if not logprobs:
        return StepResult(0.0, torch.empty(0), {}, 0)
    joined = torch.cat(logprobs)
    stored = {name: torch.cat(parts) for name, parts in columns.items()}
    return StepResult(float(total), joined, stored, len(joined), tuple(lengths))


def _batches(
    model: PreTrainedModel,
    sequences: Sequences,
    indices: NDArray[np.int64],
    micro_batch_tokens: int,
    runtime: Runtime,
    clock: Stopwatch,
) -> Iterator[Batch]:
    counts = sequences.response_lengths()
    with clock.part("data"):
        groups = grouped_rows(sequences.lengths(), indices, micro_batch_tokens, packed=packs(model))
    for group in groups:
        if counts[group].sum() == 0:
            continue
        with clock.part("data"):
            batch = build_batch(sequences, group, runtime.device)
        yield batch


@torch.no_grad()
def _first_pass(
    model: PreTrainedModel,
    sequences: Sequences,
    indices: NDArray[np.int64],
    reweigh: Reweigh,
    micro_batch_tokens: int,
    runtime: Runtime,
) -> Tensor:
    """The factors [R] in the order of the step's micro-batches."""
    head = model_head(model, runtime.dtype if runtime.trains_in_autocast else None)
    logprobs, rows, columns = [], [], []
    for batch in _batches(model, sequences, indices, micro_batch_tokens, runtime, Stopwatch(runtime.device)):
        with torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=runtime.trains_in_autocast):
            hidden = hidden_rows(model, batch.input_ids, batch.lengths, batch.rows)
        logprobs.append(row_scores(head, hidden, batch.targets).logprobs)
        rows.append(torch.from_numpy(batch.indices).to(runtime.device)[batch.sequence])
        columns.append(batch.columns)
    if not logprobs:
        return torch.empty(0)
    stored = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
    return reweigh(StepTokens(torch.cat(logprobs), torch.cat(rows), stored)).detach()

"""One optimizer step over micro-batches; the result does not depend on how the step is cut."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from opd_mcp.engine.data.batches import Batch, build_batch, micro_batch_indices
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.losses.rows import RowLosses
from opd_mcp.engine.losses.weights import token_weights
from opd_mcp.engine.models.rows import head_logits, hidden_rows
from opd_mcp.engine.runtime import Runtime
from opd_mcp.schemas.recipes import Normalize

# logits of one tile of rows; more rows than fit are recomputed in the backward instead of being kept
TILE_BYTES = 256 * 2**20

Objective = Callable[[Tensor, Tensor, dict[str, Tensor]], RowLosses]


@dataclass(frozen=True)
class StepResult:
    """What a step computed before the optimizer moved: the loss, and per-token values in data order of the step."""

    loss: float
    logprobs: Tensor
    columns: dict[str, Tensor]
    tokens: int


def accumulate_gradients(
    model: PreTrainedModel,
    sequences: Sequences,
    indices: NDArray[np.int64],
    objective: Objective,
    *,
    normalize: Normalize,
    micro_batch_tokens: int,
    runtime: Runtime,
) -> StepResult:
    """Add the gradient of the weighted loss over the rows `indices` to the parameters' `.grad`.

    Normalisers are taken over the whole step first, so micro-batches only decide memory.
    """
    lengths = sequences.response_lengths()
    weights = token_weights(torch.from_numpy(lengths[indices]), normalize)
    weight_of_row = torch.zeros(len(sequences), dtype=torch.float64)
    weight_of_row[torch.from_numpy(indices)] = weights
    total = torch.zeros((), dtype=torch.float64)
    logprobs: list[Tensor] = []
    columns: dict[str, list[Tensor]] = {}
    for group in micro_batch_indices(sequences.lengths(), indices, micro_batch_tokens):
        if lengths[group].sum() == 0:
            continue
        batch = build_batch(sequences, group, runtime.device)
        losses = batch_losses(model, batch, objective, runtime)
        token_weight = weight_of_row[torch.from_numpy(group)].to(runtime.device)[batch.sequence]
        loss = (losses.loss * token_weight.to(losses.loss.dtype)).sum()
        torch.autograd.backward(loss)
        total += loss.detach().double().cpu()
        logprobs.append(losses.logprobs)
        for name, values in batch.columns.items():
            columns.setdefault(name, []).append(values)
    if not logprobs:
        return StepResult(0.0, torch.empty(0), {}, 0)
    joined = torch.cat(logprobs)
    return StepResult(float(total), joined, {name: torch.cat(parts) for name, parts in columns.items()}, len(joined))


def batch_losses(model: PreTrainedModel, batch: Batch, objective: Objective, runtime: Runtime) -> RowLosses:
    """The objective on every response token [R] of a batch, with at most TILE_BYTES of logits alive at once."""
    with torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=runtime.trains_in_autocast):
        hidden = hidden_rows(model, batch.input_ids, batch.rows)
    vocab = model.get_output_embeddings().weight.shape[0]
    tile = max(1, TILE_BYTES // (4 * vocab))
    if len(hidden) <= tile:
        return objective(head_logits(model, hidden), batch.targets, batch.columns)
    parts = [
        _recomputed_tile(model, hidden, batch, objective, slice(start, start + tile))
        for start in range(0, len(hidden), tile)
    ]
    return RowLosses(torch.cat([part.loss for part in parts]), torch.cat([part.logprobs for part in parts]))


def _recomputed_tile(
    model: PreTrainedModel, hidden: Tensor, batch: Batch, objective: Objective, rows: slice
) -> RowLosses:
    columns = {name: values[rows] for name, values in batch.columns.items()}

    def tile_losses(tile_hidden: Tensor) -> tuple[Tensor, Tensor]:
        losses = objective(head_logits(model, tile_hidden), batch.targets[rows], columns)
        return losses.loss, losses.logprobs

    return RowLosses(*checkpoint(tile_losses, hidden[rows], use_reentrant=False))

"""Padded batches whose response rows are selected before the head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_mcp.engine.data.sequences import Sequences


@dataclass(frozen=True)
class Batch:
    """B right-padded sequences of length L with R response tokens.

    `input_ids` [B, L]; `rows` [R] flat positions that predict the response tokens `targets` [R]; `sequence` [R] the
    batch row of each; `response_lengths` [B]; `columns` per-token values [R] or [R, k]; `indices` rows of the data set.
    """

    input_ids: Tensor
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    response_lengths: Tensor
    columns: dict[str, Tensor]
    indices: NDArray[np.int64]


def build_batch(sequences: Sequences, indices: NDArray[np.int64], device: torch.device, *, pad_id: int = 0) -> Batch:
    """The chosen rows as one padded batch on `device`; the last token of a row is never an input that predicts."""
    lengths = sequences.lengths()[indices]
    width = int(lengths.max(initial=1))
    input_ids = np.full((len(indices), width), pad_id, dtype=np.int64)
    rows: list[NDArray[np.int64]] = []
    for place, row in enumerate(indices):
        prompt, response = sequences.prompt(row), sequences.response(row)
        assert len(prompt) > 0, "a response is predicted from at least one prompt token"
        input_ids[place, : len(prompt)] = prompt
        input_ids[place, len(prompt) : lengths[place]] = response
        first = place * width + len(prompt) - 1
        rows.append(np.arange(first, first + len(response)))
    counts = sequences.response_lengths()[indices]
    flat = np.concatenate(
        [np.arange(sequences.response_offsets[row], sequences.response_offsets[row + 1]) for row in indices]
    )
    return Batch(
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(np.concatenate(rows)).to(device),
        torch.from_numpy(sequences.response_ids[flat].astype(np.int64)).to(device),
        torch.from_numpy(np.repeat(np.arange(len(indices)), counts)).to(device),
        torch.from_numpy(counts).to(device),
        {
            name: torch.from_numpy(np.ascontiguousarray(values[flat])).to(device)
            for name, values in sequences.columns.items()
        },
        indices,
    )


def micro_batch_indices(
    lengths: NDArray[np.int64], indices: NDArray[np.int64], token_budget: int
) -> list[NDArray[np.int64]]:
    """`indices` in groups of similar length whose padded size stays within `token_budget` (a long row goes alone)."""
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    groups: list[NDArray[np.int64]] = []
    start = 0
    while start < len(ordered):
        rows = max(1, token_budget // max(1, int(lengths[ordered[start]])))
        groups.append(ordered[start : start + rows])
        start += rows
    return groups


def shuffled_batches(rows: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """`steps` batches of row numbers: shuffled epochs laid end to end, so every row is used equally often."""
    queue: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(queue) < batch_size:
            queue = np.concatenate([queue, torch.randperm(rows, generator=generator).numpy()])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[NDArray[np.int64]]:
    """All row numbers in batches of similar length, longest first."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

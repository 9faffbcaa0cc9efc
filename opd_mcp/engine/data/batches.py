"""Micro-batches: rows laid end to end, with the places that predict their response tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_mcp.engine.data.sequences import Sequences


@dataclass(frozen=True)
class Batch:
    """B sequences laid end to end, T tokens, R of them response tokens.

    `input_ids` [T]; `lengths` of the B sequences; `rows` [R] places that predict the response tokens `targets` [R];
    `sequence` [R] the sequence of each; `columns` per-token values [R] or [R, k]; `places` [R] the tokens' places among
    all response tokens of the data set; `indices` [B] its rows.
    """

    input_ids: Tensor
    lengths: list[int]
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    columns: dict[str, Tensor]
    places: NDArray[np.int64]
    indices: NDArray[np.int64]


def build_batch(sequences: Sequences, indices: NDArray[np.int64], device: torch.device) -> Batch:
    """The chosen rows on `device`; the last token of a row is never an input that predicts."""
    lengths, counts = sequences.lengths()[indices], sequences.response_lengths()[indices]
    prompts = lengths - counts
    assert (prompts > 0).all(), "a response is predicted from at least one prompt token"
    places = ranges(sequences.response_offsets[indices], counts)
    starts = np.cumsum(lengths) - lengths
    input_ids = np.empty(int(lengths.sum()), dtype=np.int64)
    input_ids[ranges(starts, prompts)] = sequences.prompt_ids[ranges(sequences.prompt_offsets[indices], prompts)]
    input_ids[ranges(starts + prompts, counts)] = sequences.response_ids[places]
    return Batch(
        torch.from_numpy(input_ids).to(device),
        lengths.tolist(),
        torch.from_numpy(ranges(starts + prompts - 1, counts)).to(device),
        torch.from_numpy(sequences.response_ids[places].astype(np.int64)).to(device),
        torch.from_numpy(np.repeat(np.arange(len(indices)), counts)).to(device),
        {name: torch.from_numpy(np.ascontiguousarray(v[places])).to(device) for name, v in sequences.columns.items()},
        places,
        indices,
    )


def ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, … of every pair, laid end to end."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def shuffled_batches(
    rows: int, batch_size: int, steps: int, generator: torch.Generator, *, first: int = 0
) -> Iterator[NDArray[np.int64]]:
    """Batches `first` … `steps` − 1 of row numbers: shuffled epochs laid end to end, every row used equally often.

    The batches before `first` are drawn and passed over, so that those after it are the same as without it.
    """
    queue: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    for step in range(steps):
        while len(queue) < batch_size:
            queue = np.concatenate([queue, torch.randperm(rows, generator=generator).numpy()])
        if step >= first:
            yield queue[:batch_size]
        queue = queue[batch_size:]


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[NDArray[np.int64]]:
    """All row numbers in batches of similar length, longest first."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

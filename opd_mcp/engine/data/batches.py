"""Batches: the rows of each step, the micro-batches they are cut into, and a micro-batch's rows laid end to end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.runtime import generator_for

# the row numbers of one micro-batch
Group = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """B sequences laid end to end, T tokens, R of them response tokens.

    `input_ids` [T]; `lengths` of the B sequences; `rows` [R] positions that predict the response tokens `targets` [R];
    `sequence` [R] the sequence of each; `columns` per-token values [R] or [R, k]; `positions` [R] the tokens' positions
    among all response tokens of the data set; `indices` [B] its rows.
    """

    input_ids: Tensor
    lengths: list[int]
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    columns: dict[str, Tensor]
    positions: NDArray[np.int64]
    indices: NDArray[np.int64]


def build_batch(sequences: Sequences, indices: NDArray[np.int64], device: torch.device) -> Batch:
    """The chosen rows on `device`; the last token of a row is never an input that predicts."""
    lengths, counts = sequences.lengths()[indices], sequences.response_lengths()[indices]
    prompts = lengths - counts
    assert (prompts > 0).all(), "a response is predicted from at least one prompt token"
    positions = ranges(sequences.response_offsets[indices], counts)
    starts = np.cumsum(lengths) - lengths
    input_ids = np.empty(int(lengths.sum()), dtype=np.int64)
    input_ids[ranges(starts, prompts)] = sequences.prompt_ids[ranges(sequences.prompt_offsets[indices], prompts)]
    input_ids[ranges(starts + prompts, counts)] = sequences.response_ids[positions]
    return Batch(
        torch.from_numpy(input_ids).to(device),
        lengths.tolist(),
        torch.from_numpy(ranges(starts + prompts - 1, counts)).to(device),
        torch.from_numpy(sequences.response_ids[positions].astype(np.int64)).to(device),
        torch.from_numpy(np.repeat(np.arange(len(indices)), counts)).to(device),
        {
            name: torch.from_numpy(np.ascontiguousarray(v[positions])).to(device)
            for name, v in sequences.columns.items()
        },
        positions,
        indices,
    )


def ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, … of every pair, laid end to end."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def grouped_rows(
    lengths: NDArray[np.int64], indices: NDArray[np.int64], micro_batch_tokens: int, *, packed: bool
) -> list[Group]:
    """`indices` in micro-batches of at most `micro_batch_tokens` tokens, padding counted where rows are not packed."""
    return (packed_groups if packed else bucketed_groups)(lengths, indices, micro_batch_tokens)


def packed_groups(lengths: NDArray[np.int64], indices: NDArray[np.int64], micro_batch_tokens: int) -> list[Group]:
    """`indices` in groups of at most `micro_batch_tokens` tokens (a longer row goes alone), by first-fit decreasing.

    Rows of a group are in falling order of length, equal ones in the order given.
    """
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    groups: list[list[int]] = []
    room = np.empty(len(ordered), dtype=np.int64)
    for row in ordered.tolist():
        length = int(lengths[row])
        fits = room[: len(groups)] >= length
        place = int(fits.argmax()) if fits.any() else len(groups)
        if place == len(groups):
            groups.append([])
            room[place] = micro_batch_tokens
        groups[place].append(row)
        room[place] -= length
    return [np.asarray(group, dtype=np.int64) for group in groups]


def bucketed_groups(lengths: NDArray[np.int64], indices: NDArray[np.int64], micro_batch_tokens: int) -> list[Group]:
    """`indices` in groups of like length; each with padding is within `micro_batch_tokens` (a long row goes alone)."""
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    groups: list[Group] = []
    start = 0
    while start < len(ordered):
        rows = max(1, micro_batch_tokens // max(1, int(lengths[ordered[start]])))
        groups.append(ordered[start : start + rows])
        start += rows
    return groups


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


@dataclass(frozen=True)
class StepData:
    """The rows of one optimizer step, with the seconds it took to generate and to score them (0 from a cache).

    `row_weights` [N] say how much each row counts; None: all the same.
    """

    sequences: Sequences
    indices: NDArray[np.int64]
    seconds_generation: float = 0.0
    seconds_scoring: float = 0.0
    row_weights: NDArray[np.float64] | None = None


# the data of all steps from one on, so that a resumed loop gets what it would have got
StepsFrom = Callable[[int], Iterator[StepData]]


def shortened_steps(steps: StepsFrom, horizon: float, growth_steps: int | None) -> StepsFrom:
    """The steps with the beginning of each response only: `horizon` tokens, or below 1 that share of it.

    With `growth_steps` the part that is left out shrinks linearly to nothing by that step. The first 10 % of the tokens
    are reported to be worth all of them (arXiv 2605.31490).
    """

    def steps_from(first: int) -> Iterator[StepData]:
        for step, data in enumerate(steps(first), start=first):
            whole = data.sequences.response_lengths()
            kept = np.minimum(np.ceil(horizon * whole) if horizon < 1 else horizon, whole)
            grown = 0.0 if growth_steps is None else min(1.0, step / growth_steps)
            lengths = np.ceil(kept + grown * (whole - kept)).astype(np.int64)
            yield replace(data, sequences=data.sequences.beginnings(lengths))

    return steps_from


def steps_by_domain(steps: StepsFrom, domains: Mapping[str, int], weights: Mapping[str, float]) -> StepsFrom:
    """The steps with rows weighed by domain, whose place among the sorted names is in the tokens' column `domain`.

    `domains` are all rows by name; over them the mean weight is 1, and 1 is the weight of a domain that is not named.
    """
    names = sorted(domains)
    own = np.array([weights.get(name, 1.0) for name in names])
    counts = np.array([domains[name] for name in names])
    scale = counts.sum() / (counts * own).sum()

    def steps_from(first: int) -> Iterator[StepData]:
        for data in steps(first):
            rows = data.sequences
            places = np.array([names.index(domain) for domain in rows.domains], dtype=np.int32)
            marked = rows.with_columns(domain=np.repeat(places, rows.response_lengths()))
            yield replace(data, sequences=marked, row_weights=scale * own[places] if weights else None)

    return steps_from


def stored_batches(sequences: Sequences, *, steps: int, batch_size: int, seed: int, scope: str) -> StepsFrom:
    """Shuffled epochs over stored rows."""

    def steps_from(first: int) -> Iterator[StepData]:
        generator, size = generator_for(seed, scope, "order"), min(batch_size, len(sequences))
        for indices in shuffled_batches(len(sequences), size, steps, generator, first=first):
            # copied together: a cache is a memory-mapped file, and a step reads its own rows only
            yield StepData(sequences.take(indices), np.arange(len(indices)))

    return steps_from

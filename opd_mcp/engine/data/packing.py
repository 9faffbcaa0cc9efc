"""How rows share a micro-batch: packed end to end, or bucketed by length where a model must be padded."""

import numpy as np
from numpy.typing import NDArray

Group = NDArray[np.int64]


def grouped_rows(
    lengths: NDArray[np.int64], indices: NDArray[np.int64], token_budget: int, *, packed: bool
) -> list[Group]:
    """`indices` in micro-batches of at most `token_budget` tokens, padding counted where rows are not packed."""
    return (packed_groups if packed else bucketed_groups)(lengths, indices, token_budget)


def packed_groups(lengths: NDArray[np.int64], indices: NDArray[np.int64], token_budget: int) -> list[Group]:
    """`indices` in groups of at most `token_budget` tokens (a longer row goes alone), by first-fit decreasing.

    Rows of a group stand in falling order of length, equal ones in the order given.
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
            room[place] = token_budget
        groups[place].append(row)
        room[place] -= length
    return [np.asarray(group, dtype=np.int64) for group in groups]


def bucketed_groups(lengths: NDArray[np.int64], indices: NDArray[np.int64], token_budget: int) -> list[Group]:
    """`indices` in groups of similar length whose padded size stays within `token_budget` (a long row goes alone)."""
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    groups: list[Group] = []
    start = 0
    while start < len(ordered):
        rows = max(1, token_budget // max(1, int(lengths[ordered[start]])))
        groups.append(ordered[start : start + rows])
        start += rows
    return groups

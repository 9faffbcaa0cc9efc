"""The style residual of a mismatched teacher, estimated from a cache and taken off its scores.

A teacher that is not the SFT teacher disagrees with the student's rollouts for two reasons: the answer, and the style
in which the SFT teacher taught it to write. What the disagreement d_t = log π_T(a_t) − log π_ref(a_t) has in common
wherever the same token, or the same situation, occurs is taken for style (Lightning OPD 2.0, arXiv 2607.28449):

    b_t = ½ · mean(d | token a_t) + ½ · mean(d | position × surprisal of t),   repaired score = log π_T(a_t) − b_t

Each mean is over the other folds of prompts, so no token's own score enters its residual. The paper gives neither the
bins nor what happens to an unseen token: here positions are binned by powers of two and surprisals by deciles, and an
unseen token or situation gets the mean of all tokens of the other folds.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.schemas.errors import ConsistencyError
from opd_mcp.schemas.reports import RepairSummary

FOLDS = 5
POSITION_BINS = 16
SURPRISAL_BINS = 10


def repaired(sequences: Sequences) -> tuple[Sequences, RepairSummary]:
    """The same rows with the residual b [T] taken off `teacher_logprobs` (float32), and how much that was.

    Raises ConsistencyError `behaviour_missing` for a cache without the behaviour policy's log-probs.
    """
    if "behaviour_logprobs" not in sequences.columns:
        raise ConsistencyError(
            "behaviour_missing",
            "The scores cannot be repaired: this cache does not hold the behaviour policy's log-probs.",
            fix="Set distill.repair to 'none', or build the cache here: it stores them.",
        )
    teacher = sequences.columns["teacher_logprobs"].astype(np.float64)
    behaviour = sequences.columns["behaviour_logprobs"].astype(np.float64)
    difference = teacher - behaviour
    folds = np.repeat(prompt_folds(sequences), sequences.response_lengths())
    tokens = sequences.response_ids.astype(np.int64)
    residual = 0.5 * held_out_means(difference, tokens, folds) + 0.5 * held_out_means(
        difference, situations(sequences.response_offsets, -behaviour), folds
    )
    summary = RepairSummary(
        tokens=len(difference),
        folds=FOLDS,
        mean_difference=float(difference.mean()) if len(difference) else 0.0,
        mean_residual=float(residual.mean()) if len(residual) else 0.0,
        explained_variance=_explained(difference, residual),
    )
    return sequences.with_columns(teacher_logprobs=(teacher - residual).astype(np.float32)), summary


def prompt_folds(sequences: Sequences) -> NDArray[np.int64]:
    """The fold of each row [N], by its prompt's ids: rows of one prompt share a fold."""
    digests = (blake2b(sequences.prompt(row).tobytes(), digest_size=4).digest() for row in range(len(sequences)))
    return np.fromiter((int.from_bytes(digest) % FOLDS for digest in digests), np.int64, len(sequences))


def situations(response_offsets: NDArray[np.int64], surprisal: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin [T] of each token's position in its response and of its surprisal −log π_ref under the student."""
    lengths = np.diff(response_offsets)
    position = np.arange(len(surprisal)) - np.repeat(response_offsets[:-1] - response_offsets[0], lengths)
    position_bin = np.minimum(np.log2(position + 1).astype(np.int64), POSITION_BINS - 1)
    if not len(surprisal):
        return position_bin
    edges = np.quantile(surprisal, np.linspace(0, 1, SURPRISAL_BINS + 1)[1:-1])
    return position_bin * SURPRISAL_BINS + np.searchsorted(edges, surprisal, side="right")


def held_out_means(
    values: NDArray[np.float64], groups: NDArray[np.int64], folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    """For each value [T] the mean of its group over the other folds; of all groups where it has none there."""
    width = int(groups.max(initial=0)) + 1
    cells, flat = FOLDS * width, folds * width + groups
    sums = np.bincount(flat, weights=values, minlength=cells).reshape(FOLDS, width)
    counts = np.bincount(flat, minlength=cells).reshape(FOLDS, width)
    other_sums, other_counts = sums.sum(axis=0) - sums, counts.sum(axis=0) - counts
    overall = other_sums.sum(axis=1) / np.maximum(other_counts.sum(axis=1), 1)
    means = np.where(other_counts > 0, other_sums / np.maximum(other_counts, 1), overall[:, None])
    return means.reshape(-1)[flat]


def _explained(difference: NDArray[np.float64], residual: NDArray[np.float64]) -> float:
    variance = float(difference.var()) if len(difference) else 0.0
    return 1.0 - float((difference - residual).var()) / variance if variance > 0 else 0.0

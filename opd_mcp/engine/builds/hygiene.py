"""What is odd in prompts and rollouts: counted, and left out or cut only where the recipe says so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.data.sequences import TRUNCATED, Sequences
from opd_mcp.identity.data.overlap import eval_overlap
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.schemas.cache import Hygiene
from opd_mcp.schemas.recipes import ScoreRecipe


def prompt_hygiene(rows: list[PromptRow], usable: int, evaluation: Path | None) -> Hygiene:
    """Counts over the prompts; `usable` of them have a length that fits."""
    texts = [row.text() for row in rows]
    overlap = {} if evaluation is None else eval_overlap(texts, [row.text() for row in read_prompts(evaluation)])
    return Hygiene(
        prompts=len(rows),
        over_long_prompts=len(rows) - usable,
        duplicate_prompts=len(texts) - len(set(texts)),
        **overlap,
    )


def without_truncated(sequences: Sequences, recipe: ScoreRecipe) -> tuple[Sequences, int, int]:
    """The rows as the recipe wants truncated ones, and how many were dropped and capped."""
    truncated = np.asarray(sequences.finish_reasons) == TRUNCATED
    if recipe.on_truncated == "keep" or not truncated.any():
        return sequences, 0, 0
    if recipe.on_truncated == "drop":
        return sequences.take(np.flatnonzero(~truncated)), int(truncated.sum()), 0
    lengths = sequences.response_lengths()
    limit = np.full(len(sequences), recipe.cap_tokens or 0) if recipe.cap_tokens else (lengths + 1) // 2
    kept = np.where(truncated, np.minimum(lengths, limit), lengths)
    capped = int((kept < lengths).sum())
    return _cut(sequences, kept), 0, capped


def _cut(sequences: Sequences, lengths: NDArray[np.int64]) -> Sequences:
    starts = sequences.response_offsets[:-1]
    places = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    columns = {name: values[places] for name, values in sequences.columns.items()}
    return replace(sequences, response_ids=sequences.response_ids[places], response_offsets=offsets, columns=columns)
